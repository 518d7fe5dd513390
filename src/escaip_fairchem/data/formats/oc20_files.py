"""The files of OC20 as published: which belong together, and streams of them."""

from __future__ import annotations

import io
import lzma
import tarfile
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from escaip_fairchem.data.formats.order import by_number
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

FRAMES = (".extxyz", ".extxyz.xz")
TABLES = (".txt", ".txt.xz")
SYSTEMS = "system"  # stem of the one table of a folder of trajectories


def stem_of(name: str, endings: tuple[str, ...]) -> str:
    """The name without one of the endings; empty if it has none of them."""
    return next((name.removesuffix(end) for end in endings if name.endswith(end)), "")


def _table_names(frames: str) -> list[str]:
    """Names that the table of a file of frames may have."""
    return [stem + end for stem in (stem_of(frames, FRAMES), SYSTEMS) for end in TABLES]


def find_table(path: Path) -> Path | None:
    """Find the table beside a file of frames."""
    tables = (path.with_name(name) for name in _table_names(path.name))
    return next((table for table in tables if table.is_file()), None)


def frame_files(folder: Path) -> list[Path]:
    """Files of frames below a folder, by number; a file that is also there unpacked, once."""
    found = {}
    for path in sorted(folder.rglob("*.extxyz*"), reverse=True):  # .extxyz comes last and stays
        if stem := stem_of(path.name, FRAMES):
            found[path.parent, stem] = path
    return sorted(found.values(), key=lambda path: by_number(str(path)))


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that may be compressed."""
    with path.open("rb") as file:
        yield _unpacked(file, path.name)


def _unpacked(file: BinaryIO, name: str) -> BinaryIO:
    """Decode a compressed stream from start to end."""
    if not name.endswith(".xz"):
        return file
    return io.BufferedReader(lzma.LZMAFile(file), 1 << 18)  # which gives lines much faster


@lru_cache(maxsize=4)
def pairs_in_tar(path: Path) -> list[tuple[tarfile.TarInfo, tarfile.TarInfo]]:
    """Find files of frames in an archive, by number, each with its table.

    Raises:
        UserError: If one has no table.
    """
    with tarfile.open(path, "r:") as archive:
        members = {member.name: member for member in archive if member.isfile()}
    pairs = []
    for name in sorted(members, key=by_number):
        frames = Path(name)
        if not stem_of(frames.name, FRAMES):
            continue
        tables = (str(frames.with_name(table)) for table in _table_names(frames.name))
        table = next((table for table in tables if table in members), None)
        if table is None:
            raise UserError(
                f"{path}: {name} has no {stem_of(frames.name, FRAMES)}.txt.xz (nor .txt, nor "
                "system.txt) beside it, which gives ids and reference energies"
            )
        pairs.append((members[name], members[table]))
    return pairs


@contextmanager
def open_in_tar(path: Path, member: tarfile.TarInfo) -> Iterator[BinaryIO]:
    """Open a file inside an archive without unpacking the archive."""
    with tarfile.open(path, "r:") as archive, archive.extractfile(member) as file:
        yield _unpacked(file, member.name)
