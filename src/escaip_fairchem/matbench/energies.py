"""Formation energies as the benchmark asks: MP2020 corrections, then elemental references."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ase import Atoms


class FormationEnergies:
    """From total energies of a model trained on uncorrected energies to formation energies.

    The predicted energy and relaxed structure take the place of DFT's in WBM's entry, pymatgen's
    ``MaterialsProject2020Compatibility`` corrects it (anions by the structure, ``+U`` by the run
    parameters of the entry), and references are subtracted.

    Args:
        entries: As of `escaip_fairchem.matbench.files.read_entries`.
        references: Energy of each element, eV/atom.
    """

    def __init__(self, entries: Mapping[str, bytes], references: Mapping[str, float]) -> None:
        from pymatgen.entries.compatibility import MaterialsProject2020Compatibility

        self.entries = entries
        self.references = references
        self._compatibility = MaterialsProject2020Compatibility()

    def __call__(self, material: str, structure: Any, energy: float) -> float | None:
        """Formation energy of a material, eV/atom.

        Args:
            material: Its id.
            structure: The relaxed one, pymatgen's ``Structure``.
            energy: Total energy of the cell, eV.

        Returns:
            None if the corrections refuse the entry.

        Raises:
            UserError: There is no entry, it is of another composition, or an element has no
                reference.
        """
        from pymatgen.core import Composition
        from pymatgen.entries.computed_entries import ComputedStructureEntry

        if material not in self.entries:
            raise UserError(f"the entries have no {material}: they are of another data set")
        stored = json.loads(self.entries[material])
        composition = structure.composition
        if not Composition(stored["composition"]).almost_equals(composition):
            raise UserError(
                f"{material} is {composition.formula}, and its entry "
                f"{Composition(stored['composition']).formula}: they are of another data set"
            )
        entry = ComputedStructureEntry(
            structure, energy, parameters=stored["parameters"], data=stored["data"]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on each oxidation state that is guessed
            corrected = self._compatibility.process_entry(entry, clean=True)
        if corrected is None:
            return None
        unknown = [str(el) for el in composition if str(el) not in self.references]
        if unknown:
            raise UserError(f"{material}: no reference energy of {', '.join(unknown)}")
        elements = sum(self.references[str(el)] * n for el, n in composition.items())
        return float(corrected.energy - elements) / composition.num_atoms


def to_pymatgen(atoms: Atoms) -> Any:
    """The same as a ``Structure`` of pymatgen, without what ``info`` holds."""
    from pymatgen.core import Structure

    return Structure(
        atoms.cell.array,
        atoms.get_chemical_symbols(),
        atoms.positions,
        coords_are_cartesian=True,
    )
