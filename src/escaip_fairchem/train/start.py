"""Where a run begins: at a checkpoint, with what this rank had then, or at nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.common import distutils

from escaip_fairchem.errors import UserError
from escaip_fairchem.train.checkpoints import (
    clean_up,
    damage,
    gathered,
    manifest,
    newest_whole,
)
from escaip_fairchem.train.random_state import random_state, restore_random_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchtnt.framework.callback import Callback

    from escaip_fairchem.train.unit import TrainEvalUnit


@dataclass
class Start:
    """A checkpoint to begin with.

    Attributes:
        path: Its folder; None if the run begins at nothing.
        step: Steps done.
        epoch: Passes over the data completed.
        evaluation_due: Whether the run stopped within an evaluation.
    """

    path: Path | None = None
    step: int = 0
    epoch: int = 0
    evaluation_due: bool = False

    def restore(self, seed: int) -> None:
        """Set the random numbers of this rank; once nothing else draws any before the next step.

        Args:
            seed: Of the run, if the checkpoint lacks the state of this rank.
        """
        if self.path is not None:
            other = seed + 1000003 * (self.step + 1) + distutils.get_rank()
            restore_random_state(self._of_rank().get("random"), other)

    def restore_callbacks(self, callbacks: Sequence[Callback]) -> None:
        """Hand to each callback what it saved; before training starts."""
        states = self._of_rank().get("callbacks", {}) if self.path is not None else {}
        for callback in callbacks:
            if type(callback).__name__ in states:
                callback.load_state_dict(states[type(callback).__name__])

    def _of_rank(self) -> dict[str, Any]:
        path = self.path / _rank_file()
        return torch.load(path) if path.is_file() else {}


def find_start(run: Path, given: str | None) -> Start:
    """Find where a run begins; the first rank looks, for all of them.

    Args:
        run: Its folder; what interrupted writes left in it is removed.
        given: A checkpoint to begin with, in place of the newest that is whole.

    Raises:
        UserError: The given one is damaged.
    """
    folder = run / "checkpoints"
    start, mistake = Start(), None
    if distutils.is_master():
        clean_up(folder)
        if given is not None:
            path = Path(given).resolve()
            wrong = damage(path)
            if wrong:
                mistake = (
                    f"checkpoint {path} is damaged ({wrong}); "
                    "set job.runner_state_path to another, or to null for the newest"
                )
        else:
            path = newest_whole(folder)
        if path is not None:
            about = manifest(path)
            known = {key: about[key] for key in ("step", "epoch", "evaluation_due") if key in about}
            start = Start(path, **known)
    start, mistake = gathered((start, mistake))[0]
    if mistake:
        raise UserError(mistake)
    return start


def save_rank(folder: Path, callbacks: Sequence[Callback]) -> None:
    """Write what a rank has for itself: random states, and states of callbacks.

    Args:
        folder: Of the checkpoint.
        callbacks: Of the run; those with a ``state_dict`` have it saved.
    """
    states = {
        type(callback).__name__: callback.state_dict()
        for callback in callbacks
        if hasattr(callback, "state_dict")
    }
    with (folder / _rank_file()).open("wb") as file:
        torch.save({"random": random_state(), "callbacks": states}, file)


def size_of(unit: TrainEvalUnit) -> int:
    """Bytes of a checkpoint, roughly: weights, their average, two more for the optimizer, twice."""
    return 6 * sum(p.numel() * p.element_size() for p in unit.model.parameters())


def _rank_file() -> str:
    return f"rank_{distutils.get_rank()}.pt"
