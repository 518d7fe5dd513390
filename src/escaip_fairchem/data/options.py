"""How a conversion is done, as the user says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from escaip_fairchem.data import splits
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np

    from escaip_fairchem.data.frames import LabelKeys


@dataclass(frozen=True)
class SplitOptions:
    """How validation frames are chosen.

    Attributes:
        val_fraction: Part of the frames to hold out.
        by: ``info`` key whose groups go to one side as a whole.
        within: ``info`` key inside whose groups frames are held out.
        seed: Random seed.
    """

    val_fraction: float = 0.1
    by: str | None = None
    within: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not 0 < self.val_fraction < 1:
            raise UserError(f"--val-fraction is {self.val_fraction}; give a number between 0 and 1")
        if self.by and self.within:
            raise UserError("--split-by and --val-within exclude each other; give one of them")

    @property
    def key(self) -> str | None:
        """The ``info`` key that the split needs."""
        return self.by or self.within

    def describe(self) -> str:
        """Say in a few words how the split is made."""
        how = "at random"
        if self.by:
            how = f"by whole {self.by}"
        elif self.within:
            how = f"within each {self.within}"
        return f"val fraction {self.val_fraction:g} {how}, seed {self.seed}"

    def mask(self, groups: Sequence[str] | np.ndarray) -> np.ndarray:
        """Choose the validation frames, (N,) bool, given each frame's group."""
        if self.by:
            return splits.split_by_group(groups, self.val_fraction, self.seed)
        if self.within:
            return splits.split_within_groups(groups, self.val_fraction, self.seed)
        return splits.split_random(len(groups), self.val_fraction, self.seed)


@dataclass(frozen=True)
class Options:
    """How a conversion is done.

    Attributes:
        split: How validation frames are chosen; None if ``val`` names them.
        val: Official validation files.
        format: Name of the format; found by a look at the inputs by default.
        settings: Options of the format.
        keys: Where labels are if ASE does not find them; more options of the format.
        check_units: Judge units by the size of distances and forces.
        unlabelled: Structures have no labels and go into one folder, ``test``.
        strict: The first defect stops the conversion, instead of being listed in the end.
        workers: Processes.
    """

    split: SplitOptions | None = None
    val: Sequence[str | Path] = ()
    format: str | None = None
    settings: dict[str, Any] | None = None
    keys: LabelKeys | None = None
    check_units: bool = True
    unlabelled: bool = False
    strict: bool = False
    workers: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.workers < 1:
            raise UserError(f"--workers is {self.workers}; give at least 1")
        if self.val and (self.unlabelled or self.split is not None):
            other = "--unlabelled" if self.unlabelled else "a split"
            raise UserError(f"--val and {other} exclude each other; give one of them")
        if self.unlabelled and self.split is not None:
            raise UserError("--unlabelled and a split exclude each other; give one of them")

    @property
    def splitting(self) -> SplitOptions:
        """The split, which is at random by default."""
        return self.split or SplitOptions()

    @property
    def format_options(self) -> dict[str, Any]:
        """All options of the format."""
        keys = vars(self.keys) if self.keys else {}
        named = {f"{name}_key": key for name, key in keys.items() if key is not None}
        return {**(self.settings or {}), **named}

    def describe_split(self) -> str:
        """Say in a few words where validation frames come from."""
        if self.unlabelled:
            return "none, structures have no labels"
        return "official validation files" if self.val else self.splitting.describe()
