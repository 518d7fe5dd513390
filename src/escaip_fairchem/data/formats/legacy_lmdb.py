"""LMDB files of fairchem 1 (OC20, OC22): pickled ``torch_geometric.data.Data``."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from escaip_fairchem.data.formats.base import Card, Format, Part, Record
from escaip_fairchem.data.formats.legacy_record import identify, structures_of, to_atoms
from escaip_fairchem.data.formats.lmdb_pages import NumberedEntries
from escaip_fairchem.data.formats.order import by_number
from escaip_fairchem.data.formats.safe_pickle import loads
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ase import Atoms

KEYS_PER_PART = 20_000
PICKLE_SUFFIXES = (".pkl", ".pickle", ".pt")
STRUCTURES = ("initial", "relaxed")


class LegacyLmdb(Format):
    """Structures pickled by fairchem 1: LMDB files, and pickles or torch files of lists of them.

    Layout: keys ``b"0"``, ``b"1"``, ...; the entry ``b"length"`` may be missing, and so may keys.
    Source: ``LmdbDataset`` of fairchem-core 1.10. Pickles are read by names on a list only.
    """

    name = "legacy-lmdb"
    summary = "LMDB files of fairchem 1: OC20 (S2EF test, IS2RE), OC22; pickles of such structures"
    OPTIONS: ClassVar[dict[str, Any]] = {
        "structure": "initial",  # IS2RE: which structure, initial or relaxed
        "label_initial": False,  # IS2RE: y_init and force are labels of the initial structure
        "oc20_references": "",  # oc20_ref.pkl: makes adsorption energies of OC20 total energies
    }

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.options["structure"] not in STRUCTURES:
            raise UserError(
                f"structure={self.options['structure']}: choose one of {', '.join(STRUCTURES)}"
            )
        if self.options["label_initial"] and self.options["structure"] != "initial":
            raise UserError(
                "label_initial=true needs structure=initial: the forces of relaxed structures are "
                "not published"
            )

        references = self.options["oc20_references"]
        if references and not Path(references).is_file():
            raise UserError(f"oc20_references={references} is no file; give oc20_ref.pkl of OC22")

    @classmethod
    def claims(cls, path: Path) -> bool:
        """Whether a file, or the first one of a folder, holds pickles of fairchem 1."""
        if path.is_dir():
            return any(cls.claims(file) for file in sorted(path.glob("*.lmdb"))[:1])
        if path.suffix in PICKLE_SUFFIXES:
            with path.open("rb") as file:
                return b"torch_geometric.data" in file.read(1_000_000)
        return path.suffix == ".lmdb" and path.is_file() and _holds_pickles(path)

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """One part for each 20,000 keys of a file, and one for each pickle."""
        parts = []
        for path in files_of(paths):
            if path.suffix in PICKLE_SUFFIXES:
                parts.append(Part((path,)))
                continue
            try:
                n_keys = len(open_lmdb(path).keys)
            except UserError:
                parts.append(Part((path,)))  # reading it says what is wrong, and costs one file
                continue
            starts = range(0, max(n_keys, 1), KEYS_PER_PART)
            parts += [Part((path,), start, min(start + KEYS_PER_PART, n_keys)) for start in starts]
        return parts

    def read(self, part: Part) -> Iterator[Record]:
        """Go through the keys of a part in the order of their numbers."""
        (path,) = part.paths
        if path.suffix in PICKLE_SUFFIXES:
            for index, fields in enumerate(structures_of(loads(path.read_bytes()))):
                yield Record(index, lambda fields=fields: self._atoms(fields), id=identify(fields))
            return
        entries = open_lmdb(path)
        keys = entries.keys[part.start : part.stop]
        for index, key in enumerate(keys.tolist(), part.start):
            yield self._record(index, key, entries)
        if part.stop == len(entries.keys):
            for index, place in enumerate(entries.damaged, part.stop):
                yield Record(index, partial(_fail, place), name=place)

    def _record(self, index: int, key: int, entries: NumberedEntries) -> Record:
        """Unpickle now, which tells the id; a defect is raised when the record is built."""
        try:
            fields = fields_of(entries, key)
            found = identify(fields)
        except Exception as error:

            def fail(error: Exception = error) -> Atoms:
                raise error

            return Record(index, fail, name=str(key))
        return Record(index, lambda: self._atoms(fields), name=str(key), id=found)

    def _atoms(self, fields: dict[str, Any]) -> Atoms:
        """Turn fields into atoms as the options say."""
        path = self.options["oc20_references"]
        return to_atoms(
            fields,
            relaxed=self.options["structure"] == "relaxed",
            label_initial=self.options["label_initial"],
            references=read_references(path) if path else None,
        )

    def card(self, paths: Sequence[Path]) -> Card:
        """Say what the energies mean."""
        if self.options["oc20_references"]:
            energy = "total energy of OC22 and, by oc20_references, of OC20, sigma->0"
        else:
            energy = "as in the source: OC20 relative to clean slab and gas, OC22 total; sigma->0"
        return Card(
            data="OC20 or OC22 (fairchem 1 LMDB)",
            energy=energy,
            theory="OC20: VASP, RPBE; OC22: VASP, PBE+U, as published",
            units={"energy": "eV", "forces": "eV/A"},
            notes=("positions and forces are float32 in the source",),
        )


def files_of(paths: Sequence[Path]) -> list[Path]:
    """List the files; of a folder its ``.lmdb`` files, by number.

    Raises:
        UserError: If a folder has none.
    """
    files: list[Path] = []
    for path in paths:
        found = (
            sorted(path.glob("*.lmdb"), key=lambda file: by_number(file.name))
            if path.is_dir()
            else [path]
        )
        if not found:
            raise UserError(f"{path} holds no .lmdb file")
        files += found
    return files


def open_lmdb(path: Path) -> NumberedEntries:
    """Find the structures of a file; ``b"length"`` is not asked.

    It may be missing, or, as in some published files, that of all files of the folder together.

    Raises:
        UserError: If it is no LMDB file, or not all of one.
    """
    status = path.stat()
    return _open_lmdb(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4)
def _open_lmdb(path: Path, *_: int) -> NumberedEntries:
    return NumberedEntries(path)


def fields_of(entries: NumberedEntries, key: int) -> dict[str, Any]:
    """Read the fields of one structure.

    Raises:
        UserError: If the entry is damaged or refused.
    """
    structures = structures_of(loads(entries[key]))
    if len(structures) != 1:
        raise UserError(f"{len(structures)} structures are stored under one key")
    return structures[0]


@lru_cache(maxsize=2)
def read_references(path: str) -> dict[str, float]:
    """Read reference energies, eV, by ``random<sid>``.

    Raises:
        UserError: If the file holds something else.
    """
    references = loads(Path(path).read_bytes())
    if not isinstance(references, dict):
        raise UserError(f"oc20_references={path} holds no table; give oc20_ref.pkl of OC22")
    return references


def _fail(place: str) -> Atoms:
    """Stands for what cannot be read."""
    raise UserError(f"the {place} of the LMDB file is damaged; download the file again")


def _holds_pickles(path: Path) -> bool:
    """Whether the first structure of an LMDB file is a pickle, as in no ASE-LMDB."""
    try:
        entries = open_lmdb(path)
        return len(entries.keys) > 0 and entries[int(entries.keys[0])][:1] == b"\x80"
    except UserError:
        return False
