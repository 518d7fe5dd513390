"""Trainings on the tests' SLURM: submitted by fairchem's command, and compared to the last bit."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import re
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

if TYPE_CHECKING:
    from cluster import Cluster

RECIPE = Path(__file__).parents[2] / "configs" / "oc20" / "escaip_2m.yml"
STEPS, EVALUATE, CHECKPOINT = 12, 5, 3
#: A model of seconds; with dropout, which needs the state of the random numbers.
SETTINGS = [
    "backbone=tiny", "backbone.mlp_dropout=0.1", "backbone.attention_dropout=0.1",
    "dataset=sample", "max_atoms=50", "epochs=null", f"steps={STEPS}", "optim.ema_decay=0.9",
    f"evaluate_every_n_steps={EVALUATE}", f"checkpoint_every_n_steps={CHECKPOINT}",
    "runner.callbacks.0.every_n_steps=1",
    "job.scheduler.slurm.mem_gb=2", "job.scheduler.slurm.cpus_per_task=1",
]  # fmt: skip
# Hydra's state, the environment and the folder are of the whole process.
_one_at_a_time = threading.Lock()


@dataclass
class Training:
    """A training in a folder, as often submitted as it needs.

    Attributes:
        slurm: Where it runs.
        folder: Where the command is given; the data are in ``data`` there.
        name: Its `job.timestamp_id`.
        settings: Overrides besides `SETTINGS`.
        jobs: Numbers of the jobs that were submitted for it.
    """

    slurm: Cluster
    folder: Path
    name: str
    settings: list[str] = field(default_factory=lambda: ["cluster=slurm_cpu"])
    jobs: list[str] = field(default_factory=list)

    @property
    def run(self) -> Path:
        """Folder of the run."""
        return self.folder / "runs" / self.name

    def environment(self) -> dict[str, str]:
        """Variables of the command; two trainings at a time share two cores."""
        return self.slurm.environment(ESCAIP_DATA="data", OMP_NUM_THREADS="1")

    def arguments(self) -> list[str]:
        """The command, after ``fairchem``."""
        name = f"job.timestamp_id={self.name}"
        return ["-c", str(RECIPE), *SETTINGS, name, *self.settings]

    def submit(self) -> str:
        """Give the command, in this process: its imports take ten seconds. The job's number."""
        from fairchem.core import _cli

        self.slurm.jobs()  # starts a controller that died
        _, recipe, *overrides = self.arguments()
        with (
            _one_at_a_time,
            mock.patch.dict(os.environ, self.environment(), clear=True),
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            known = set(self.logs().glob("*_submission.sh"))
            _cli.main(argparse.Namespace(config=recipe), overrides)
        (new,) = set(self.logs().glob("*_submission.sh")) - known
        self.jobs.append(new.name.partition("_")[0])
        return self.jobs[-1]

    def finish(self, *, timeout: float = 600) -> None:
        """Wait for the job; where it did not complete, give the same command again."""
        for _ in range(4):
            if self.slurm.wait(self.jobs[-1], timeout=timeout) == "COMPLETED":
                return
            self.submit()
        raise AssertionError(f"{self.name} never completes: {self.log()[-3000:]}")

    def logs(self) -> Path:
        """Folder of the log files."""
        return self.run / "logs"

    def log(self, rank: int = 0) -> str:
        """What a rank wrote, in all jobs."""
        return "".join(
            (self.logs() / f"{job}_{rank}_log.{kind}").read_text(errors="replace")
            for job in self.jobs
            for kind in ("out", "err")
            if (self.logs() / f"{job}_{rank}_log.{kind}").exists()
        )

    def restarts(self) -> int:
        """How often it began again: requeued by SLURM, or submitted again."""
        requeued = sum(int(self.slurm.show(job)["Restarts"]) for job in self.jobs)
        return requeued + len(self.jobs) - 1

    def step(self) -> int:
        """The last step in metrics.csv."""
        rows = self.metrics()
        return int(rows[-1]["step"]) if rows else 0

    def metrics(self) -> list[dict[str, str]]:
        """Rows of metrics.csv, but for the time."""
        file = self.run / "metrics.csv"
        if not file.exists():
            return []
        with file.open(newline="") as lines:
            rows = [row for row in csv.DictReader(lines) if row["step"]]
        return [{key: row[key] for key in row if key != "wall_time_s"} for row in rows]

    def weights(self) -> dict[str, Any]:
        """Weights and their average, at the end."""
        file = self.run / "checkpoints" / "final" / "inference_ckpt.pt"
        checkpoint = torch.load(file, weights_only=False, map_location="cpu")
        parts = {"model": checkpoint.model_state_dict, "average": checkpoint.ema_state_dict}
        return {
            f"{part} {name}": value for part, all_ in parts.items() for name, value in all_.items()
        }


def assert_same(one: Training, other: Training) -> None:
    """The same learning curve, and the same weights to the last bit."""
    assert one.metrics() == other.metrics()
    mine, theirs = one.weights(), other.weights()
    assert mine.keys() == theirs.keys()
    assert len(mine) > 100
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different


def sample_data(folder: Path) -> None:
    """Make the sample of OC20, small."""
    from escaip_fairchem.cli import main

    command = ["sample-data", "oc20", "--frames", "60"]
    with (
        mock.patch.dict(os.environ, ESCAIP_DATA="data"),
        mock.patch.object(sys, "argv", ["escaip", *command]),
        contextlib.chdir(folder),
    ):
        main()


def job_number(output: str) -> str:
    """The number of the job in what the command prints."""
    return re.search(r"slurm id: (\d+)", output)[1]
