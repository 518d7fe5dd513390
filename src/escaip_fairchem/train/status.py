"""What a run is doing, in a file of its folder. It imports the standard library only."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from escaip_fairchem.files import write_whole
from escaip_fairchem.train.lock import holder, slurm_job_id

STATUS_NAME = "status.json"
#: States of a process that lives.
ALIVE = ("starting", "running")


@dataclass
class RunStatus:
    """Content of status.json.

    Attributes:
        state: ``starting``, ``running``, ``finished``, ``paused`` (at `stop_at_step`),
            ``interrupted`` (by a signal; can be continued), ``failed`` (by an exception). As read:
            also ``dead`` (the process ended without a word) and ``absent`` (there is no file).
        step: Steps done.
        total_steps: Steps of the whole run, if something limits it.
        epoch: Passes over the data done.
        loss: Of the last training step, on the first rank.
        steps_per_second: Over the last steps.
        seconds_left: Until the end, evaluations included.
        updated: Unix time at which the file was written.
        host: Machine of the first rank.
        pid: Process of the first rank.
        slurm_job_id: Of the form ``12`` or ``12_3``.
        started: Unix time at which the process started the run.
        restarts: How often the run was continued.
        reason: Why it failed or was interrupted.
    """

    state: str = "absent"
    step: int = 0
    total_steps: int | None = None
    epoch: float = 0.0
    loss: float | None = None
    steps_per_second: float | None = None
    seconds_left: float | None = None
    updated: float | None = None
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    slurm_job_id: str | None = field(default_factory=slurm_job_id)
    started: float = field(default_factory=time.time)
    restarts: int = 0
    reason: str | None = None


def read_status(run: Path) -> RunStatus:
    """The status of a run.

    Args:
        run: Folder of the run; it need not exist.

    Returns:
        What status.json says; a state of a process that no longer lives is ``dead``.
    """
    status = _read(run)
    if status.state in ALIVE and holder(run) is None:
        # it may have ended in good order between the two looks
        status = _read(run)
        if status.state in ALIVE and holder(run) is None:
            status.state = "dead"
    return status


def write_status(run: Path, status: RunStatus) -> None:
    """Write status.json whole, or leave it as it was, such as on a full disk: no run ends for it.

    Args:
        run: Folder of the run.
        status: What to write; `updated` is set.
    """
    status.updated = time.time()
    text = json.dumps(asdict(status), indent=1) + "\n"
    with contextlib.suppress(OSError):
        write_whole(Path(run) / STATUS_NAME, text, sync=False)


def _read(run: Path) -> RunStatus:
    try:
        found = json.loads((Path(run) / STATUS_NAME).read_text())
        known = {entry.name for entry in fields(RunStatus)}
        return RunStatus(**{key: value for key, value in found.items() if key in known})
    except (OSError, ValueError, AttributeError):
        return RunStatus(host="", pid=0, slurm_job_id=None, started=0.0)
