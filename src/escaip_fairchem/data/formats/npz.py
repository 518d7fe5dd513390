"""Trajectories of one molecule in NumPy archives: MD17, rMD17 and MD22.

Published by Chmiela et al. (Science Advances 3, e1603015, 2017; 9, eadf0873, 2023; sgdml.org) and,
revised, by Christensen and von Lilienfeld (Mach. Learn.: Sci. Technol. 1, 045018, 2020;
figshare 12672038).
"""

from __future__ import annotations

import zipfile
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from escaip_fairchem.data.formats.base import Card, Format, Part, Record
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ase import Atoms

PART_RECORDS = 100_000
BLOCK_BYTES = 2**22  # read at a time of each array
CHECKED = 300  # frames whose units are judged
LAYOUTS = {  # numbers, positions, energies, forces
    "rMD17": ("nuclear_charges", "coords", "energies", "forces"),
    "MD17 or MD22": ("z", "R", "E", "F"),
}
ENERGY_UNITS = ("kcal", "kj", "ev", "hartree")
# Energy of all electrons over the Thomas-Fermi estimate; 0.65 for hydrogen, 0.77 for oxygen.
THOMAS_FERMI = 0.7687  # hartree, times Z^(7/3)
ALL_ELECTRON_RANGE = (0.5, 1.0)
# dE over -F.dx: 0.85 to 1.09 on DFT samples of ten molecules where the two correlate so well, which
# frames far apart do not. The closest units, A and Bohr, differ by 1.89.
SLOPE_RANGE = (0.65, 1.5)
MIN_CORRELATION = 0.9
CLOSEST_PAIRS = 20


