"""Training structures with noise on some atoms, for denoising (DeNS).

Liao, Smidt, Shuaibi, Das, "Generalizing Denoising to Non-Equilibrium Structures Improves
Equivariant Force Fields", TMLR 2024, arXiv 2403.09549.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fairchem.core.datasets.atomic_data import AtomicData

#: What a batch gets besides: the noise, A, [N, 3], not finite where there is none; the forces as
#: they were labelled; and those that the model is given, 0 where there is no noise. fairchem takes
#: a label for one of vectors if its name has "forces" in it.
NOISE, LABELLED, GIVEN = "denoising_forces", "labelled_forces", "encoded_forces"


def corrupt_all(batches: Sequence[AtomicData], *place: int, **settings: float | str | None) -> None:
    """Corrupt some structures of some batches.

    Args:
        batches: On the CPU; their tensors are replaced, not changed.
        place: Whole numbers that alone decide the noise, such as seed, step and rank: so a training
            that goes on draws what it would have drawn.
        settings: As for `corrupt`.
    """
    for index, batch in enumerate(batches):
        # the last number sets the stream apart from that of the rotations
        corrupt(batch, np.random.default_rng([*place, index, 1]), **settings)


def corrupt(
    batch: AtomicData,
    rng: np.random.Generator,
    *,
    prob: float,
    std: float,
    corrupt_ratio: float,
    max_force_norm: float | None,
    scale: float,
    forces: str = "forces",
    free_only: bool = True,
) -> None:
    """Move some atoms of some structures, and say of them the noise in place of the forces.

    For fairchem a value that is not finite is no label. So forces of moved atoms become infinite,
    as is the noise of atoms whose forces are learnt: NaN is left to atoms of which nothing is. The
    stress of their structures becomes NaN, which those who trained on MPtrj left out, too; the
    energy stays that of the structure as it was. Only free atoms with a labelled force move, and
    none that is alone in its structure, because a model cannot see that it did.

    Args:
        batch: On the CPU; its tensors are replaced, not changed.
        rng: Source of the noise.
        prob: Part of the structures that are corrupted.
        std: Standard deviation of each component of the noise, A.
        corrupt_ratio: Part of the atoms of such a structure that move.
        max_force_norm: A structure with a larger force, eV/A, stays as it is; None: none does.
        scale: Force, eV/A, that the model is given as 1.
        forces: Name of the labels.
        free_only: Whether forces of fixed atoms are not learnt.
    """
    labels, index = batch[forces], batch.batch
    number = len(batch.natoms)
    chosen = torch.from_numpy(rng.random(number) < prob) & (batch.natoms > 1)
    picked = torch.from_numpy(rng.random(len(labels)) < corrupt_ratio)
    noise = torch.from_numpy(rng.normal(scale=std, size=labels.shape)).to(batch.pos.dtype)
    if max_force_norm is not None:
        norms = torch.linalg.vector_norm(labels.nan_to_num(), dim=1)
        largest = norms.new_zeros(number).scatter_reduce(0, index, norms, "amax")
        chosen &= largest <= max_force_norm
    free, labelled = batch.fixed == 0, labels.isfinite().all(1)
    moved = chosen[index] & picked & free & labelled
    where, learnt = moved[:, None], (labelled & free if free_only else labelled)[:, None]
    batch[LABELLED] = labels
    batch[GIVEN] = torch.where(where, labels / scale, 0.0)
    batch[NOISE] = torch.where(where, noise, torch.where(learnt, torch.inf, torch.nan))
    batch[forces] = torch.where(where, torch.inf, torch.where(labelled[:, None], labels, torch.nan))
    batch.pos = torch.where(where, batch.pos + noise, batch.pos)
    if "stress" in batch:
        corrupted = torch.zeros(number, dtype=torch.bool).index_fill(0, index[moved], True)
        of_structure = corrupted.view(-1, *[1] * (batch.stress.ndim - 1))
        batch.stress = torch.where(of_structure, torch.nan, batch.stress)
