"""Batches of frames drawn by the size of their forces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from fairchem.core.datasets.samplers.max_atom_distributed_sampler import (
    MaxAtomDistributedBatchSampler,
    get_batches,
)

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fairchem.core.datasets.mt_concat_dataset import ConcatDataset


class ForceWeightedBatchSampler(MaxAtomDistributedBatchSampler):
    """fairchem's batches of up to `max_atoms` atoms, of frames drawn by their mean force.

    A relaxation is mostly frames near its end, whose small forces weigh little in the loss and
    in the error. Here a frame comes in proportion to a power of its mean force: those with large
    forces several times an epoch, near-relaxed ones in some epochs only. An epoch has as many
    batches as fairchem's; each is drawn anew, the same for the same seed.

    Args:
        power: Of the mean force; 0 draws all frames alike.
        **options: As for fairchem's sampler; ``shuffle`` must stay true.

    Raises:
        UserError: `power` is negative, ``shuffle`` is off, or the data lack forces or their means.
    """

    def __init__(self, *, power: float = 0.7, **options: Any) -> None:
        if power < 0:
            raise UserError(f"power must be 0 or more, got {power}")
        if not options.get("shuffle", True):
            raise UserError("frames drawn by their forces come in random order: set shuffle: true")
        super().__init__(**options)
        weights = _mean_forces(self.dataset) ** power
        if not weights.any():
            raise UserError("every force of the training data is zero: drop `sampler=forces`")
        # how often each frame comes in a round of as many frames as there are
        self._expected = weights * (len(weights) / weights.sum())
        self._num_atoms = np.array(
            self.dataset.get_metadata("natoms", list(range(len(self.dataset))))
        )

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of this rank in this epoch."""
        batches = self._draw(np.random.default_rng([self.seed, self.epoch]))
        mine = batches[self.rank : self.total_size : self.num_replicas]
        return iter(mine[self.start_iter :])

    def _draw(self, rng: np.random.Generator) -> list[list[int]]:
        batches: list[list[int]] = []
        while len(batches) < self.total_size:
            counts = np.floor(self._expected + rng.random(len(self._expected))).astype(int)
            frames = rng.permutation(np.repeat(np.arange(len(counts)), counts))
            batches += get_batches(self._num_atoms[frames], frames, self.max_atoms, self.min_atoms)[
                0
            ]
        return batches[: self.total_size]


def _mean_forces(dataset: ConcatDataset) -> np.ndarray:
    """Mean force of the free atoms of every frame, from the metadata, eV/A."""
    parts = [
        part.get_metadata("mean_force", list(range(size)))
        for part, size in zip(dataset.datasets, dataset.real_sizes, strict=True)
    ]
    if any(part is None for part in parts):
        raise UserError(
            "the training data hold no mean forces to draw frames by; "
            "make them again with `escaip convert`, or drop `sampler=forces`"
        )
    return np.concatenate([np.ravel(part) for part in parts])
