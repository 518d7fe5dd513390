"""SPICE as published: molecules with their conformations in one HDF5 file.

Published by Eastman et al. (Scientific Data 10, 11, 2023; SPICE 2: J. Chem. Theory Comput. 20,
8583, 2024; Zenodo 8222043 and 10975225). One group per molecule or cluster, all in atomic units.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from escaip_fairchem.data.formats.base import Card, Format, Part, Record
from escaip_fairchem.data.formats.spice_molecules import ENERGIES, open_molecule
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import h5py

PART_RECORDS = 20_000


@dataclass(frozen=True)
class Molecules(Part):
    """A range of groups of a file.

    Attributes:
        names: Names of the groups.
        counts: Number of structures in each.
    """

    names: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()


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
        return [part for path in paths for part in _split(path)]

    def read(self, part: Molecules) -> Iterator[Record]:
        """Go through the conformations of a range, molecule by molecule."""
        file = _open(part.paths[0])  # closed when the last record that refers to it is gone
        index = part.start
        for name, count in zip(part.names, part.counts, strict=True):
            molecule = open_molecule(file, name, self.options["energy"])
            for conformation in range(count):
                full_name = f"{molecule.sid}/{molecule.first + conformation}"
                build = partial(molecule.build, conformation)
                yield Record(index + conformation, build, full_name, full_name)
            index += count

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


def _open(path: Path) -> h5py.File:
    """Open without a lock, which some shared file systems refuse."""
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{path} needs h5py: pip install 'escaip-fairchem[convert]'") from error
    return h5py.File(path, "r", locking=False)


def _split(path: Path) -> Iterator[Molecules]:
    """Share out the groups of a file."""
    with _open(path) as file:
        counts = {name: _count(file[name]) for name in file}
    start = stop = 0
    names: list[str] = []
    for name, count in counts.items():
        names.append(name)
        stop += count
        if stop - start >= PART_RECORDS:
            yield Molecules((path,), start, stop, tuple(names), tuple(map(counts.get, names)))
            start, names = stop, []
    if names:
        yield Molecules((path,), start, stop, tuple(names), tuple(map(counts.get, names)))


def _count(group: h5py.Group) -> int:
    """Number of structures in a group."""
    return len(group["conformations"]) if "conformations" in group else 1
