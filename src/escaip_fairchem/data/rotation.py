"""Random rotations of training structures, for what a model does not have by construction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.spatial.transform import Rotation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fairchem.core.datasets.atomic_data import AtomicData
    from torch import Tensor


def rotate_all(batches: Sequence[AtomicData], *place: int) -> None:
    """Turn each structure of some batches at random.

    Args:
        batches: On the CPU; their tensors are replaced, not changed.
        place: Whole numbers that alone decide the rotations, such as seed, step and rank: so a
            training that goes on draws what it would have drawn.
    """
    for index, batch in enumerate(batches):
        rng = np.random.default_rng([*place, index])
        rotate(batch, random_rotations(len(batch.natoms), rng))


def random_rotations(number: int, rng: np.random.Generator) -> Tensor:
    """Rotation matrices, uniform on SO(3), (number, 3, 3), float64."""
    return torch.from_numpy(Rotation.random(number, rng).as_matrix())


def rotate(batch: AtomicData, rotations: Tensor) -> None:
    """Turn each structure of a batch, with its cell, forces and stress.

    Args:
        batch: On the CPU; its tensors are replaced, not changed.
        rotations: One matrix for each structure, (B, 3, 3).
    """
    of_atom = rotations[batch.batch]
    for name in ("pos", "forces"):
        if name in batch:
            batch[name] = _turned(of_atom, batch[name])
    batch.cell = (batch.cell.double() @ rotations.mT).to(batch.cell.dtype)
    if "stress" in batch:
        stress = batch.stress.double().view(-1, 3, 3)
        turned = rotations @ stress @ rotations.mT
        batch.stress = turned.view(batch.stress.shape).to(batch.stress.dtype)


def _turned(rotations: Tensor, vectors: Tensor) -> Tensor:
    return torch.einsum("nab,nb->na", rotations, vectors.double()).to(vectors.dtype)
