"""Read a ``.npz`` that nobody vouches for: headers first, no pickles, and every byte checked."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

_BROKEN = (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Entry:
    """An array of an archive, as its header says.

    Attributes:
        dtype: Type of its elements; None if the header cannot be read.
        shape: Shape.
        error: Why the array cannot be read; empty if it can, as far as the header tells.
    """

    dtype: np.dtype | None
    shape: tuple[int, ...]
    error: str = ""


class Archive:
    """A ``.npz`` file.

    Args:
        path: The file.

    Attributes:
        entries: Its arrays by their names.
        twice: Names that are there more than once.

    Raises:
        UserError: There is no such file, or it is no archive, or cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.twice: list[str] = []
        if not path.is_file():
            raise UserError(f"no file {path}")
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                for name in names:
                    self.entries[name.removesuffix(".npy")] = _entry(archive, name)
        except zipfile.BadZipFile:
            raise UserError(f"{path} is no .npz file, or is cut off") from None
        self.twice = sorted({name.removesuffix(".npy") for name in names if names.count(name) > 1})

    def load(self, name: str) -> np.ndarray | None:
        """The values of an array; None if they cannot be read, and `entries` then says why."""
        entry = self.entries[name]
        if entry.error:
            return None
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
                extra = len(file.read(1))  # also makes zipfile compare the checksum
        except _BROKEN as error:
            reason = f"cannot be read ({str(error).strip().splitlines()[0]}): the file is damaged"
        else:
            if not extra:
                return array
            reason = "is longer than its header says"
        self.entries[name] = Entry(entry.dtype, entry.shape, reason)
        return None


def _entry(archive: zipfile.ZipFile, name: str) -> Entry:
    if not name.endswith(".npy"):
        return Entry(None, (), "is not an array")
    try:
        with archive.open(name) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0
            if version != (1, 0):
                read = np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
    except _BROKEN:
        return Entry(None, (), "has no readable header: the file is damaged")
    if dtype.hasobject:
        return Entry(dtype, shape, "holds pickled objects; store an array of plain values")
    return Entry(dtype, shape)
