"""A molecule of SPICE: its group in the HDF5 file."""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    import h5py
    from ase import Atoms

ENERGIES = {"total": "dft_total_energy", "formation": "formation_energy"}
PUBLISHED_UNITS = {
    "conformations": "bohr",
    "dft_total_energy": "hartree",
    "formation_energy": "hartree",
    "dft_total_gradient": "hartree/bohr",
}
# Short names, by the first text that the published one contains; as MACE-OFF has them.
SUBSETS = {
    "Solvated PubChem": "Solvated PubChem",
    "PubChem Boron Silicon": "PubChem Boron Silicon",
    "PubChem": "PubChem",
    "DES Monomers": "DES370K Monomers",
    "DES370K": "DES370K Dimers",
    "Dipeptides": "Dipeptides",
    "Solvated Amino Acids": "Solvated Amino Acids",
    "Amino Acid Ligand": "Amino Acid Ligand",
    "Water Clusters": "Water Clusters",
    "Ion Pairs": "Ion Pairs",
}
FORMAL_CHARGE = re.compile(r"\[[^\]]*?([+-]+)(\d*)(?::\d+)?\]")
MBIS_TOLERANCE = 0.5  # e; partial charges add up to the molecule's, but for numerical noise


def open_molecule(file: h5py.File, name: str, energy: str) -> Molecule | SingleFrame:
    """Choose by the layout of a group.

    Args:
        file: The HDF5 file.
        name: Name of the group.
        energy: Kind of the energy.
    """
    layout = Molecule if "conformations" in file[name] else SingleFrame
    return layout(file, name, energy)


class Molecule:
    """A group of SPICE as published; its arrays are read at the first use, once.

    Args:
        file: The HDF5 file.
        name: Name of the group.
        energy: Kind of the energy.
    """

    first = 0  # number of the first conformation

    def __init__(self, file: h5py.File, name: str, energy: str) -> None:
        self._file = file  # a group alone does not keep it open
        self._group = file[name]
        self._energy_key = ENERGIES[energy]
        self.sid = name

    def build(self, conformation: int) -> Atoms:
        """Decode a conformation."""
        from ase import Atoms
        from ase.calculators.singlepoint import SinglePointCalculator

        self._check_charge(conformation)
        atoms = Atoms(numbers=self._numbers, positions=self._positions[conformation])
        atoms.calc = SinglePointCalculator(
            atoms,
            energy=float(self._energies[conformation]),
            forces=-self._gradients[conformation],
        )
        atoms.info = {"sid": self.sid, "fid": conformation, **self._info}
        return atoms

    @cached_property
    def _numbers(self) -> np.ndarray:
        return self._group["atomic_numbers"][()]

    @cached_property
    def _positions(self) -> np.ndarray:
        return self._converted("conformations")

    @cached_property
    def _energies(self) -> np.ndarray:
        return self._converted(self._energy_key)

    @cached_property
    def _gradients(self) -> np.ndarray:
        return self._converted("dft_total_gradient")

    @cached_property
    def _info(self) -> dict[str, int | str]:
        subset, smiles = subset_name(self._text("subset")), self._text("smiles")
        return {"charge": formal_charge(smiles), "spin": 1, "smiles": smiles, "subset": subset}

    @cached_property
    def _mbis_sums(self) -> np.ndarray | None:
        if "mbis_charges" not in self._group:
            return None
        charges = self._group["mbis_charges"][()].astype(float)
        return charges.reshape(len(charges), -1).sum(axis=1)

    def _text(self, key: str) -> str:
        """A text that is stored in a list of one."""
        value = np.ravel(self._group[key][()])[0]
        return value.decode() if isinstance(value, bytes) else str(value)

    def _converted(self, key: str) -> np.ndarray:
        """Read a quantity in eV and A, float64."""
        from ase.units import Bohr, Hartree

        factors = {"bohr": Bohr, "hartree": Hartree, "hartree/bohr": Hartree / Bohr}
        factors |= {"angstrom": 1.0, "ev": 1.0, "ev/angstrom": 1.0}
        if key not in self._group:
            raise UserError(f"the molecule has no {key}")
        data = self._group[key]
        unit = data.attrs.get("units", PUBLISHED_UNITS[key])
        unit = unit.decode() if isinstance(unit, bytes) else str(unit)
        # A gradient cannot be in a unit of energy, nor the other way round.
        if unit.lower() not in factors or ("/" in unit) != ("/" in PUBLISHED_UNITS[key]):
            raise UserError(f"{key} is in {unit!r}; SPICE gives {PUBLISHED_UNITS[key]}")
        return data[()].astype(np.float64) * factors[unit.lower()]

    def _check_charge(self, conformation: int) -> None:
        """Refuse a charge that contradicts the electrons."""
        charge = self._info["charge"]
        if (int(self._numbers.sum()) - charge) % 2:
            raise UserError(
                f"charge {charge:+d} by SMILES leaves an odd number of electrons, but SPICE has "
                "singlets only"
            )
        sums = self._mbis_sums
        if sums is not None and abs(sums[conformation] - charge) > MBIS_TOLERANCE:
            raise UserError(
                f"the MBIS charges add up to {sums[conformation]:+.2f} e, but the formal charges "
                f"of the SMILES to {charge:+d}"
            )


class SingleFrame:
    """A group that holds one structure, in eV and A; the end of its name counts conformations."""

    def __init__(self, file: h5py.File, name: str, energy: str) -> None:
        self._file = file
        self._group = file[name]
        self._energy = energy
        found = re.fullmatch(r"(.+)_(\d+)", name)
        self.sid = found.group(1) if found else name
        self.first = int(found.group(2)) if found else 0

    def build(self, conformation: int) -> Atoms:
        """Decode the structure."""
        from ase import Atoms
        from ase.calculators.singlepoint import SinglePointCalculator

        if self._energy != "total":
            raise UserError(f"the file has no {self._energy} energy; choose energy=total")
        group = self._group
        atoms = Atoms(numbers=group["elements"][()], positions=group["positions"][()])
        atoms.calc = SinglePointCalculator(
            atoms, energy=float(group.attrs["energy"]), forces=group["forces"][()]
        )
        charge = round(float(group.attrs.get("charge", 0)))
        atoms.info = {"sid": self.sid, "fid": self.first, "charge": charge, "spin": 1}
        return atoms


def subset_name(published: str) -> str:
    """Short name of a subset, as MACE-OFF has it; other names stay as they are.

    Args:
        published: Such as ``SPICE PubChem Set 6 Single Points Dataset v1.2``, or a short name.
    """
    if published in SUBSETS.values():
        return published
    return next((short for text, short in SUBSETS.items() if text in published), published)


def formal_charge(smiles: str) -> int:
    """Sum of the formal charges of a SMILES.

    Args:
        smiles: Any SMILES, with atom maps or without.

    Returns:
        The charge of the molecule, e.
    """
    return sum(
        int(f"{sign[0]}{digits}") if digits else (1 if sign[0] == "+" else -1) * len(sign)
        for sign, digits in FORMAL_CHARGE.findall(smiles)
    )
