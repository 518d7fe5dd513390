"""How the points of a sweep stand, from their folders and SLURM's queue."""

from __future__ import annotations

import getpass
import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from escaip_fairchem.errors import UserError
from escaip_fairchem.sweep.halving import decision, rungs
from escaip_fairchem.train.lock import holder
from escaip_fairchem.train.metrics import FILE_NAME, read_metrics
from escaip_fairchem.train.status import RunStatus, read_status

if TYPE_CHECKING:
    from pathlib import Path

    from escaip_fairchem.sweep.store import Sweep

#: Somebody works on these, or will: they are left alone.
BUSY = ("queued", "starting", "running")
#: The same command leaves these alone too.
SETTLED = ("finished", "failed", "canceled", "eliminated")
#: Of a point that runs on this machine, in the folder of its run.
LOCAL_LOG = "output.log"
_LOG_BYTES = 20_000
# SLURM's words for jobs that wait, once more perhaps.
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED")


@dataclass
class PointState:
    """How a point stands.

    Attributes:
        name: Of the point.
        state: One of `BUSY`, `SETTLED`, ``paused``, ``interrupted``, ``dead`` (its process ended
            without a word), ``lost`` (its job ended before it began), ``new``.
        status: What its run says.
        metrics: Last value of each column of metrics.csv.
        job: SLURM's id, if it has one.
        reason: Why it is not running.
        rung: Of successive halving.
    """

    name: str
    state: str
    status: RunStatus
    metrics: dict[str, Any]
    job: str | None = None
    reason: str | None = None
    rung: int = 0


def look(sweep: Sweep) -> list[PointState]:
    """How all points stand.

    Raises:
        UserError: SLURM does not answer.
    """
    queue = squeue() if sweep.slurm and sweep.submissions else {}
    jobs = {name: job for entry in sweep.submissions for job, name in entry["tasks"] if name}
    return [_look_at(sweep, name, jobs.get(name), queue) for name in sweep.points]


def _look_at(sweep: Sweep, name: str, job: str | None, queue: dict[str, str]) -> PointState:
    run = sweep.run(name)
    status = read_status(run)
    if queue.get(status.slurm_job_id or "", "") or job is None:
        job = status.slurm_job_id or job
    metrics: dict[str, Any] = {}
    for row in read_metrics(run / FILE_NAME):
        metrics.update(row)
    state = PointState(name, status.state, status, metrics, job, status.reason, _rung(sweep, name))
    waits = queue.get(job or "")
    # a process that has said its last word may still be in the queue for a moment
    over = state.state in ("finished", "failed") and status.slurm_job_id == job
    if waits is not None and state.state not in BUSY and not (over and waits not in _WAITING):
        # a lock may not be seen from another machine: the queue knows better than `dead`
        state.state = "queued" if waits in _WAITING else "starting"
        if state.state == "starting" and status.state == "dead":
            state.state = "running"
    elif name in sweep.canceled and state.state not in (*BUSY, "finished"):
        state.state = "canceled"
    elif state.state == "paused" and _eliminated(sweep, name):
        state.state = "eliminated"
    elif state.state == "absent":
        state.state = _before_the_first_word(sweep, name, job)
    if state.state in ("lost", "dead") and not state.reason:
        last = log_tail(sweep, state, lines=1)
        state.reason = last[0] if last else None
    return state


def _before_the_first_word(sweep: Sweep, name: str, job: str | None) -> str:
    """The state of a point without a status: imports take a while."""
    if job is None and not (sweep.run(name) / LOCAL_LOG).exists():
        return "new"
    owner = None if job else holder(sweep.folder)
    # of this process, which asks when it starts none or one has ended
    return "lost" if owner is None or owner["pid"] == os.getpid() else "starting"


def open_jobs(sweep: Sweep) -> set[str]:
    """Jobs of the sweep that SLURM has not finished with."""
    if not sweep.submissions:
        return set()
    queue = squeue()
    return {job for entry in sweep.submissions for job, _ in entry["tasks"] if job in queue}


def squeue() -> dict[str, str]:
    """The user's jobs: id, of the form ``12`` or ``12_3``, and SLURM's word for its state.

    Raises:
        UserError: SLURM does not answer.
    """
    command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format=%i %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"squeue does not answer ({error}); run this where SLURM is") from error
    if done.returncode:
        raise UserError(f"squeue does not answer: {' '.join(done.stderr.split())}")
    lines = (line.split() for line in done.stdout.splitlines())
    return {line[0]: line[1] for line in lines if line[1] != "COMPLETING"}


def _rung(sweep: Sweep, name: str) -> int:
    if not sweep.halving:
        return 0
    rung = 0
    while (found := decision(sweep, rung + 1)) and name in found["names"]:
        rung += 1
    return rung


def _eliminated(sweep: Sweep, name: str) -> bool:
    if not sweep.halving:
        return False
    rung = _rung(sweep, name) + 1
    return rung <= len(rungs(sweep).steps) and decision(sweep, rung) is not None


def log_tail(sweep: Sweep, state: PointState, lines: int = 10) -> list[str]:
    """Last lines that a point wrote, on SLURM or locally."""
    files: list[Path] = [sweep.run(state.name) / LOCAL_LOG]
    if state.job:
        files += [sweep.log_folder / f"{state.job}_0_log.{ending}" for ending in ("out", "err")]
    found = [file for file in files if file.is_file() and file.stat().st_size]
    if not found:
        return []
    with max(found, key=lambda file: file.stat().st_mtime).open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - _LOG_BYTES))
        text = file.read().decode(errors="replace")
    # a progress bar rewrites its line
    rows = [row.rpartition("\r")[2].rstrip() for row in text.splitlines()]
    return [row for row in rows if row][-lines:]
