"""Training for a given time, or for a given number of structures, whatever a step takes."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem.core.common import distutils
from torch.optim.lr_scheduler import LambdaLR

from escaip_fairchem.errors import UserError
from escaip_fairchem.files import write_csv
from escaip_fairchem.train.callbacks import column_names
from escaip_fairchem.train.speed import SpeedCallback

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torchtnt.framework import State

    from escaip_fairchem.train.unit import TrainEvalUnit

CURVE_NAME = "curve.csv"
#: CPU time is that of the process, of all its threads together.
CLOCKS = {"cpu": time.process_time, "wall": time.monotonic}


class BudgetSchedule(LambdaLR):
    """Linear warm-up, then a cosine, both by the part of the budget that is used.

    So the learning rate reaches its end where the training does, without a guess of how many steps
    that will be. `BudgetCallback` tells it what is used.

    Args:
        optimizer: The optimizer.
        n_iters_per_epoch: Not used; fairchem gives it.
        warmup: Part of the budget in which the rate rises.
        warmup_factor: Where it starts, as a part of the rate.
        lr_min_factor: Where it ends, as a part of the rate.
        _other: Keys of fairchem's schedule, which counts steps.

    Attributes:
        used: Part of the budget that is used, 0 to 1; part of the state.
    """

    def __init__(
        self,
        *,
        optimizer: torch.optim.Optimizer,
        n_iters_per_epoch: int = 0,
        warmup: float,
        warmup_factor: float,
        lr_min_factor: float,
        **_other: Any,
    ) -> None:
        self.used = 0.0
        self._shape = (warmup, warmup_factor, lr_min_factor)
        super().__init__(optimizer, lambda _: self.factor())

    def factor(self) -> float:
        """What the rate is multiplied by now."""
        warmup, first, last = self._shape
        if self.used < warmup:
            return first + (1 - first) * self.used / warmup
        angle = math.pi * (min(self.used, 1.0) - warmup) / (1 - warmup)
        return last + (1 - last) * (1 + math.cos(angle)) / 2


class BudgetCallback(SpeedCallback):
    """Ends a training when its budget is used up, and evaluates it at equal parts of the budget.

    Only training steps count, with the loading of their batches: no evaluation, no checkpoint, and
    not the first step of a process, which compiles. Every evaluation adds a row to curve.csv of the
    run and is followed by a checkpoint, from which a run that was killed goes on with what it had
    used. Put it behind the callback that saves checkpoints.

    Args:
        seconds: Time, or None.
        samples: Structures, each counted as often as it is seen, or None.
        clock: ``cpu``, which other work on the machine does not change, or ``wall``.
        evaluations: How many.

    Raises:
        UserError: Neither or both limits, or one that is not positive, or another clock.
    """

    def __init__(
        self,
        *,
        seconds: float | None = None,
        samples: int | None = None,
        clock: str = "cpu",
        evaluations: int = 10,
    ) -> None:
        limits = [limit for limit in (seconds, samples) if limit is not None]
        if len(limits) != 1 or not limits[0] > 0:
            raise UserError(
                f"budget.seconds is {seconds} and budget.samples is {samples}; give one of them, "
                "positive, and null for the other"
            )
        if clock not in CLOCKS:
            raise UserError(f"budget.clock is {clock!r}; it must be one of {', '.join(CLOCKS)}")
        if not isinstance(evaluations, int) or evaluations < 1:
            raise UserError(f"budget.evaluations is {evaluations}; give a positive whole number")
        super().__init__(CLOCKS[clock])
        self._limits = seconds, samples
        self._evaluations = evaluations
        #: Read by `StoppingCallback`.
        self.wants_evaluation = False
        self._wants_checkpoint = False
        self._before = 0.0  # seconds of earlier processes
        self._samples = 0
        self._rows: list[dict[str, Any]] = []
        self._save: Callable[[str], Any] | None = None
        self._checkpoints = Path()

    def set_runner_callbacks(self, save: Callable, _load: Callable, checkpoint_dir: str) -> None:
        """Learn how to save, and where the run lives; the runner calls this before training.

        Args:
            save: Writes a checkpoint into a folder.
            checkpoint_dir: Folder of the checkpoints, inside the folder of the run.
        """
        self._save, self._checkpoints = save, Path(checkpoint_dir)

    def used(self) -> float:
        """Part of the budget that is used; above 1 by what the last step took too long."""
        seconds, samples = self._limits
        return self._samples / samples if samples else (self._before + self.seconds) / seconds

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        seconds = self._before + self.seconds
        return {"seconds": seconds, "samples": self._samples, "rows": self._rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Args:
            state: From `state_dict`.
        """
        self._before, self._samples = state["seconds"], state["samples"]
        self._rows = list(state["rows"])

    def on_train_start(self, state: State, unit: TrainEvalUnit) -> None:
        """Take over when to evaluate.

        Raises:
            UserError: There are several ranks, whose clocks differ, or a GPU and a CPU's clock.
        """
        if distutils.get_world_size() > 1:
            raise UserError("a budget is for one rank; set job.scheduler.ranks_per_node=1")
        on_gpu = any(weight.is_cuda for weight in unit.model.parameters())
        if on_gpu and self._limits[0] is not None and self._clock is CLOCKS["cpu"]:
            raise UserError("time on a CPU says nothing of a GPU; set budget.clock=wall")
        super().on_train_start(state, unit)
        # torchtnt would evaluate after each epoch too, and fairchem does not hand that setting on
        state.eval_state._evaluate_every_n_epochs = None
        self._end_if_done(state, unit)

    def on_train_step_start(self, state: State, unit: TrainEvalUnit) -> None:
        """Write the checkpoint that follows an evaluation, before the clock starts."""
        if self._wants_checkpoint:
            self._wants_checkpoint = False
            step = unit.train_progress.num_steps_completed
            self._save(os.fspath(self._checkpoints / f"step_{step}"))
        super().on_train_step_start(state, unit)

    def on_train_step_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Set the learning rate, and see whether an evaluation is due."""
        super().on_train_step_end(state, unit)
        used = self.used()
        unit.scheduler.used = min(used, 1.0)
        unit.scheduler.step()
        # one at most for each part, of which a long step may use up several
        part = 1 / self._evaluations
        last = self._rows[-1]["used"] if self._rows else 0.0
        due = (math.floor(last / part + 1e-9) + 1) * part
        self.wants_evaluation = used >= min(due, 1.0) - 1e-9

    def on_eval_epoch_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Write a row of the curve."""
        self._rows.append(
            {
                "step": unit.train_progress.num_steps_completed,
                "used": self.used(),
                "seconds": self._before + self.seconds,
                "samples": self._samples,
                **column_names(unit.eval_unit.last_metrics),
            }
        )
        write_csv(self._checkpoints.parent / CURVE_NAME, self._rows)

    def on_eval_end(self, state: State, unit: TrainEvalUnit) -> None:
        """End the training, or let it go on."""
        super().on_eval_end(state, unit)
        self.wants_evaluation, self._wants_checkpoint = False, True
        self._end_if_done(state, unit)

    def _end_if_done(self, state: State, unit: TrainEvalUnit) -> None:
        evaluated = self._rows[-1]["step"] if self._rows else None
        if self.used() >= 1 and evaluated == unit.train_progress.num_steps_completed:
            state.stop()

    def _count(self, module: Any, inputs: tuple[Any, ...]) -> None:
        super()._count(module, inputs)
        if module.training:
            self._samples += len(inputs[0].natoms)
