"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# triton decides when it is imported whether its kernels are compiled or interpreted, and other
# tests import packages that import it
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# with `pytest -n 2` each process has a core of its own, or two
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what `make test FULL=1` and `make test-slurm FULL=1` run besides."""
    if os.environ.get("ESCAIP_TEST_FULL", "") not in ("", "0"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real DFT frames that is not part of the project."""
    path = Path(os.environ.get("ESCAIP_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no test data at {path}; set ESCAIP_TEST_DATA")
    return path


@pytest.fixture(scope="session")
def quick_start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder where README's quick start was typed, made small and with all loggers; its output.

    The run is in ``runs/first``; tests must leave it as it is.
    """
    from docs_helpers import carry_out, fill, quick_start_calls
    from run_helpers import SHRUNK, fairchem

    folder = tmp_path_factory.mktemp("quick_start")
    fill(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("ESCAIP_DATA", "data")
        sample, training, *rest = quick_start_calls(folder / "bash")
        carry_out(sample, monkeypatch)
        loggers = ["logger=wandb", "tensorboard=true"]
        output = fairchem(folder, *training.arguments, *SHRUNK, *loggers).stdout
        for call in rest:
            carry_out(call, monkeypatch)
    return folder, output