class Npz(Format):
    """MD17, rMD17 and MD22 archives, one molecule each.

    ``units`` is the unit of energies, of forces per A: kcal (kcal/mol, as published), kj, ev or
    hartree. It is checked against what the file says, the size of the total energy, and the work
    of the forces between neighbouring frames.

    The index splits of rMD17 are not read: ``fid`` is the row in the archive, which they list.
    """

    name = "npz"
    summary = "MD17, rMD17 or MD22 archives (rmd17_aspirin.npz, md22_Ac-Ala3-NHMe.npz)"
    OPTIONS: ClassVar[dict[str, Any]] = {"units": "kcal"}

    def __init__(self, **options: Any) -> None:
        """Check the options.

        Raises:
            UserError: If ``units`` is unknown.
        """
        super().__init__(**options)
        if self.options["units"] not in ENERGY_UNITS:
            raise UserError(f"units={self.options['units']}: choose of {', '.join(ENERGY_UNITS)}")

    @classmethod
    def claims(cls, path: Path) -> bool:
        """An archive that holds the arrays of one of the sets."""
        if path.suffix != ".npz" or not path.is_file() or not zipfile.is_zipfile(path):
            return False
        return _layout(path) is not None

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Ranges of frames.

        Raises:
            UserError: If the labels contradict ``units``.
        """
        parts = []
        for path in paths:
            frames = _Frames(path, self.options["units"])
            frames.check_units()
            starts = range(0, frames.count, PART_RECORDS)
            parts += [Part((path,), a, min(a + PART_RECORDS, frames.count)) for a in starts]
        return parts

    def read(self, part: Part) -> Iterator[Record]:
        """Go through a range of frames, block by block."""
        frames = _Frames(part.paths[0], self.options["units"])
        for index, *row in frames.rows(part.start, part.stop):
            yield Record(
                index=index,
                build=partial(frames.build, index, *row),
                id=f"{frames.molecule}/{index}",
            )

    def card(self, paths: Sequence[Path]) -> Card:
        """Say what the files give of themselves."""
        theory = sorted({_Frames(path, self.options["units"]).theory for path in paths})
        layouts = sorted({_layout(path) for path in paths})
        unit = self.options["units"] + ("/mol" if self.options["units"] in ("kcal", "kj") else "")
        return Card(
            data=", ".join(layouts),
            energy="total energy of all electrons",
            theory=", ".join(theory),
            units={"energy": unit, "forces": f"{unit}/A", "positions": "A"},
        )


def _layout(path: Path) -> str | None:
    """Name of the layout whose arrays an archive holds."""
    with zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
    return next((name for name, keys in LAYOUTS.items() if names.issuperset(keys)), None)


class _Frames:
    """The frames of an archive, streamed, so that memory does not depend on its size.

    Args:
        path: The archive.
        units: Unit of its energies.
    """

    def __init__(self, path: Path, units: str) -> None:
        layout = _layout(path)
        self._path = path
        self._keys = LAYOUTS[layout]
        self._unit = _in_ev(units)
        self._units = units
        with np.load(path) as archive:  # reads only the arrays that are asked for
            self.numbers = archive[self._keys[0]].astype(int)
            texts = {
                key: str(archive[key]).removeprefix("b'").removesuffix("'")
                for key in ("name", "theory", "e_unit", "r_unit")
                if key in archive.files
            }
            self._has_old = "old_indices" in archive.files
        self.molecule = texts.get("name", path.stem)
        self.theory = texts.get("theory", "PBE/def2-SVP, Orca" if layout == "rMD17" else "not said")
        self._said = texts
        self.count = self._shape(self._keys[1])[0]

    def build(
        self, index: int, positions: np.ndarray, energy: np.ndarray, forces: np.ndarray, *old: Any
    ) -> Atoms:
        """Make a structure of a row."""
        from ase import Atoms
        from ase.calculators.singlepoint import SinglePointCalculator

        atoms = Atoms(self.numbers, positions=positions)
        atoms.calc = SinglePointCalculator(
            atoms,
            energy=float(energy.item()) * self._unit,
            forces=forces.astype(float) * self._unit,
        )
        atoms.info = {"sid": self.molecule, "fid": index, "charge": 0, "spin": 1}
        if old:
            atoms.info["old_index"] = int(old[0].item())
        return atoms

    def rows(self, start: int, stop: int | None) -> Iterator[tuple[Any, ...]]:
        """Index, positions, energy and forces of each frame, and its row in MD17 if given."""
        keys = [*self._keys[1:], *(["old_indices"] if self._has_old else [])]
        stop = self.count if stop is None else stop
        with zipfile.ZipFile(self._path) as archive, ExitStack() as stack:
            arrays = [_Rows(stack.enter_context(archive.open(f"{key}.npy"))) for key in keys]
            step = max(1, BLOCK_BYTES // max(array.row_bytes for array in arrays))
            for array in arrays:
                array.skip(start)
            for first in range(start, stop, step):
                blocks = [array.take(min(step, stop - first)) for array in arrays]
                yield from zip(range(first, stop), *blocks, strict=False)

    def check_units(self) -> None:
        """Compare the unit with what the file and physics say.

        Raises:
            UserError: Naming the unit that would fit, if there is one.
        """
        said = self._said.get("e_unit", "").lower().removesuffix("/mol")
        if said in ENERGY_UNITS and said != self._units:
            self._refuse(f"the file says {self._said['e_unit']}", said)
        if self._said.get("r_unit", "ang").lower() not in ("ang", "angstrom", "a"):
            raise UserError(
                f"{self._path}: positions are in {self._said['r_unit']}; give them in A"
            )
        rows = list(self.rows(0, min(CHECKED, self.count)))
        if not rows:
            return
        columns = list(zip(*rows, strict=True))[1:4]
        positions, energies, forces = (np.array(column, dtype=float) for column in columns)
        self._check_total(np.median(energies))
        slope, correlation = work_slope(positions, energies.ravel(), forces)
        low, high = SLOPE_RANGE
        if abs(correlation) > MIN_CORRELATION and not low < slope < high:
            raise UserError(
                f"{self._path}: energies change by {slope:.3g} times the work of the forces along "
                "the trajectory; energies and forces are in different units, or of opposite sign"
            )

    def _check_total(self, energy: float) -> None:
        """Compare a total energy with an estimate; energies relative to others tell nothing."""
        estimate = -THOMAS_FERMI * np.sum(self.numbers ** (7 / 3)) * _in_ev("hartree")
        for unit in ENERGY_UNITS:
            low, high = ALL_ELECTRON_RANGE
            if low < energy * _in_ev(unit) / estimate < high and unit != self._units:
                self._refuse(f"{energy:.8g} is the total energy of this molecule in {unit}", unit)

    def _refuse(self, reason: str, unit: str) -> None:
        raise UserError(f"{self._path}: {reason}, not in {self._units}; pass --set units={unit}")

    def _shape(self, key: str) -> tuple[int, ...]:
        """Shape of an array, from its header."""
        with zipfile.ZipFile(self._path) as archive, archive.open(f"{key}.npy") as member:
            return _Rows(member).shape


class _Rows:
    """The rows of an array in an archive, read from first to last.

    Args:
        member: The ``.npy`` file in the archive.
    """

    def __init__(self, member: zipfile.ZipExtFile) -> None:
        version = np.lib.format.read_magic(member)
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        self.shape, self._fortran, self._dtype = read_header(member)
        if self._dtype.hasobject:
            raise UserError(f"{member.name} holds pickled objects, which are not read")
        if self._fortran and len(self.shape) > 1:
            raise UserError(f"{member.name} is stored by columns; save it in C order")
        self.row_bytes = int(np.prod(self.shape[1:])) * self._dtype.itemsize
        self._member = member

    def skip(self, count: int) -> None:
        """Pass over rows."""
        self._member.seek(count * self.row_bytes, 1)

    def take(self, count: int) -> np.ndarray:
        """Read the next rows."""
        data = self._member.read(count * self.row_bytes)
        if len(data) != count * self.row_bytes:
            raise UserError(f"{self._member.name} is cut off; download the archive again")
        return np.frombuffer(data, self._dtype).reshape(count, *self.shape[1:])


def _in_ev(unit: str) -> float:
    """An energy unit in eV."""
    from ase import units

    mol = units.mol
    return {
        "kcal": units.kcal / mol,
        "kj": units.kJ / mol,
        "ev": 1.0,
        "hartree": units.Hartree,
    }[unit]


def work_slope(
    positions: np.ndarray, energies: np.ndarray, forces: np.ndarray
) -> tuple[float, float]:
    """How energies change per work of the forces, over the closest pairs of frames.

    The work along a straight line is taken from the mean of the forces at its ends, which is exact
    for a quadratic potential.

    Args:
        positions: (M, N, 3).
        energies: (M,).
        forces: (M, N, 3).

    Returns:
        Least-squares slope of dE over -F.dx, 1 if the units fit together, and the correlation of
        the two, 0 if there is nothing to tell.
    """
    flat = positions.reshape(len(positions), -1)
    distances = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    first = np.argsort(distances.min(axis=1))[:CLOSEST_PAIRS]
    second = distances.argmin(axis=1)[first]
    mean_force = (forces[first] + forces[second]) / 2
    work = -np.einsum("mij,mij->m", mean_force, positions[second] - positions[first])
    change = energies[second] - energies[first]
    if not (work.any() and change.any()):
        return 1.0, 0.0
    product = work @ change
    return product / (work @ work), product / np.sqrt((work @ work) * (change @ change))
