"""Processes that load data."""

from __future__ import annotations

import subprocess
import sys

# A traceback, too, may keep the iterator whose end would end its worker.
STOPPED = """
import sys, torch
from escaip_fairchem.data.loaders import get_dataloader
loader = get_dataloader(torch.arange(4), lambda **_: [[0, 1], [2, 3]], list, num_workers=1)
sys.kept = iter(loader)
next(sys.kept)
raise SystemExit(143)
"""


def test_process_ends_though_workers_leave_signals_to_it() -> None:
    done = subprocess.run([sys.executable, "-c", STOPPED], timeout=120, check=False)
    assert done.returncode == 143
