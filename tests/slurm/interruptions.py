"""Interruptions of a job at a random moment of its life."""

from __future__ import annotations

import random
import signal
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster import OVER, alive, kill, waiting_signals
from jobs import EVALUATE, STEPS

if TYPE_CHECKING:
    from cluster import Cluster
    from jobs import Training

KINDS = ["requeue", "node", "usr2", "kill", "limit", "term", "daemon"]
STAGES = ["start-up", "step", "checkpoint", "evaluation", "end"]
# A node that fails takes all of its jobs along, so they have the second one, one at a time.
_second_node = threading.Lock()


@dataclass(frozen=True)
class Interruption:
    """What happens to a job, and when.

    Attributes:
        number: To name it.
        kind: ``requeue``, as by a preemption; ``kill``: SIGKILL to the training process; ``node``:
            it fails and comes back; ``usr2``, submitit's signal, and ``term``, sent to all ranks;
            ``limit``: its time limit; ``daemon``: slurmd is killed and started, which the job must
            not notice.
        stage: ``start-up``, ``step``, ``checkpoint``, ``evaluation``, ``end``.
        after: Steps done before.
        delay: Seconds after that.
    """

    number: int
    kind: str
    stage: str
    after: int
    delay: float

    def __str__(self) -> str:
        return f"{self.number}-{self.kind}-{self.stage}-{self.after}+{self.delay:.2f}s"

    def settings(self) -> list[str]:
        """Overrides that it needs: where the job runs."""
        options = "+job.scheduler.slurm.additional_parameters"
        node = ["job.scheduler.slurm.partition=both", f"{options}.nodelist=SECOND"]
        # only the first node has a name that can be looked up
        node.append("job.scheduler.distributed_init_method=FILE")
        return ["cluster=slurm_cpu", *(node if self.kind in ("node", "daemon") else [])]

    def carry_out(self, training: Training) -> None:
        """Submit a training, interrupt it, and let it finish."""
        second = training.slurm.nodes[1]
        training.settings = [text.replace("SECOND", second) for text in self.settings()]
        with _second_node if self.kind in ("node", "daemon") else nullcontext():
            job = training.submit()
            training.slurm.wait_running(job)
            self._wait(training, job)
            self._interrupt(training, job)
            training.finish()

    def _wait(self, training: Training, job: str) -> None:
        def reached() -> bool:
            return training.step() >= self.after or training.slurm.state_of(job) in OVER

        if self.stage != "start-up":
            training.slurm.until(reached, timeout=180, every=0.05)
        if self.stage == "checkpoint":
            folder = training.run / "checkpoints"
            end = time.monotonic() + 10
            while time.monotonic() < end and not [*folder.glob(".partial*")]:
                time.sleep(0.002)
        time.sleep(self.delay)

    def _interrupt(self, training: Training, job: str) -> None:
        slurm = training.slurm
        if self.kind in ("node", "daemon"):
            slurm.kill_slurmd(slurm.nodes[1], jobs=self.kind == "node")
            slurm.start_slurmd(slurm.nodes[1])
        elif self.kind == "requeue":
            with suppress(RuntimeError):  # it is over
                slurm.requeue(job)
        elif self.kind in ("kill", "limit"):
            slurm.until(
                lambda: bool(slurm.rank_processes(job)) or slurm.state_of(job) in OVER, timeout=60
            )
            for process in slurm.rank_processes(job):
                if self.kind == "kill":
                    kill(process, signal.SIGKILL)
                else:
                    _reach_limit(slurm, job, process)
        else:
            with suppress(RuntimeError):
                slurm.signal(job, self.kind.upper())


def _reach_limit(slurm: Cluster, job: str, process: int) -> None:
    """Let a job reach its time limit here: SLURM looks for those that did twice a minute."""
    kill(process, signal.SIGSTOP)
    try:
        slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
        slurm.until(
            lambda: bool(waiting_signals(process)) or not alive(process), timeout=120, every=0.05
        )
        slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60", check=False)
    finally:
        kill(process, signal.SIGCONT)


def interruptions(count: int, seed: int = 0) -> list[Interruption]:
    """Random ones, of every kind and stage in turn."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        # the two lists have no common divisor, so every pair comes up
        kind, stage = KINDS[number % len(KINDS)], STAGES[(number + 1) % len(STAGES)]
        after = {
            "start-up": 0,
            "evaluation": EVALUATE * rng.randint(1, STEPS // EVALUATE),
            "end": STEPS,
        }.get(stage, rng.randint(1, STEPS - 2))
        longest = {"start-up": 12.0, "step": 0.5, "checkpoint": 0.05}.get(stage, 0.3)
        found.append(Interruption(number, kind, stage, after, rng.uniform(0, longest)))
    return found
