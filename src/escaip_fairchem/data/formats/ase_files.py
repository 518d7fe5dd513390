"""Anything that ASE reads: extxyz, trajectories, databases, output of programs."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import tempfile
from contextlib import contextmanager
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

from escaip_fairchem.data.formats.base import Format, Part, Record
from escaip_fairchem.data.frames import LabelKeys, labelled
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ase import Atoms
    from ase.db.core import Database

    Builders = Iterator[Callable[[], Atoms]]

LMDB, DATABASES = ".aselmdb", (".aselmdb", ".db", ".json")
EXTXYZ = (".extxyz", ".xyz")
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
ROWS_PER_PART = 50_000  # of a database


class AseFiles(Format):
    """Files of any format of ASE, and folders of ASE-LMDB files."""

    name = "ase"
    summary = "anything that ASE reads, and folders of ASE-LMDB files"
    OPTIONS: ClassVar[dict[str, Any]] = {
        "energy_key": None,
        "forces_key": None,
        "stress_key": None,
        "charge_key": None,
        "spin_key": None,
        "unlabelled": False,
    }

    @classmethod
    def claims(cls, path: Path) -> bool:
        """Any file, and folders that hold ASE-LMDB files."""
        return path.is_file() or any(path.glob(f"*{LMDB}"))

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """One part for each file, and for each share of a database."""
        parts: list[Part] = []
        for path in _files(paths):
            if path.suffix in DATABASES:
                with _readable(path):
                    database = _open_database(path)
                    n_rows = len(database.ids) if path.suffix == LMDB else database.count()
                starts = range(0, n_rows, ROWS_PER_PART)
                parts += [Part((path,), i, min(i + ROWS_PER_PART, n_rows)) for i in starts]
            else:
                parts.append(Part((path,)))
        return parts

    def read(self, part: Part) -> Iterator[Record]:
        """Go through a part; records keep what `labelled` does."""
        keys = LabelKeys(*(self.options[f"{field}_key"] for field in LabelKeys.__annotations__))
        stem = part.paths[0].name.split(".")[0]
        for record in self.raw(part):
            build = partial(
                _labelled, record.build, keys, f"{stem}-{record.index}", self.options["unlabelled"]
            )
            yield Record(record.index, build)

    def raw(self, part: Part) -> Iterator[Record]:
        """Go through a part; records are structures as ASE reads them.

        Raises:
            UserError: If ASE cannot read the file, or not beyond a record.
        """
        path = part.paths[0]
        name = path.stem if path.suffix in OPENERS else path.name
        if path.suffix in DATABASES:
            builders = _database(path, part)
        elif name.endswith(EXTXYZ):
            builders = _extxyz(path)
        elif path.suffix == ".traj":
            builders = _trajectory(path)
        else:
            builders = _other(path)
        with _readable(path):
            yield from map(Record, count(part.start), builders)


def _labelled(build: Callable[[], Atoms], keys: LabelKeys, sid: str, optional: bool) -> Atoms:
    return labelled(build(), keys, sid, optional=optional)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say which file ASE cannot read; its readers raise of every type."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"ASE cannot read {path} ({type(error).__name__}: {reason[0] if reason else ''}); "
            "give a file in a format of `ase info --formats`"
        ) from error


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    """The files, those of folders in order of their names."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = sorted(path.glob(f"*{LMDB}"))
        if not found:
            raise UserError(f"input {path} holds no .aselmdb file; name the files in it")
        yield from found


def _open_database(path: Path) -> Database:
    """Open a database of ASE for reading."""
    from ase.db import connect

    return connect(path, use_lock_file=False, **({"readonly": True} if path.suffix == LMDB else {}))


def _database(path: Path, part: Part) -> Builders:
    """Rows bring their keys and data as ``info``."""
    database = _open_database(path)
    if path.suffix == LMDB:
        for key in database.ids[part.start : part.stop]:
            yield partial(_row, database.get, id=key)
        return
    limit = None if part.stop is None else part.stop - part.start
    for row in database.select(offset=part.start, limit=limit):
        yield partial(_row, lambda row=row: row)


def _row(get: Callable, **which: int) -> Atoms:
    """Turn a row into a structure."""
    row = get(**which)
    atoms = row.toatoms()
    atoms.info = {**row.key_value_pairs, **row.data}
    return atoms


def _extxyz(path: Path) -> Builders:
    with OPENERS.get(path.suffix, open)(path, "rb") as file:
        yield from cut_extxyz(file, str(path))


def cut_extxyz(file: BinaryIO, name: str) -> Builders:
    """Cut a file at the atom counts, so that it is read once, and parsed frame by frame.

    Args:
        file: Extended XYZ, uncompressed.
        name: For messages.

    Raises:
        UserError: A frame does not begin with its number of atoms.
    """
    header = file.readline()
    while header:
        if not header.strip():  # ASE would stop here, and not say so
            header = file.readline()
            continue
        try:
            n_atoms = int(header)
        except ValueError:
            raise UserError(
                f"ASE cannot read {name} (a number of atoms is expected in place of "
                f"{header[:40].decode(errors='replace').strip()!r}); correct or remove the "
                "frame before it"
            ) from None
        lines = [header, *islice(file, n_atoms + 1)]
        header = file.readline()
        while header.lstrip().startswith(b"VEC"):
            lines.append(header)
            header = file.readline()
        yield partial(_parse, b"".join(lines))


def _parse(text: bytes) -> Atoms:
    """Parse a frame of an extxyz file."""
    from ase.io.extxyz import read_xyz

    return next(read_xyz(io.StringIO(text.decode()), 0))


def _trajectory(path: Path) -> Builders:
    """Frames of a trajectory of ASE, which tells their places."""
    from ase.io.trajectory import Trajectory

    with Trajectory(path) as frames:
        for index in range(len(frames)):
            yield partial(frames.__getitem__, index)


def _other(path: Path) -> Builders:
    """Frames that ASE builds one after the other."""
    from ase.io import iread

    with _decompressed(path) as plain:
        for atoms in iread(plain, index=":", do_not_split_by_at_sign=True):
            yield lambda atoms=atoms: atoms


@contextmanager
def _decompressed(path: Path) -> Iterator[Path]:
    """Unpack a compressed file for the time of reading.

    ASE's readers seek back and forth, which unpacks a compressed stream from its start each time.
    """
    if path.suffix not in OPENERS:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / path.stem
        with OPENERS[path.suffix](path, "rb") as packed, plain.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        yield plain
