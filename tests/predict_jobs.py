"""Ranks that predict together, or one that is killed again and again; for `test_predict.py`.

One process imports and predicts, and then its forks do: the first prediction takes longest.
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


def alone(folder: Path, settings: dict[str, Any]) -> None:
    """Predict without a process group."""
    runner = PredictRunner(**settings)
    runner.job_config = job(folder)
    runner.run()


def predict(folder: Path, rank: int, size: int, settings: dict[str, Any]) -> None:
    """Be a rank."""
    folder.mkdir(parents=True, exist_ok=True)
    with ranks(folder, rank, size):
        alone(folder, settings)


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


def killed(folder: Path, kills: int, seconds: float, settings: dict[str, Any]) -> int:
    """Predict, with kills at random moments; returns how many hit before the end."""
    forked = multiprocessing.get_context("fork")
    generator = random.Random(1)
    hits = 0
    for _ in range(kills):
        process = forked.Process(target=alone, args=(folder, settings))
        process.start()
        time.sleep(generator.uniform(0, seconds))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            hits += 1
        process.join()
    alone(folder, settings)
    assert complete(folder / "results")
    return hits


if __name__ == "__main__":
    target, chosen, n_kills = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    alone(target / "alone", chosen)
    start = time.monotonic()
    alone(target / "again", chosen)
    took = time.monotonic() - start
    together(target / "ranks", 3, chosen)
    print(killed(target / "killed", n_kills, took, chosen))
