"""Archives of extended XYZ files, a file for each material, as Matbench Discovery publishes them.

WBM (``2024-08-04-wbm-initial-atoms.extxyz.zip``, 256,963 materials; figshare 22715158) and MPtrj
(``2024-09-03-mp-trj.extxyz.zip``). The archive is read, not unpacked.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from escaip_fairchem.data.formats.ase_files import EXTXYZ, ROWS_PER_PART, AseFiles, cut_extxyz
from escaip_fairchem.data.formats.base import Part, Record
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from ase import Atoms


class ExtxyzZip(AseFiles):
    """A zip archive of extended XYZ files; ``sid`` is their ``material_id``, or the file's name.

    A record's index is the place of its file in the archive, in bytes, plus its frame in it.
    """

    name = "extxyz_zip"
    summary = "zip archives of extended XYZ files (Matbench Discovery's WBM and MPtrj)"

    @classmethod
    def claims(cls, path: Path) -> bool:
        """A file named as one."""
        return path.is_file() and path.name.endswith(tuple(f"{end}.zip" for end in EXTXYZ))

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Shares of an archive."""
        parts = []
        for path in paths:
            with _opened(path) as archive:
                count = len(_members(archive))
            parts += [Part((path,), i, i + ROWS_PER_PART) for i in range(0, count, ROWS_PER_PART)]
        return parts

    def raw(self, part: Part) -> Iterator[Record]:
        """Go through a share; records are structures as ASE reads them."""
        path = part.paths[0]
        with _opened(path) as archive:
            for member in _members(archive)[part.start : part.stop]:
                file = io.BytesIO(archive.read(member))
                for frame, build in enumerate(cut_extxyz(file, f"{path}: {member.filename}")):
                    yield Record(
                        index=member.header_offset + frame,
                        build=partial(_named, build, PurePosixPath(member.filename).stem),
                        name=member.filename,
                    )


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is no whole zip archive ({error}); download it again") from None


def _members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files of an archive, in its order."""
    return [each for each in archive.infolist() if each.filename.endswith(EXTXYZ)]


def _named(build: Callable[[], Atoms], name: str) -> Atoms:
    atoms = build()
    atoms.info.setdefault("sid", atoms.info.get("material_id", name))
    return atoms
