"""Errors by chemical element: what a model has not learnt yet is often one element."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from ase.data import chemical_symbols

from escaip_fairchem.files import write_csv

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
            error per atom, each weighted by the element's share of its atoms; None without labels.
        energy_reference_eV_per_atom: That of the element references.
    """

    element: str
    structures: int
    atoms: int
    free_atoms: int
    force_mae_eV_per_A: float | None
    force_zero_eV_per_A: float | None
    energy_mae_eV_per_atom: float | None
    energy_reference_eV_per_atom: float | None


class ElementSums:
    """Adds up the errors of each element, part by part of a data set."""

    def __init__(self) -> None:
        # columns: structures, atoms, free atoms; labelled ones of these and their errors, of the
        # model and of zero forces; shares of labelled structures, and energy errors by share
        self._table = np.zeros((len(chemical_symbols), 9))

    def add(self, parity: Parity) -> None:
        """Add a part.

        Args:
            parity: Labels and predictions.
        """
        structure = np.repeat(np.arange(len(parity.n_atoms)), parity.n_atoms)
        force = np.abs(parity.forces_model - parity.forces).mean(axis=1, dtype=float)
        zero = np.abs(parity.forces).mean(axis=1, dtype=float)
        model = np.abs(parity.energy_model - parity.energy) / parity.n_atoms
        baseline = np.abs(parity.energy_baseline - parity.energy) / parity.n_atoms
        with_energy = np.isfinite(parity.energy)
        for number in np.unique(parity.numbers):
            here = parity.numbers == number
            share = np.bincount(structure[here], minlength=len(parity.n_atoms)) / parity.n_atoms
            free = here[parity.free]
            known, weight = free & np.isfinite(zero), share[with_energy]
            self._table[number] += (
                (share > 0).sum(), here.sum(), free.sum(),
                known.sum(), force[known].sum(), zero[known].sum(),
                weight.sum(), weight @ model[with_energy], weight @ baseline[with_energy],
            )  # fmt: skip

    def rows(self) -> list[ElementErrors]:
        """Errors of each element that occurs, by atomic number."""
        found = []
        for number, row in enumerate(self._table):
            structures, atoms, free, known, force, zero, weight, model, baseline = row.tolist()
            if atoms:
                found.append(
                    ElementErrors(
                        element=chemical_symbols[number],
                        structures=int(structures),
                        atoms=int(atoms),
                        free_atoms=int(free),
                        force_mae_eV_per_A=force / known if known else None,
                        force_zero_eV_per_A=zero / known if known else None,
                        energy_mae_eV_per_atom=model / weight if weight else None,
                        energy_reference_eV_per_atom=baseline / weight if weight else None,
                    )
                )
        return found


def by_element(parity: Parity) -> list[ElementErrors]:
    """Errors of each element that occurs.

    Args:
        parity: Labels and predictions.

    Returns:
        One entry an element, by atomic number.
    """
    sums = ElementSums()
    sums.add(parity)
    return sums.rows()


def write_by_element(rows: list[ElementErrors], path: Path) -> Path:
    """Write the table.

    Args:
        rows: One entry an element.
        path: The CSV file.

    Returns:
        The path.
    """
    write_csv(path, map(asdict, rows))
    return path
