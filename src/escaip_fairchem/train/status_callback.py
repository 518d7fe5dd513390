"""Keeps status.json of a run up to date while it trains."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from fairchem.core.common import distutils

from escaip_fairchem.train.progress import total_steps
from escaip_fairchem.train.speed import SpeedCallback, steps_per_epoch
from escaip_fairchem.train.status import RunStatus, write_status

if TYPE_CHECKING:
    from pathlib import Path

    from torchtnt.framework import State

    from escaip_fairchem.train.unit import TrainEvalUnit

SECONDS = 5.0  # between updates; each reads the loss, which waits for the GPU


class StatusCallback(SpeedCallback):
    """Writes status.json every few seconds, on the first rank.

    Args:
        run: Folder of the run.
        status: What is written, and kept up to date.
    """

    def __init__(self, run: Path, status: RunStatus) -> None:
        super().__init__()
        self._run = run
        self._status = status
        self._written = self._start = 0.0
        self._initial = 0

    def on_train_start(self, state: State, unit: TrainEvalUnit) -> None:
        """Say that it runs."""
        super().on_train_start(state, unit)
        self._start = time.monotonic()
        self._initial = unit.train_progress.num_steps_completed
        self._status.state, self._status.reason = "running", None
        self._status.total_steps = total_steps(state, unit)
        self._update(state, unit)

    def on_train_step_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Say how far it is."""
        super().on_train_step_end(state, unit)
        if time.monotonic() - self._written > SECONDS:
            self._update(state, unit)

    def on_eval_step_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Show that it lives."""
        if time.monotonic() - self._written > SECONDS:
            self._update(state, unit)

    def on_train_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Say how far it came."""
        super().on_train_end(state, unit)
        self._update(state, unit)

    def on_exception(self, state: State, unit: TrainEvalUnit, exc: BaseException) -> None:
        """Say how far it came."""
        self._update(state, unit)

    def _update(self, state: State, unit: TrainEvalUnit) -> None:
        if not distutils.is_master():
            return
        self._written = now = time.monotonic()
        status, done = self._status, unit.train_progress.num_steps_completed
        status.step = done
        status.epoch = round(done / steps_per_epoch(state, unit), 4)
        loss = math.nan if unit.last_loss is None else float(unit.last_loss)
        status.loss = loss if math.isfinite(loss) else None  # JSON has no NaN
        if self.steps:
            status.steps_per_second = round(self.recent()[0], 4)
            left = (status.total_steps or done) - done
            status.seconds_left = round(left * (now - self._start) / (done - self._initial), 1)
        write_status(self._run, status)
