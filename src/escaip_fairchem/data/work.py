"""Reading one part of the inputs into chunks: the work of a process."""

from __future__ import annotations

import errno
import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.data import checks
from escaip_fairchem.data.facts import Facts, columns, measure
from escaip_fairchem.data.frames import keys_of
from escaip_fairchem.data.rows import encode_row
from escaip_fairchem.errors import UserError
from escaip_fairchem.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ase import Atoms

    from escaip_fairchem.data.formats.base import Part, Record
    from escaip_fairchem.data.journal import PartJournal
    from escaip_fairchem.data.plan import Reading

# What a kill costs at most: seconds of work.
RECORDS_PER_CHUNK = 2_000
BYTES_PER_CHUNK = 1 << 25
MAX_REASON = 500  # characters
BLOCK = 1 << 20  # bytes read at once for a checksum
#: Errors of the machine, not of the data: the conversion stops and can go on later.
SYSTEM_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EMFILE,
    errno.ENOMEM,
)


@dataclass
class Chunk:
    """Frames that are read but not kept yet."""

    rows: list[bytes] = field(default_factory=list)
    facts: list[Facts] = field(default_factory=list)
    numbers: list[np.ndarray] = field(default_factory=list)
    places: list[tuple[int, str, int, str]] = field(default_factory=list)
    rejected: list[tuple[int, str, str]] = field(default_factory=list)
    size: int = 0

    @property
    def n_records(self) -> int:
        """Records that went into it, the rejected ones too."""
        return len(self.rows) + len(self.rejected)

    @property
    def full(self) -> bool:
        """Whether it is time to keep it."""
        return self.n_records >= RECORDS_PER_CHUNK or self.size >= BYTES_PER_CHUNK

    def add(self, record: Record, atoms: Atoms, group: str) -> None:
        """Take a frame."""
        self.rows.append(encode_row(atoms))
        self.size += len(self.rows[-1])
        self.facts.append(measure(atoms))
        self.numbers.append(atoms.numbers)
        self.places.append((record.index, record.name, id_hash(record.id), group))

    def table(self) -> dict[str, np.ndarray]:
        """What is remembered of it."""
        index, name, identity, group = zip(*self.places, strict=True) if self.places else [()] * 4
        bad_index, bad_name, reason = (
            zip(*self.rejected, strict=True) if self.rejected else [()] * 3
        )
        groups, group_of = np.unique(np.array(group, dtype=np.str_), return_inverse=True)
        return {
            **columns(self.facts, self.numbers),
            "index": np.array(index, dtype=np.int64),
            "name": np.array(name, dtype=np.str_),
            "id": np.array(identity, dtype=np.uint64),
            "groups": groups,
            "group_of": group_of.astype(np.int32),
            "rejected_index": np.array(bad_index, dtype=np.int64),
            "rejected_name": np.array(bad_name, dtype=np.str_),
            "rejected_reason": np.array(reason, dtype=np.str_),
        }


def read_part(
    journal: PartJournal, reading: Reading, part: Part, report: Callable[[int], None]
) -> None:
    """Read a part from where its journal ends.

    Args:
        journal: Of the part.
        reading: How each frame is taken.
        part: The part.
        report: Is told of each frame.

    Raises:
        UserError: At the first defect, if reading is strict.
    """
    if journal.end is not None:
        return
    done = [journal.load(chunk, "index", "rejected_index") for chunk in journal.chunks]
    skipped = sum(len(table["index"]) + len(table["rejected_index"]) for table in done)
    number, chunk, position = len(done), Chunk(), part.start - 1
    end: dict[str, Any] = {"chunks": 0, "failed": None}
    records = enumerate(reading.reader().read(part))
    while True:
        try:
            count, record = next(records)
        except StopIteration:
            break
        except Exception as error:
            _raise_of_machine(error)
            end["failed"] = {"index": position + 1, "reason": reason_of(error)}
            if reading.strict:
                raise UserError(
                    f"{part.paths[0]}, from frame {position + 1} on: {reason_of(error)}"
                ) from error
            break
        position = record.index
        if count < skipped:
            continue
        _take(record, reading, chunk, part)
        report(1)
        if chunk.full:
            if number == 0 and reading.check_units:
                _check_scales(chunk, part)
            journal.add(number, chunk.rows, chunk.table())
            number, chunk = number + 1, Chunk()
    if chunk.n_records:
        journal.add(number, chunk.rows, chunk.table())
        number += 1
    journal.finish({**end, "chunks": number})


