"""Labelled frames in, from whatever ASE reads."""

from __future__ import annotations

import glob
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ase import Atoms

DATABASE_SUFFIXES = (".aselmdb", ".db", ".json")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz")


@dataclass(frozen=True)
class LabelKeys:
    """Names under which labels are stored when there is no calculator.

    Attributes:
        energy: Key of ``atoms.info``, eV.
        forces: Key of ``atoms.arrays``, (N, 3), eV/A.
        stress: Key of ``atoms.info``, 6 (Voigt), 9 or 3x3 numbers, eV/A^3.
    """

    energy: str | None = None
    forces: str | None = None
    stress: str | None = None


@dataclass(frozen=True)
class Frame:
    """A structure as it was read, and where it came from."""

    atoms: Atoms
    path: Path
    index: int

    @property
    def place(self) -> str:
        """File and frame, for messages."""
        return f"{self.path}, frame {self.index}"


def expand_inputs(inputs: Sequence[str | Path]) -> list[Path]:
    """Resolve file names, glob patterns and folders of ASE-LMDB files, in order.

    Raises:
        UserError: If one of them names nothing.
    """
    paths: list[Path] = []
    for item in map(str, inputs):
        path = Path(item)
        if path.is_dir():
            found = sorted(path.glob("*.aselmdb"))
        else:
            found = [path] if path.is_file() else [Path(p) for p in sorted(glob.glob(item))]
        if not found:
            what = "holds no .aselmdb file" if path.is_dir() else "does not exist"
            raise UserError(f"input {item} {what}; give files, glob patterns or ASE-LMDB folders")
        paths += found
    return paths


def read_frames(paths: Sequence[Path]) -> Iterator[Frame]:
    """Read all frames of all files, one at a time.

    Raises:
        UserError: If ASE cannot read a file.
    """
    for path in paths:
        try:
            for index, atoms in enumerate(_read_file(path)):
                yield Frame(atoms, path, index)
        except Exception as error:  # ASE readers raise of every type
            reason = str(error).strip().splitlines()
            raise UserError(
                f"ASE cannot read {path} ({type(error).__name__}: {reason[0] if reason else ''}); "
                "give a file in a format of `ase info --formats`"
            ) from error


def _read_file(path: Path) -> Iterator[Atoms]:
    """Read the frames of one file; rows of a database bring their keys and data as ``info``."""
    if path.suffix not in DATABASE_SUFFIXES:
        from ase.io import iread

        with _decompressed(path) as plain:
            yield from iread(plain, index=":", do_not_split_by_at_sign=True)
        return
    from ase.db import connect

    options = {"readonly": True} if path.suffix == ".aselmdb" else {}
    database = connect(path, use_lock_file=False, **options)
    for row in database.select():
        atoms = row.toatoms()
        atoms.info = {**row.key_value_pairs, **row.data}
        yield atoms


@contextmanager
def _decompressed(path: Path) -> Iterator[Path]:
    """Unpack a compressed file for the time of reading.

    ASE's readers seek back and forth, which unpacks a compressed stream from its start each time.
    """
    if path.suffix not in COMPRESSED_SUFFIXES:
        yield path
        return
    from ase.io.formats import open_with_compression

    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / path.stem
        with open_with_compression(str(path), "rb") as packed, plain.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        yield plain


def labelled(frame: Frame, keys: LabelKeys) -> Atoms:
    """Reduce a frame to what fairchem trains on.

    Kept: species, positions, cell, pbc, tags, fixed atoms (``FixAtoms``), the plain values of
    ``info`` (``sid`` as text, because fairchem drops other types), energy, raw forces (those on
    fixed atoms too) and, of periodic structures, stress.

    Returns:
        New ``ase.Atoms`` with a ``SinglePointCalculator``.

    Raises:
        UserError: If energy or forces are missing.
    """
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.constraints import FixAtoms

    source = frame.atoms
    fixed = [c for c in source.constraints if isinstance(c, FixAtoms)]
    atoms = Atoms(
        numbers=source.numbers,
        positions=source.positions,
        cell=source.cell,
        pbc=source.pbc,
        tags=source.get_tags(),
        constraint=fixed,
        info=_plain_info(frame, keys),
    )
    results = source.calc.results if source.calc is not None else {}
    labels = {
        "energy": _label(frame, "energy", keys.energy, source.info, results),
        "forces": _label(frame, "forces", keys.forces, source.arrays, results),
    }
    # A molecule has no volume, so the zeros that some programs write for it are no stress.
    if source.pbc.any() and (keys.stress or results.get("stress") is not None):
        labels["stress"] = _label(frame, "stress", keys.stress, source.info, results)
    atoms.calc = SinglePointCalculator(atoms, **_as_numbers(frame, labels))
    return atoms


def group_of(frame: Frame, key: str) -> str:
    """Value of an ``info`` key as text.

    Raises:
        UserError: If the frame lacks it.
    """
    if key not in frame.atoms.info:
        raise UserError(
            f"{frame.place}: no info key {key!r} to split by; {_keys_of(frame, 'info')}"
        )
    return str(frame.atoms.info[key])


def _label(frame: Frame, name: str, key: str | None, values: dict, results: dict) -> Any:
    """Find a label under its key, or else in the calculator's results."""
    for place in (values, results):
        if key is not None and place.get(key) is not None:
            return place[key]
    if key is None and results.get(name) is not None:
        return results[name]
    missing = f"no {name}" if key is None else f"no {name} under {key!r}"
    where = "arrays" if name == "forces" else "info"
    raise UserError(
        f"{missing}; name the key that holds it with --{name}-key ({_keys_of(frame, where)})"
    )


def _as_numbers(frame: Frame, labels: dict[str, Any]) -> dict[str, Any]:
    """Turn labels into float64, stress into Voigt order."""
    from ase.stress import full_3x3_to_voigt_6_stress

    try:
        numbers = {key: np.asarray(value, dtype=float) for key, value in labels.items()}
        numbers["energy"] = float(numbers["energy"].item())
        stress = numbers.get("stress")
        if stress is not None and stress.size == 9:
            numbers["stress"] = full_3x3_to_voigt_6_stress(stress.reshape(3, 3))
        elif stress is not None:
            numbers["stress"] = stress.reshape(6)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"a label is not of the right size ({error}); energy is one number, "
            "forces are (N, 3), stress has 6 or 9 numbers"
        ) from error
    return numbers


def _plain_info(frame: Frame, keys: LabelKeys) -> dict[str, Any]:
    """Plain values of ``info``; labels are left out, because fairchem prefers them there."""
    taken = {"energy", "forces", "stress", keys.energy, keys.stress}
    info = {}
    for key, stored in frame.atoms.info.items():
        value = stored.item() if isinstance(stored, np.generic) else stored
        if key not in taken and isinstance(value, str | int | float | bool):
            info[key] = value
    for key in ("charge", "spin"):  # whole numbers for fairchem's integer embeddings
        if isinstance(info.get(key), float) and info[key].is_integer():
            info[key] = int(info[key])
    info["sid"] = str(info.get("sid", f"{frame.path.name.split('.')[0]}-{frame.index}"))
    return info


def _keys_of(frame: Frame, where: str) -> str:
    """List the keys that a frame has."""
    return f"{where} has {', '.join(sorted(map(str, getattr(frame.atoms, where)))) or 'no keys'}"


def free_atoms(atoms: Atoms) -> np.ndarray:
    """Mask of the atoms that ``FixAtoms`` leaves free, (N,) bool."""
    free = np.ones(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        free[constraint.index] = False
    return free
