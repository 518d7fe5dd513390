"""The moments at which a training may stop, and where it goes on after that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchtnt.framework._callback_handler import CallbackHandler
from torchtnt.framework.callback import Callback
from torchtnt.framework.evaluate import _evaluate_impl
from torchtnt.framework.state import ActivePhase

from escaip_fairchem.train.signals import Stop

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torchtnt.framework import State

    from escaip_fairchem.train.unit import TrainEvalUnit


class StoppingCallback(Callback):
    """Ends a training between two steps, and begins it where it ended.

    Args:
        stop_at_step: Where to pause, or None.
        callbacks: All the others, which must come before this one.
        restore: Sets what a checkpoint holds besides the state of the unit.
        evaluation_due: Whether the run stopped within an evaluation, which is then done first.
    """

    def __init__(
        self,
        stop_at_step: int | None,
        callbacks: Sequence[Callback],
        restore: Callable[[], None],
        *,
        evaluation_due: bool,
    ) -> None:
        self.stop_at_step = stop_at_step
        self.evaluation_due = evaluation_due
        self._callbacks = list(callbacks)
        self._restore = restore

    def on_train_start(self, state: State, unit: TrainEvalUnit) -> None:
        """Do what is left of the step at which the run stopped."""
        self._restore()
        progress, last = unit.train_progress, state.train_state.max_steps
        if self.evaluation_due:
            due_after_epoch = progress.num_steps_completed_in_epoch > 0
            self._evaluate(state, unit)
            # of the last step, torchtnt evaluates once more after its epoch, which ends with it
            if due_after_epoch and last is not None and progress.num_steps_completed >= last:
                progress.increment_epoch()
                self._evaluate(state, unit)
        self.evaluation_due = False

    def on_train_step_start(self, state: State, unit: TrainEvalUnit) -> None:
        """Stop if a signal came, or the run is to pause here."""
        number = unit.signal_of_all_ranks()
        if number is not None:
            raise Stop("interrupted", number)
        step = unit.train_progress.num_steps_completed
        if self.stop_at_step is not None and step >= self.stop_at_step:
            raise Stop("paused")

    def on_train_step_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Evaluate if another callback asks for it."""
        if any(getattr(callback, "wants_evaluation", False) for callback in self._callbacks):
            self._evaluate(state, unit)

    def on_eval_start(self, state: State, unit: TrainEvalUnit) -> None:
        """Note that an evaluation is not done yet."""
        self.evaluation_due = True

    def on_eval_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Note that it is."""
        self.evaluation_due = False

    def _evaluate(self, state: State, unit: TrainEvalUnit) -> None:
        _evaluate_impl(state, unit, CallbackHandler([*self._callbacks, self]))
        state._active_phase = ActivePhase.TRAIN
