"""A lock on the folder of a run: two processes that train into it would spoil it.

The lock is one of the operating system (`fcntl.lockf`), so it ends with the process that holds it,
however that ends; also over NFS. It imports the standard library only.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO, Any, Self

from escaip_fairchem.errors import UserError

LOCK_NAME = "run.lock"
#: Another process may hold the lock for a moment, to see whether it is free.
MOMENT = 1.0
#: A requeued job may start before the processes of its last start are gone.
PATIENCE = 60.0
REMEDY = "wait for it or stop it, or give another job.timestamp_id"

#: Locks of this process. The system drops a lock when its process closes any handle of the file.
_held: dict[Path, RunLock] = {}


class RunLock:
    """Holds the lock of a run, as a context manager.

    Args:
        run: Folder of the run; made if it is absent.
        remedy: What to do where another process holds it.

    Raises:
        UserError: On entering, when another process holds the lock.
    """

    def __init__(self, run: Path, remedy: str = REMEDY) -> None:
        self.run = Path(run).resolve()
        self._remedy = remedy
        self.about = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slurm_job_id": slurm_job_id(),
            "started": time.time(),
        }
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        """Take the lock, and write into the file who holds it."""
        if self.run in _held:
            raise UserError(_refusal(self.run, self.about, self._remedy))
        self.run.mkdir(parents=True, exist_ok=True)
        file = (self.run / LOCK_NAME).open("a+")
        start = time.monotonic()
        while not _lock(file, fcntl.LOCK_EX):
            other = _read(file)
            mine = self.about["slurm_job_id"]
            same_job = mine is not None and other.get("slurm_job_id") == mine
            if time.monotonic() - start > (PATIENCE if same_job else MOMENT):
                file.close()
                raise UserError(_refusal(self.run, other, self._remedy))
            time.sleep(0.1)
        file.truncate(0)
        file.write(json.dumps(self.about) + "\n")
        file.flush()
        self._file = file
        _held[self.run] = self
        return self

    def __exit__(self, *_: object) -> None:
        """Free the lock; the file stays."""
        if self._file is not None:
            del _held[self.run]
            self._file.close()
            self._file = None


def holder(run: Path) -> dict[str, Any] | None:
    """Who trains into the folder of a run.

    Args:
        run: Folder of the run; it need not exist.

    Returns:
        host, pid, slurm_job_id and started (Unix time) of the process that holds the lock; None
        if none does, and where the file system has no locks.
    """
    run = Path(run).resolve()
    if run in _held:
        return dict(_held[run].about)
    try:
        with (run / LOCK_NAME).open("r") as file:
            return None if _lock(file, fcntl.LOCK_SH) else _read(file)
    except FileNotFoundError:
        return None


def slurm_job_id() -> str | None:
    """The id of the SLURM job that this process is part of, of the form ``12`` or ``12_3``."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        logging.warning(f"{file.name} cannot be locked ({error.strerror}); start the run only once")
    return True


def _read(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        found = json.loads(file.read())
    except ValueError:  # being written
        found = {}
    return found if isinstance(found, dict) else {}


def _refusal(run: Path, other: dict[str, Any], remedy: str) -> str:
    job = f", SLURM job {other['slurm_job_id']}" if other.get("slurm_job_id") else ""
    who = f"process {other.get('pid', '?')} on {other.get('host', '?')}{job}"
    return f"{run} is in use by {who}; {remedy}"
