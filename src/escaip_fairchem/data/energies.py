"""Energy labels in float64, beside fairchem's in float32.

fairchem's ``AtomicData`` holds labels in the precision of positions, and refuses another: in
float32 a total energy of -75,123.4568 eV is 3.7 meV off. So the exact label travels under a name
of its own, and takes the place of the other where losses and metrics are computed. fairchem's
element references are float64 where recipes give them as ``torch.DoubleTensor``, and then so is
their difference from the label, and a predicted energy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from ase import Atoms
    from fairchem.core.datasets.atomic_data import AtomicData
    from torch import Tensor

EXACT_ENERGY = "energy_float64"


def with_exact_energy(
    to_graph: Callable[..., AtomicData], atoms: Atoms, **options: Any
) -> AtomicData:
    """Convert a structure as ``to_graph`` does, and keep its energy in float64 too.

    Args:
        to_graph: fairchem's ``AtomicData.from_ase`` with its options.
        atoms: The structure; its energy is taken from where fairchem takes it.
        **options: Further options of ``to_graph``.
    """
    data = to_graph(atoms, **options)
    results = atoms.calc.results if atoms.calc is not None else {}
    energy = atoms.info.get("energy", results.get("energy"))
    if "energy" in data:
        data[EXACT_ENERGY] = torch.tensor([float(energy)], dtype=torch.float64)
    return data


def exact_energy(data: AtomicData) -> Tensor:
    """Energy labels of structures or batches in eV, float64, (B,); from float32 if need be."""
    return data.get(EXACT_ENERGY, data.energy).double()


def use_exact_energy(batch: AtomicData) -> None:
    """Put exact labels in the place of those in float32.

    From then on fairchem can compute losses and metrics of the batch, but not copy it.
    """
    if EXACT_ENERGY in batch and "energy" in batch:
        batch.energy = batch[EXACT_ENERGY]
