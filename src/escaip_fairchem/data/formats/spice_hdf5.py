"""SPICE as published: molecules with their conformations in one HDF5 file.

Published by Eastman et al. (Scientific Data 10, 11, 2023; SPICE 2: J. Chem. Theory Comput. 20,
8583, 2024; Zenodo 8222043 and 10975225). One group per molecule or cluster, all in atomic units.
"""

from __future__ import annotations

import re
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from escaip_fairchem.data.formats.base import Card, Format, Part, Record
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import h5py
    from ase import Atoms

PART_RECORDS = 20_000
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


class SpiceHdf5(Format):
    """SPICE 1 and 2 HDF5 files.

    ``energy=total`` is the energy of all electrons, ``energy=formation`` that minus the energies
    of isolated atoms, each in the charge state that gives the lowest sum.

    The charge is the sum of the formal charges in the SMILES, since the files have none; the MBIS
    charges, where a molecule has them, must agree. All molecules are singlets (``spin`` 1).

    Files whose groups are single frames with ``elements``, ``positions``, ``forces`` and the
    attributes ``energy`` and ``charge`` (in eV and A, as the curated SPICE 2) are read, too.
    """

    name = "spice"
    summary = "SPICE 1 or 2 HDF5 (SPICE-1.1.4.hdf5, SPICE-2.0.1.hdf5)"
    OPTIONS: ClassVar[dict[str, Any]] = {"energy": "total"}

    def __init__(self, **options: Any) -> None:
        """Check the options.

        Raises:
            UserError: If ``energy`` is none that the files have.
        """
        super().__init__(**options)
        if self.options["energy"] not in ENERGIES:
            raise UserError(f"energy={self.options['energy']}: SPICE has {' and '.join(ENERGIES)}")
        self._ends: dict[Path, tuple[list[str], np.ndarray]] = {}

    @classmethod
    def claims(cls, path: Path) -> bool:
        """An HDF5 file whose first group is a molecule.

        Raises:
            UserError: If h5py is not installed.
        """
        if path.suffix not in (".hdf5", ".h5") or not path.is_file():
            return False
        try:
            with _open(path) as file:
                first = next(iter(file.values()), {})
                return "conformations" in first or {"elements", "positions"} <= set(first)
        except OSError:
            return False

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Ranges of whole molecules, about 20,000 conformations each."""
        parts = []
        for path in paths:
            _, ends = self._index(path)
            total = int(ends[-1]) if len(ends) else 0
            cuts = np.arange(PART_RECORDS, total, PART_RECORDS)
            starts = [0, *np.unique(ends[np.searchsorted(ends, cuts)]).tolist()]
            starts = [start for start in starts if start < total]
            stops = [*starts[1:], total]
            parts += [Part((path,), a, b) for a, b in zip(starts, stops, strict=True)]
        return parts

    def read(self, part: Part) -> Iterator[Record]:
        """Go through the conformations of a range, molecule by molecule."""
        (path,) = part.paths
        names, ends = self._index(path)
        first = int(np.searchsorted(ends, part.start, side="right"))
        file = _open(path)  # closed when the last record that refers to it is gone
        index = part.start
        stop = ends[-1] if part.stop is None else part.stop
        for name, end in zip(names[first:], ends[first:].tolist(), strict=True):
            if index >= stop:
                break
            molecule = _molecule(file, name, self.options["energy"])
            for conformation in range(end - index):
                fid = molecule.fid + conformation
                yield Record(
                    index=index + conformation,
                    build=partial(molecule.build, conformation),
                    name=f"{molecule.sid}/{fid}",
                    id=f"{molecule.sid}/{fid}",
                )
            index = end

    def card(self, paths: Sequence[Path]) -> Card:
        """Say what the energy is and what was converted."""
        energy = "total energy of all electrons"
        if self.options["energy"] == "formation":
            energy = "formation energy: total minus isolated atoms and ions"
        return Card(
            data="SPICE",
            energy=energy,
            theory="wB97M-D3(BJ)/def2-TZVPPD, Psi4",
            units={
                "positions": "bohr",
                "energy": "hartree",
                "forces": "hartree/bohr, minus the gradient",
            },
            notes=(
                "CODATA 2014 factors: 1 hartree = 27.211386024 eV, 1 bohr = 0.529177211 A.",
                "Split by sid: conformations of one molecule must not be in train and val.",
            ),
        )

    def _index(self, path: Path) -> tuple[list[str], np.ndarray]:
        """Names of the groups, and the number of records up to the end of each; read once."""
        if path not in self._ends:
            with _open(path) as file:
                names = list(file)
                counts = [_count(file[name]) for name in names]
            self._ends[path] = names, np.cumsum(counts, dtype=np.int64)
        return self._ends[path]


def _open(path: Path) -> h5py.File:
    """Open without a lock, which some shared file systems refuse."""
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{path} needs h5py: pip install 'escaip-fairchem[convert]'") from error
    return h5py.File(path, "r", locking=False)


def _count(group: h5py.Group) -> int:
    """Number of structures in a group."""
    return len(group["conformations"]) if "conformations" in group else 1


def _molecule(file: h5py.File, name: str, energy: str) -> _Molecule | _SingleFrame:
    """Choose by the layout of a group."""
    layout = _Molecule if "conformations" in file[name] else _SingleFrame
    return layout(file, name, energy)


class _Molecule:
    """A group of SPICE as published; its arrays are read at the first use, once.

    Args:
        file: The HDF5 file.
        name: Name of the group.
        energy: Kind of the energy.
    """

    fid = 0  # of the first conformation

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
        atoms = Atoms(self._numbers, positions=self._positions[conformation])
        atoms.calc = SinglePointCalculator(
            atoms,
            energy=float(self._energies[conformation]),
            forces=-self._gradients[conformation],
        )
        label = self._text("subset")
        atoms.info = {"sid": self.sid, "fid": conformation, "charge": self._charge, "spin": 1}
        atoms.info["smiles"] = self._text("smiles")
        atoms.info["subset"] = next((s for key, s in SUBSETS.items() if key in label), label)
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
    def _charge(self) -> int:
        return formal_charge(self._text("smiles"))

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
        if (int(self._numbers.sum()) - self._charge) % 2:
            raise UserError(
                f"charge {self._charge:+d} by SMILES leaves an odd number of electrons, "
                "but SPICE has singlets only"
            )
        sums = self._mbis_sums
        if sums is not None and abs(sums[conformation] - self._charge) > MBIS_TOLERANCE:
            raise UserError(
                f"the MBIS charges add up to {sums[conformation]:+.2f} e, but the formal charges "
                f"of the SMILES to {self._charge:+d}"
            )


class _SingleFrame:
    """A group that holds one structure, in eV and A; the end of its name counts conformations."""

    def __init__(self, file: h5py.File, name: str, energy: str) -> None:
        self._file = file
        self._group = file[name]
        self._energy = energy
        found = re.fullmatch(r"(.+)_(\d+)", name)
        self.sid = found.group(1) if found else name
        self.fid = int(found.group(2)) if found else 0

    def build(self, conformation: int) -> Atoms:
        """Decode the structure."""
        from ase import Atoms
        from ase.calculators.singlepoint import SinglePointCalculator

        if self._energy != "total":
            raise UserError(f"the file has no {self._energy} energy; choose energy=total")
        group = self._group
        atoms = Atoms(group["elements"][()], positions=group["positions"][()])
        atoms.calc = SinglePointCalculator(
            atoms, energy=float(group.attrs["energy"]), forces=group["forces"][()]
        )
        charge = round(float(group.attrs.get("charge", 0)))
        atoms.info = {"sid": self.sid, "fid": self.fid, "charge": charge, "spin": 1}
        return atoms


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
