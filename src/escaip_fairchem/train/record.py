"""That a run is going on, and how it ended: its lock and its status."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from fairchem.core.common import distutils

from escaip_fairchem.errors import UserError
from escaip_fairchem.files import write_whole
from escaip_fairchem.train.checkpoints import gathered
from escaip_fairchem.train.lock import RunLock
from escaip_fairchem.train.status import RunStatus, read_status, write_status

if TYPE_CHECKING:
    from escaip_fairchem.train.signals import Stop


class Record:
    """Holds the lock of a run and writes its status, on the first rank.

    Args:
        run: Folder of the run.

    Raises:
        UserError: Another process holds the lock.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.config_path = run / "canonical_config.yaml"
        self.status = RunStatus("starting")
        self._lock: RunLock | None = None
        self._config: bytes | None = None
        mistake = self._open() if distutils.is_master() else None
        mistake = gathered(mistake)[0]
        if mistake:
            raise UserError(mistake)

    def _open(self) -> str | None:
        before = read_status(self.run)
        lock = RunLock(self.run)
        try:
            lock.__enter__()
        except UserError as error:
            return str(error)
        self._lock = lock
        if self.config_path.is_file():
            self._config = self.config_path.read_bytes()
        if before.state != "absent":
            self.status.restarts = before.restarts + (before.state != "finished")
            self.status.step, self.status.epoch = before.step, before.epoch
            self.status.total_steps = before.total_steps
        write_status(self.run, self.status)
        return None

    def end(self, state: str, reason: str | None = None, step: int | None = None) -> None:
        """Write how the run ended.

        Args:
            state: As in status.json.
            reason: Why, unless it finished.
            step: Steps done, if they are known better than the status.
        """
        self.status.state, self.status.reason = state, reason
        self.status.seconds_left = 0.0 if state == "finished" else None
        if step is not None:
            self.status.step = step
        if self._lock is not None:
            self._restore_config()
            write_status(self.run, self.status)

    def _restore_config(self) -> None:
        """Undo the write of a second command, which fairchem does before the lock refuses it."""
        if self._config is not None and self.config_path.read_bytes() != self._config:
            write_whole(self.config_path, self._config, sync=False)

    def close(self) -> None:
        """Free the lock."""
        if self._lock is not None:
            self._lock.__exit__()
            self._lock = None

    def command(self, stop: Stop | None = None) -> str:
        """The command that goes on with the run.

        Args:
            stop: What ended it.
        """
        path = self.config_path
        if path.is_relative_to(Path.cwd()):
            path = path.relative_to(Path.cwd())
        further = " runner.stop_at_step=null" if stop is not None and stop.number is None else ""
        return f"fairchem -c {shlex.quote(os.fspath(path))}{further}"
