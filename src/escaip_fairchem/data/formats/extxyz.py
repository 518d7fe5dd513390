"""Frames of an extended XYZ stream, one at a time, several times faster than ASE reads them."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from functools import cache
from itertools import islice, product
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ase import Atoms

# What this reader parses itself; ASE reads a frame with any other column or key.
COLUMNS = {
    "species": "S:1",
    "pos": "R:3",
    "move_mask": "L:1",
    "tags": "I:1",
    "forces": "R:3",
}
KEYS = {"Lattice", "Properties", "energy", "free_energy", "pbc"}
_PBC = {" ".join(axes): [axis == "T" for axis in axes] for axes in product("TF", repeat=3)}
_PAIR = re.compile(r'([\w-]+)=(?:"([^"]*)"|(\S+))')


@dataclass(frozen=True)
class Frame:
    """A frame that is not parsed yet.

    Attributes:
        header: Its second line.
        rows: Its lines of atoms.
    """

    header: str
    rows: list[bytes]

    def parse(self) -> Atoms:
        """Make the atoms, as ASE does.

        Returns:
            N atoms with tags, ``FixAtoms`` and, in a ``SinglePointCalculator``, ``energy`` (eV),
            ``free_energy`` and ``forces`` (N, 3), as far as they are there.

        Raises:
            UserError: If it is no frame of extended XYZ.
        """
        pairs = _PAIR.findall(self.header)
        keys = {key: quoted or bare for key, quoted, bare in pairs}
        columns = _columns_of(keys.get("Properties", ""))
        left = _PAIR.sub("", self.header).strip()
        try:
            known = columns and not left and {"Lattice"} <= set(keys) <= KEYS
            if known and keys.get("pbc", "T T T") in _PBC:
                return self._parse_known(keys, columns)
            return self._parse_by_ase()
        except Exception as error:  # ASE raises of every type
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"damaged frame ({reason})") from None

    def _parse_known(self, keys: dict[str, str], columns: dict[str, slice]) -> Atoms:
        """Parse a frame of the columns and keys of OC20."""
        from ase import Atoms
        from ase.calculators.singlepoint import SinglePointCalculator
        from ase.constraints import FixAtoms

        n_atoms, width = len(self.rows), max(columns[name].stop for name in columns)
        words = b"".join(self.rows).split()
        if len(words) != n_atoms * width:
            raise ValueError(f"{len(words)} words in {n_atoms} lines of {width} columns")
        floats = {
            name: np.array(
                [list(map(float, words[i::width])) for i in range(*columns[name].indices(width))]
            ).T
            for name in ("pos", "forces")
            if name in columns
        }
        atoms = Atoms(
            numbers=[_number_of(word) for word in words[columns["species"].start :: width]],
            positions=floats["pos"],
            cell=np.array(keys["Lattice"].split(), dtype=float).reshape(3, 3),
            pbc=_PBC[keys.get("pbc", "T T T")],
        )
        if "tags" in columns:
            atoms.set_tags(list(map(int, words[columns["tags"].start :: width])))
        if "move_mask" in columns:
            movable = words[columns["move_mask"].start :: width]
            if not set(movable) <= {b"T", b"F"}:
                raise ValueError(f"move_mask has {set(movable)} instead of T and F")
            atoms.set_constraint(FixAtoms([i for i, word in enumerate(movable) if word == b"F"]))
        results: dict[str, Any] = {
            key: float(keys[key]) for key in ("energy", "free_energy") if key in keys
        }
        if "forces" in columns:
            results["forces"] = np.ascontiguousarray(floats["forces"])
        if results:
            atoms.calc = SinglePointCalculator(atoms, **results)
        return atoms

    def _parse_by_ase(self) -> Atoms:
        """Let ASE parse the frame."""
        from ase.io.extxyz import read_xyz

        text = f"{len(self.rows)}\n{self.header}\n" + b"".join(self.rows).decode()
        return next(read_xyz(io.StringIO(text), index=slice(0, 1)))


def read_frames(stream: BinaryIO) -> Iterator[Frame]:
    """Go through the frames of a stream, which is read once, from start to end.

    Raises:
        UserError: If a frame begins with something else than its number of atoms, or ends early.
    """
    while first := stream.readline():
        if not first.strip():
            continue
        try:
            n_atoms = int(first)
        except ValueError:
            raise UserError(
                f"{first[:40].decode(errors='replace').strip()!r} stands where a frame begins with "
                "its number of atoms; the file is damaged"
            ) from None
        header = stream.readline().decode(errors="replace").strip()
        rows = list(islice(stream, n_atoms))
        if len(rows) < n_atoms or not rows[-1:] or not rows[-1].strip():
            raise UserError(f"the file ends after {len(rows)} of {n_atoms} atoms of a frame")
        yield Frame(header, rows)


@cache
def _columns_of(properties: str) -> dict[str, slice]:
    """Where the columns are, or nothing if one of them is unknown."""
    words = properties.split(":")
    columns: dict[str, slice] = {}
    start = 0
    for name, kind, count in zip(words[::3], words[1::3], words[2::3], strict=False):
        if COLUMNS.get(name) != f"{kind}:{count}":
            return {}
        columns[name] = slice(start, start + int(count))
        start += int(count)
    return columns if {"species", "pos"} <= set(columns) else {}


@cache
def _number_of(symbol: bytes) -> int:
    """Atomic number of a symbol."""
    from ase.data import atomic_numbers

    return atomic_numbers[symbol.decode()]
