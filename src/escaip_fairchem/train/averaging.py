"""A moving average of weights that suits short runs too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


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