def _check_scales(chunk: Chunk, part: Part) -> None:
    """Judge the units by the first frames: in the end, which does it again, hours may be lost."""
    try:
        checks.check_scales(
            np.array([facts.force_rms for facts in chunk.facts]),
            np.array([facts.stress_rms for facts in chunk.facts]),
        )
    except UserError as error:
        raise UserError(f"{part.paths[0]}, first {len(chunk.facts)} frames: {error}") from error


def hash_file(note: Path, path: Path, report: Callable[[int], None]) -> None:
    """Note size and SHA-256 of a source file."""
    if note.exists():
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            report(0)
        size = file.tell()
    content = {"path": str(path), "size": size, "sha256": digest.hexdigest()}
    write_whole(note, json.dumps(content).encode())


def _take(record: Record, reading: Reading, chunk: Chunk, part: Part) -> None:
    """Build a record and put it into the chunk, or among the rejected."""
    try:
        atoms, group = accepted(record, reading)
        chunk.add(record, atoms, group)
    except Exception as error:  # readers raise of every type
        _raise_of_machine(error)
        if reading.strict:
            place = f"frame {record.index}" + (f" ({record.name})" if record.name else "")
            raise UserError(f"{part.paths[0]}, {place}: {reason_of(error)}") from error
        chunk.rejected.append((record.index, record.name, reason_of(error)))


def accepted(record: Record, reading: Reading) -> tuple[Atoms, str]:
    """Build a record and check it.

    Returns:
        The structure with its labels, and its group for the split, which may be empty.

    Raises:
        UserError: If it cannot be learned from.
    """
    atoms = record.build()
    checks.check_structure(
        atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, check_units=reading.check_units
    )
    results = atoms.calc.results if atoms.calc is not None else {}
    if reading.labelled or results:
        for name in ("energy", "forces"):
            if results.get(name) is None:
                raise UserError(
                    f"no {name}; remove the structure (or convert all without labels, --unlabelled)"
                )
        results["forces"] = np.asarray(results["forces"], dtype=float)
        checks.check_labels(
            len(atoms),
            energy=results["energy"],
            forces=results["forces"],
            stress=results.get("stress"),
            check_units=reading.check_units,
        )
    elif atoms.calc is not None:
        atoms.calc = None
    if reading.split_key is None:
        return atoms, ""
    if reading.split_key not in atoms.info:
        raise UserError(f"no info key {reading.split_key!r} to split by; {keys_of(atoms, 'info')}")
    return atoms, str(atoms.info[reading.split_key])


def id_hash(identity: str | None) -> int:
    """64 bits of an id, 0 for none; two of 10^8 share a value with a chance of 1 in 2,000."""
    if identity is None:
        return 0
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "little") | 1


def reason_of(error: Exception) -> str:
    """One line on an exception, whatever a damaged or hostile file makes it say."""
    if isinstance(error, UserError):
        reason = " ".join(str(error).split())
    else:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
    if len(reason) > MAX_REASON:
        reason = f"{reason[:MAX_REASON]} ..."
    return reason.encode(errors="backslashreplace").decode()


def _raise_of_machine(error: BaseException | None) -> None:
    """Raise what is no defect of the data, also if a reader put it into its own words."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in SYSTEM_ERRORS:
            raise error
        error = error.__cause__
