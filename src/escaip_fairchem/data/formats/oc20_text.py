"""OC20 as published: extended XYZ files, and tables of ids and reference energies beside them."""

from __future__ import annotations

import lzma
import re
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, NamedTuple

from escaip_fairchem.data.formats import extxyz
from escaip_fairchem.data.formats.base import Card, Format, Part, Record
from escaip_fairchem.data.formats.oc20_files import (
    FRAMES,
    SYSTEMS,
    TABLES,
    find_table,
    frame_files,
    open_file,
    open_in_tar,
    pairs_in_tar,
    stem_of,
)
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ase import Atoms

ENERGIES = ("referenced", "total")
_LINE = re.compile(r"(\w+),frame(\d+)(?:,(\S+))?")
_SYSTEM_LINE = re.compile(r"\w+,\S+")


class Label(NamedTuple):
    """What a table says of a frame.

    Attributes:
        sid: System id, without ``random``.
        fid: Frame of the system's relaxation.
        reference: Energy of clean slab and gas, eV, if it is there.
    """

    sid: str
    fid: int
    reference: float | None


class OC20Text(Format):
    """OC20 S2EF train, validation, rattled, MD; and relaxation trajectories, per adsorbate too.

    Layouts: pairs ``N.extxyz.xz`` and ``N.txt.xz``, with a line ``random<sid>,frame<fid>,<eV>``
    for each frame; or ``random<sid>.extxyz.xz`` with one ``system.txt`` of ``random<sid>,<eV>``.
    Both compressed or not, in folders or inside ``.tar`` files, which are read where they are.

    Energies are those under ``energy`` (VASP's energy for sigma->0, as fairchem 1 took), not
    ``free_energy``. Source: chanussot2021 (OC20) and ``preprocess_ef.py`` of fairchem-core 1.10.
    """

    name = "oc20-text"
    summary = "OC20 as published: *.extxyz.xz with *.txt.xz or system.txt, folders or .tar files"
    OPTIONS: ClassVar[dict[str, Any]] = {
        "energy": "referenced",  # relative to clean slab and gas (adsorption energy), or total
    }

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.options["energy"] not in ENERGIES:
            raise UserError(f"energy={self.options['energy']}: choose one of {', '.join(ENERGIES)}")

    @classmethod
    def claims(cls, path: Path) -> bool:
        """Whether a file of frames, the first one of a folder or of a ``.tar``, has a table."""
        try:
            if path.is_dir():
                first = next((f for f in path.rglob("*.extxyz*") if stem_of(f.name, FRAMES)), None)
                return first is not None and cls.claims(first)
            if path.suffix == ".tar":
                with tarfile.open(path, "r:") as archive:
                    names = [member.name for _, member in zip(range(50), archive, strict=False)]
                return any(stem_of(name, FRAMES) for name in names)
            if not stem_of(path.name, FRAMES) or (table := find_table(path)) is None:
                return False
            with open_file(table) as stream:
                line = stream.readline().decode(errors="replace").strip()
        except (OSError, EOFError, lzma.LZMAError, tarfile.TarError):
            return False
        pattern = _SYSTEM_LINE if stem_of(table.name, TABLES) == SYSTEMS else _LINE
        return bool(pattern.fullmatch(line))

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """One part for each file of frames; of a ``.tar``, for each inside it, by position."""
        parts = []
        for path in paths:
            if path.is_file() and path.suffix == ".tar":
                parts += [Part((path,), i, i + 1) for i in range(len(pairs_in_tar(path)))]
                continue
            files = frame_files(path) if path.is_dir() else [path]
            if not files:
                raise UserError(f"{path} holds no {' or '.join('*' + end for end in FRAMES)} file")
            for file in files:
                if (table := find_table(file)) is None:
                    raise UserError(
                        f"{file} has no {stem_of(file.name, FRAMES)}.txt.xz (nor .txt, nor "
                        "system.txt) beside it, which gives ids and reference energies"
                    )
                parts.append(Part((file, table)))
        return parts

    def read(self, part: Part) -> Iterator[Record]:
        """Read frames and table side by side, each once from start to end."""
        if len(part.paths) == 2:
            file, table = part.paths
            with open_file(file) as frames, open_file(table) as lines:
                yield from self._records(file.name, frames, table, lines, _is_perturbed(file))
            return
        (path,) = part.paths
        frames_in, table_in = pairs_in_tar(path)[part.start]
        with open_in_tar(path, frames_in) as frames, open_in_tar(path, table_in) as lines:
            table = path / table_in.name
            perturbed = _is_perturbed(path / frames_in.name)
            yield from self._records(frames_in.name, frames, table, lines, perturbed)

    def _records(
        self, name: str, frames: BinaryIO, table: Path, lines: BinaryIO, perturbed: bool
    ) -> Iterator[Record]:
        """Pair frames with what the table says of them."""
        stem = stem_of(Path(name).name, FRAMES)
        if stem_of(table.name, TABLES) == SYSTEMS:
            labels = _labels_of_system(stem, table, lines)
        else:
            labels = _labels_of_lines(table, lines)
        index = -1
        for index, frame in enumerate(extxyz.read_frames(frames)):
            label = next(labels, None)
            if label is None:
                raise UserError(f"{table} has {index} lines, but {name} has more frames")
            sid, fid = label[:2] if isinstance(label, Label) else (None, None)
            # Perturbed frames carry the ids of the frames that they were made from.
            known = sid is not None and not perturbed
            yield Record(
                index, self._builder(frame, label), name, id=f"{sid}_{fid}" if known else None
            )
        if stem_of(table.name, TABLES) != SYSTEMS and next(labels, None) is not None:
            raise UserError(f"{name} ends after {index + 1} frames, but {table} has more lines")

    def _builder(self, frame: extxyz.Frame, label: Label | UserError) -> Callable[[], Atoms]:
        """Say how a frame is built; a table's defect is raised then."""
        referenced = self.options["energy"] == "referenced"

        def build() -> Atoms:
            if isinstance(label, UserError):
                raise label
            atoms = frame.parse()
            atoms.info = {"sid": label.sid, "fid": label.fid}
            results = atoms.calc.results if atoms.calc is not None else {}
            results.pop("free_energy", None)
            if label.reference is not None:
                atoms.info["reference_energy"] = label.reference
            if referenced and "energy" in results:
                if label.reference is None:
                    raise UserError(
                        "the table gives no reference energy; take total ones (energy=total)"
                    )
                results["energy"] -= label.reference
            return atoms

        return build

    def card(self, paths: Sequence[Path]) -> Card:
        """Say what the energies are relative to."""
        referenced = "relative to the clean slab and gas-phase references (adsorption energy)"
        energy = "total" if self.options["energy"] == "total" else referenced
        return Card(
            data="OC20",
            energy=f"{energy}; VASP's energy for sigma->0",
            theory="VASP, RPBE, 350 eV cutoff, as published",
            units={"energy": "eV", "forces": "eV/A"},
            notes=("forces on fixed atoms are kept", "info reference_energy: eV, clean slab + gas"),
        )


