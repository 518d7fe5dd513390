"""fairchem's training unit, with an average of the weights that suits short runs too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.units.mlip_unit import mlip_unit

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torchtnt.framework import State


def ema_decay_at(step: int, decay: float) -> float:
    """Decay of the moving average of weights after `step` earlier updates.

    A constant 0.999 remembers the random initial weights for thousands of steps, so a short run
    looks untrained. Here the memory grows with the run, up to the decay asked for.

    Args:
        step: Number of updates already in the average.
        decay: Largest decay.

    Returns:
        min(decay, (1 + step) / (10 + step)).
    """
    return min(decay, (1 + step) / (10 + step))


def warmed_up_average(decay: float) -> Callable[[Sequence, Sequence, Any], None]:
    """Update rule for `torch.optim.swa_utils.AveragedModel` with `ema_decay_at`.

    Args:
        decay: Largest decay.

    Returns:
        A function for the argument ``multi_avg_fn``.
    """

    @torch.no_grad()
    def update(averaged: Sequence, current: Sequence, num_averaged: Any) -> None:
        weight = 1 - ema_decay_at(int(num_averaged), decay)
        # Batched as torch's own rule is; integer tensors cannot be interpolated.
        floating = [
            (old, new)
            for old, new in zip(averaged, current, strict=True)
            if old.is_floating_point()
        ]
        torch._foreach_lerp_([old for old, _ in floating], [new for _, new in floating], weight)

    return update


class EvalUnit(mlip_unit.MLIPEvalUnit):
    """fairchem's evaluation unit that keeps the metrics of the last evaluation."""

    last_metrics: dict[str, float] | None = None

    def on_eval_epoch_end(self, state: State) -> dict:
        """Aggregate the metrics over all ranks and keep them.

        Args:
            state: torchtnt's state.

        Returns:
            Values by names of the form ``val/{dataset},{task},{metric}``.
        """
        metrics = super().on_eval_epoch_end(state)
        self.last_metrics = {name: float(value) for name, value in metrics.items()}
        return metrics


class TrainEvalUnit(mlip_unit.MLIPTrainEvalUnit):
    """fairchem's training unit with a moving average of weights that warms up.

    Args:
        args: As for fairchem's unit.
        ema_decay: Largest decay of the average; 0 evaluates the last weights.
        kwargs: As for fairchem's unit.
    """

    def __init__(self, *args: Any, ema_decay: float = 0.999, **kwargs: Any) -> None:
        if ema_decay is None or not 0 <= ema_decay < 1:
            raise UserError(
                f"ema_decay must be at least 0 and below 1, got {ema_decay}; "
                "0 evaluates and saves the last weights"
            )
        super().__init__(*args, ema_decay=ema_decay, **kwargs)
        self.ema_model.multi_avg_fn = warmed_up_average(ema_decay)
        self._keep_metrics()

    def _keep_metrics(self) -> None:
        plain = self.eval_unit
        self.eval_unit = EvalUnit(
            job_config=self.job_config, model=None, tasks=plain.tasks, tf32=plain.tf32
        )
        self.eval_unit.setup_train_eval_unit(plain.model)
