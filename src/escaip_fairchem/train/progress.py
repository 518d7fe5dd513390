"""The progress of a training: a bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from fairchem.core.common import distutils
from tqdm.contrib.logging import logging_redirect_tqdm

from escaip_fairchem.display import LINE_SECONDS, Bar, Lines, open_display
from escaip_fairchem.train.speed import SpeedCallback, steps_per_epoch

if TYPE_CHECKING:
    from torchtnt.framework import State

    from escaip_fairchem.train.unit import TrainEvalUnit


class ProgressCallback(SpeedCallback):
    """Shows steps, rate, loss and the time that remains, on the first rank.

    Rates are those of the last 50 training steps; the time that remains is extrapolated from all
    that has passed, validation and checkpoints included. Where stderr is a terminal there is a
    bar, and log messages are written above it; otherwise lines are printed, rarer as the run gets
    longer.

    Args:
        enabled: False shows nothing.
        line_seconds: Least time between lines.
    """

    def __init__(self, enabled: bool = True, line_seconds: float = LINE_SECONDS) -> None:
        super().__init__()
        self.enabled = enabled
        self.line_seconds = line_seconds
        self._shown: int | None = None
        self._open = ExitStack()
        self._train: Bar | Lines | None = None
        self._eval: Bar | Lines | None = None

    def on_train_start(self, state: State, unit: TrainEvalUnit) -> None:
        """Open the display at the step where the run is."""
        super().on_train_start(state, unit)
        if not (self.enabled and distutils.is_master()):
            return
        done = unit.train_progress.num_steps_completed
        if sys.stderr.isatty():
            self._open.enter_context(logging_redirect_tqdm())
        self._train = self._display("training", total_steps(state, unit), done)
        self._open.callback(self._close)

    def on_train_step_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Show the step."""
        super().on_train_step_end(state, unit)
        self._show(unit)

    def on_eval_start(self, state: State, unit: TrainEvalUnit) -> None:
        """Open a second display for the validation."""
        if self._train is None:
            return
        evaluation = state.eval_state
        batches = len(evaluation.dataloader)
        self._eval = self._display(
            "validation", min(batches, evaluation.max_steps_per_epoch or batches), 0
        )

    def on_eval_step_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Show the batch."""
        if self._eval is not None:
            done = unit.eval_progress.num_steps_completed_in_epoch
            if self._eval.due():
                self._eval.show(done, "")

    def on_eval_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Close the display of the validation."""
        super().on_eval_end(state, unit)
        if self._eval is not None:
            self._eval.close()
            self._eval = None

    def on_train_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Show the last step and leave the terminal as it was."""
        super().on_train_end(state, unit)
        if self._shown != unit.train_progress.num_steps_completed:
            self._show(unit, last=True)
        self._open.close()

    def on_exception(self, state: State, unit: TrainEvalUnit, exc: BaseException) -> None:
        """Leave the terminal as it was."""
        self._open.close()

    def _show(self, unit: TrainEvalUnit, *, last: bool = False) -> None:
        if self._train is None or not (last or self._train.due()):
            return
        steps, atoms = self.recent()
        loss = "" if unit.last_loss is None else f", loss {float(unit.last_loss):.4g}"
        note = f"{steps:.3g} steps/s, {_readable(atoms)} atoms/s{loss}"
        self._shown = unit.train_progress.num_steps_completed
        self._train.show(self._shown, note)

    def _display(self, what: str, total: int | None, done: int) -> Bar | Lines:
        return open_display(what, total, done, self.line_seconds, below=what != "training")

    def _close(self) -> None:
        for display in (self._eval, self._train):
            if display is not None:
                display.close()
        self._eval = self._train = None


def total_steps(state: State, unit: TrainEvalUnit) -> int | None:
    """Number of steps after which a training ends, or None if nothing limits it.

    Args:
        state: torchtnt's state.
        unit: The training unit.
    """
    train = state.train_state
    limits = [train.max_steps]
    if train.max_epochs is not None:
        limits.append(train.max_epochs * steps_per_epoch(state, unit))
    return min((limit for limit in limits if limit is not None), default=None)


def _readable(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