def _labels_of_lines(table: Path, lines: BinaryIO) -> Iterator[Label | UserError]:
    """Parse the lines of a table; one that does not parse gives an error instead."""
    for number, raw in enumerate(lines, 1):
        text = raw.decode(errors="replace").strip()
        match = _LINE.fullmatch(text)
        try:
            if match is None:
                raise ValueError
            reference = None if match[3] is None else float(match[3])
            yield Label(match[1].removeprefix("random"), int(match[2]), reference)
        except ValueError:
            if text:
                yield UserError(
                    f"{table}, line {number}: {text[:60]!r} is not "
                    "'random<id>,frame<number>,<reference energy>'"
                )


def _labels_of_system(stem: str, table: Path, lines: BinaryIO) -> Iterator[Label | UserError]:
    """Number the frames of the trajectory of one system, without end."""
    text = _systems(table, lines).get(stem)
    try:
        if text is None:
            raise UserError(f"{table} has no line for {stem}")
        reference = float(text)
    except ValueError as error:
        while True:
            yield UserError(str(error) if text is None else f"{table}: {stem} has energy {text!r}")
    fid = 0
    while True:
        yield Label(stem.removeprefix("random"), fid, reference)
        fid += 1


_systems_cache: dict[Path, dict[str, str]] = {}


def _systems(table: Path, lines: BinaryIO) -> dict[str, str]:
    """Read a table of reference energies, as text by system; that of the last file is kept."""
    if table not in _systems_cache:
        _systems_cache.clear()
        rows = (line.decode(errors="replace").strip().partition(",") for line in lines)
        _systems_cache[table] = {system: energy for system, _, energy in rows}
    return _systems_cache[table]


def _is_perturbed(path: Path) -> bool:
    """Whether a file is of the rattled or MD data, by the names of its folders."""
    words = re.split(r"[^a-z]+", "/".join(path.parts[-4:-1]).lower())
    return "rattled" in words or "md" in words
