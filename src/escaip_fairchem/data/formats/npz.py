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
from escaip_fairchem.data.formats.md_units import ENERGY_UNITS, check_units, in_ev
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
        self._unit = in_ev(units)
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
        self._texts = texts
        self.count = self._shape(self._keys[1])[0]

    def build(
        self, index: int, positions: np.ndarray, energy: np.ndarray, forces: np.ndarray, *old: Any
    ) -> Atoms:
        """Make a structure of a row."""
        from ase import Atoms
        from ase.calculators.singlepoint import SinglePointCalculator

        atoms = Atoms(numbers=self.numbers, positions=positions)
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
            UserError: If they contradict it.
        """
        rows = list(self.rows(0, min(CHECKED, self.count)))
        if not rows:
            return
        columns = list(zip(*rows, strict=True))[1:4]
        positions, energies, forces = (np.array(column, dtype=float) for column in columns)
        try:
            said = self._texts.get("r_unit", "Ang"), self._texts.get("e_unit")
            check_units(self._units, said, self.numbers, positions, energies.ravel(), forces)
        except UserError as error:
            raise UserError(f"{self._path}: {error}") from error

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
