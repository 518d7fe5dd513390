"""Processes that load data."""

from __future__ import annotations

import subprocess
import sys

# A traceback, too, may keep the iterator whose end would end its worker.
STOPPED = """
import multiprocessing, os, signal, sys, time, torch
from escaip_fairchem.data.loaders import get_dataloader
loader = get_dataloader(torch.arange(4), lambda **_: [[0, 1], [2, 3]], list, num_workers=1)
sys.kept = iter(loader)
next(sys.kept)
for worker in multiprocessing.active_children():
    os.kill(worker.pid, signal.SIGHUP)  # as by a terminal that closes
time.sleep(0.5)
raise SystemExit(143)
"""


def test_process_ends_though_workers_leave_signals_to_it() -> None:
    done = subprocess.run([sys.executable, "-c", STOPPED], timeout=120, check=False)
    assert done.returncode == 143
