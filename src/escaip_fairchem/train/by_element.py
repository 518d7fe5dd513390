"""Errors by chemical element: what a model has not learnt yet is often one element."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from ase.data import chemical_symbols

if TYPE_CHECKING:
    from pathlib import Path

    from escaip_fairchem.train.parity import Parity


@dataclass(frozen=True)
class ElementErrors:
    """One row of errors_by_element.csv.

    Attributes:
        element: Symbol.
        structures: Structures that contain it.
        atoms: Its atoms in them.
        free_atoms: Those of them that are free.
        force_mae_eV_per_A: Mean absolute error of the force components on its free atoms; None if
            it has none.
        force_zero_eV_per_A: That of zero forces.
        energy_mae_eV_per_atom: Mean over the structures that contain it of the absolute energy
            error per atom, each weighted by the element's share of its atoms.
        energy_reference_eV_per_atom: That of the element references.
    """

    element: str
    structures: int
    atoms: int
    free_atoms: int
    force_mae_eV_per_A: float | None
    force_zero_eV_per_A: float | None
    energy_mae_eV_per_atom: float
    energy_reference_eV_per_atom: float


def by_element(parity: Parity) -> list[ElementErrors]:
    """Errors of each element that occurs.

    Args:
        parity: Labels and predictions.

    Returns:
        One entry an element, by atomic number.
    """
    structure = np.repeat(np.arange(len(parity.n_atoms)), parity.n_atoms)
    force = np.abs(parity.forces_model - parity.forces).mean(axis=1)
    zero = np.abs(parity.forces).mean(axis=1)
    model = np.abs(parity.energy_model - parity.energy) / parity.n_atoms
    baseline = np.abs(parity.energy_baseline - parity.energy) / parity.n_atoms
    found = []
    for number in np.unique(parity.numbers):
        here = parity.numbers == number
        share = np.bincount(structure[here], minlength=len(parity.n_atoms)) / parity.n_atoms
        free = here[parity.free]
        found.append(
            ElementErrors(
                element=chemical_symbols[number],
                structures=int((share > 0).sum()),
                atoms=int(here.sum()),
                free_atoms=int(free.sum()),
                force_mae_eV_per_A=float(force[free].mean()) if free.any() else None,
                force_zero_eV_per_A=float(zero[free].mean()) if free.any() else None,
                energy_mae_eV_per_atom=float(np.average(model, weights=share)),
                energy_reference_eV_per_atom=float(np.average(baseline, weights=share)),
            )
        )
    return found


def write_by_element(rows: list[ElementErrors], path: Path) -> Path:
    """Write the table.

    Args:
        rows: One entry an element.
        path: The CSV file.

    Returns:
        The path.
    """
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(ElementErrors)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return path
