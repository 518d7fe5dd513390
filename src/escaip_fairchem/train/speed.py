"""How fast a run trains: steps, atoms, and the time they take."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from fairchem.core.common import distutils
from torchtnt.framework.callback import Callback

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchtnt.framework import State

    from escaip_fairchem.train.unit import TrainEvalUnit

WINDOW = 50  # steps that count as recent


class SpeedCallback(Callback):
    """Measures training without what lies between steps: validation and checkpoints.

    Put it behind the callback that saves checkpoints, which does so when a step starts.

    Args:
        clock: Gives seconds; by default those of the wall.

    Attributes:
        seconds: Time in training steps, loading of batches included, of this process. The first
            step of a process compiles and searches for kernels; it is counted only while it is
            the only one.
        steps: Steps in that time.
        atoms: Atoms in these steps on this rank.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock or time.monotonic
        self.seconds, self.steps, self.atoms = 0.0, 0, 0
        self._recent: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._first = True
        self._mark = 0.0
        self._loading = 0.0
        self._step_atoms = 0
        self._hook: Any = None

    def on_train_start(self, state: State, unit: TrainEvalUnit) -> None:
        """Start counting the atoms that reach the model."""
        model = unit.model
        while hasattr(model, "module"):  # wrappers of DDP and FSDP, which fairchem calls past hooks
            model = model.module
        self._hook = model.register_forward_pre_hook(self._count)
        self._mark = self._clock()

    def on_train_epoch_start(self, state: State, unit: TrainEvalUnit) -> None:
        """Start the clock of the next batch."""
        self._mark = self._clock()

    def on_train_get_next_batch_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Waiting for data is part of training."""
        self._loading = self._clock() - self._mark

    def on_train_step_start(self, state: State, unit: TrainEvalUnit) -> None:
        """Start the clock of the step."""
        self._mark = self._clock()

    def on_train_step_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Add the step."""
        now = self._clock()
        if self._first and self.steps == 1:
            self.seconds, self.steps, self.atoms = 0.0, 0, 0
            self._recent.clear()
            self._first = False
        taken = self._loading + now - self._mark
        self.seconds += taken
        self.steps += 1
        self.atoms += self._step_atoms
        self._recent.append((taken, self._step_atoms))
        self._step_atoms = 0
        self._mark = now

    def on_eval_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Leave validation out."""
        self._mark = self._clock()

    def on_train_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Stop counting."""
        self._hook.remove()

    def recent(self) -> tuple[float, float]:
        """Steps per second, and atoms per second of all ranks, over the last steps.

        The other ranks are taken to have as many atoms as this one, so that none waits.
        """
        seconds = sum(taken for taken, _ in self._recent) or float("inf")
        atoms = sum(atoms for _, atoms in self._recent) * distutils.get_world_size()
        return len(self._recent) / seconds, atoms / seconds

    def _count(self, module: Any, inputs: tuple[Any, ...]) -> None:
        if module.training:
            self._step_atoms += inputs[0].pos.shape[0]


def steps_per_epoch(state: State, unit: TrainEvalUnit) -> int:
    """Steps of the optimizer in a pass over the data, each of several batches if it accumulates."""
    return math.ceil(len(state.train_state.dataloader) / unit.accumulate)
