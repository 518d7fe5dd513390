"""Ranks that predict together, or one that is killed again and again; for `test_predict.py`.

One process imports, and its forks predict: each would take longer to import than to predict.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from fairchem.core.launchers.api import SchedulerType
from fairchem.core.units.mlip_unit import predict as _slow_to_import  # noqa: F401
from omegaconf import OmegaConf

from escaip_fairchem.predict.parts import complete
from escaip_fairchem.predict.runner import PredictRunner
from unit_parts import ranks


def job(folder: Path, array_job: int = 0, n_array_jobs: int = 1) -> Any:
    """What a runner and a reducer read of fairchem's job."""
    return OmegaConf.create(
        {
            "scheduler": {
                "mode": SchedulerType.SLURM if n_array_jobs > 1 else SchedulerType.LOCAL,
                "num_array_jobs": n_array_jobs,
            },
            "metadata": {"results_dir": str(folder / "results"), "array_job_num": array_job},
        }
    )


def predict(folder: Path, rank: int, size: int, settings: dict[str, Any]) -> None:
    """Be a rank."""
    torch.set_num_threads(1)
    runner = PredictRunner(**settings)
    runner.job_config = job(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with ranks(folder, rank, size):
        runner.run()


def together(folder: Path, size: int, settings: dict[str, Any]) -> None:
    """Predict by several ranks."""
    forked = multiprocessing.get_context("fork")
    processes = [
        forked.Process(target=predict, args=(folder, rank, size, settings)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def killed(folder: Path, kills: int, settings: dict[str, Any]) -> int:
    """Predict, with kills at random moments; returns how many hit before the end."""
    forked = multiprocessing.get_context("fork")
    generator = random.Random(1)
    hits = 0
    for _ in range(kills):
        (folder / "store1").unlink(missing_ok=True)
        process = forked.Process(target=predict, args=(folder, 0, 1, settings))
        process.start()
        time.sleep(generator.uniform(0.2, 1.5))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            hits += 1
        process.join()
    (folder / "store1").unlink(missing_ok=True)
    predict(folder, 0, 1, settings)
    assert complete(folder / "results")
    return hits


if __name__ == "__main__":
    target, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    for n_ranks in (2, 3):
        together(target / f"ranks{n_ranks}", n_ranks, settings)
    print(killed(target / "killed", int(sys.argv[3]), settings))
