"""What a conversion has done so far, so that it goes on there after a kill at any moment.

Beside OUT, in the hidden folder ``.OUT.partial``: ``plan.json`` says what is converted, and each
part has a folder of chunks. A chunk is a file of encoded rows and a table of what is remembered of
them; it counts from the moment that the table gets its name. ``new`` becomes OUT in the end.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.errors import UserError
from escaip_fairchem.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Interrupted(UserError):
    """A conversion stopped for a reason that goes away; the same command continues it."""


@dataclass(frozen=True)
class PartJournal:
    """The chunks of one part.

    Attributes:
        folder: Where they are.
    """

    folder: Path

    def rows(self, chunk: int) -> Path:
        """Encoded rows, one after the other."""
        return self.folder / f"{chunk:05d}.rows"

    def table(self, chunk: int) -> Path:
        """What is remembered of the rows."""
        return self.folder / f"{chunk:05d}.npz"

    @property
    def chunks(self) -> list[int]:
        """Numbers of the complete chunks."""
        return list(range(len(list(self.folder.glob("*.npz")))))

    @property
    def end(self) -> dict[str, Any] | None:
        """How the part ended, if it did."""
        path = self.folder / "end.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def finish(self, end: dict[str, Any]) -> None:
        """Note that the part is read."""
        write_whole(self.folder / "end.json", json.dumps(end).encode())

    def add(self, chunk: int, rows: list[bytes], table: dict[str, np.ndarray]) -> None:
        """Keep a chunk."""
        write_whole(self.rows(chunk), b"".join(rows))
        packed = io.BytesIO()
        offsets = np.cumsum([0, *map(len, rows)])
        np.savez_compressed(packed, offsets=offsets, **table)
        write_whole(self.table(chunk), packed.getvalue())

    def load(self, chunk: int, *names: str) -> dict[str, np.ndarray]:
        """Read columns of a chunk's table, all by default."""
        with np.load(self.table(chunk)) as table:
            return {name: table[name] for name in names or table.files}


@dataclass(frozen=True)
class Journal:
    """The folder of a conversion.

    Attributes:
        out: The folder to make.
    """

    out: Path

    @property
    def folder(self) -> Path:
        """Where the work is kept."""
        return self.out.with_name(f".{self.out.name}.partial")

    @property
    def new(self) -> Path:
        """What becomes ``out``."""
        return self.folder / "new"

    @property
    def old(self) -> Path:
        """What was ``out`` before."""
        return self.folder / "old"

    def part(self, number: int) -> PartJournal:
        """The journal of a part."""
        return PartJournal(self.folder / "parts" / f"{number:06d}")

    def read(self, name: str) -> Any:
        """A note by its name, None if there is none."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def note(self, name: str, content: Any) -> None:
        """Write a note."""
        write_whole(self.folder / f"{name}.json", json.dumps(content).encode())

    def notes(self, folder: str) -> list[Any]:
        """All notes of a folder, in order of their names."""
        return [json.loads(p.read_text()) for p in sorted((self.folder / folder).glob("*.json"))]

    def n_records(self, n_parts: int) -> int:
        """Frames that are read already."""
        parts = [self.part(number) for number in range(n_parts)]
        return sum(len(p.load(k, "id")["id"]) for p in parts for k in p.chunks)

    @property
    def published(self) -> bool:
        """Whether ``out`` is complete, and only the work was not removed yet."""
        return self.read("summary") is not None and not self.new.exists() and self.out.exists()

    def publish(self) -> None:
        """Put ``new`` in the place of ``out``."""
        if self.out.exists():
            os.replace(self.out, self.old)
        try:
            os.replace(self.new, self.out)
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Put back what was ``out``, if it was moved away."""
        if self.old.exists() and not self.out.exists():
            os.replace(self.old, self.out)


def is_published(out: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether an interrupted run of this very conversion completed ``out`` before its end."""
    journal = Journal(out)
    return journal.published and journal.read("plan") == fingerprint


@contextmanager
def open_journal(out: Path, fingerprint: dict[str, Any], overwrite: bool) -> Iterator[Journal]:
    """Begin a conversion, or go on with it.

    The work is removed at the end, and after a mistake of the user; it stays after everything else.

    Args:
        out: The folder to make.
        fingerprint: What the work depends on.
        overwrite: Whether work with another fingerprint is thrown away.

    Raises:
        UserError: If another process converts into ``out``, or the work has another fingerprint.
    """
    journal = Journal(out)
    with _locked(journal):
        plan = journal.read("plan")
        if plan is not None and plan != fingerprint:
            if not overwrite:
                raise UserError(
                    f"an interrupted conversion into {out} had {_difference(plan, fingerprint)}; "
                    "repeat its command to go on with it, or pass --overwrite to start anew"
                )
            journal.restore()
            for path in journal.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
            plan = None
        if plan is None:
            journal.note("plan", fingerprint)
        try:
            yield journal
        except Interrupted:
            raise
        except UserError:
            journal.restore()
            shutil.rmtree(journal.folder)
            raise
        shutil.rmtree(journal.folder)


@contextmanager
def _locked(journal: Journal) -> Iterator[None]:
    """Hold the folder of a conversion; the system lets go of it when the process dies."""
    lock = None
    while lock is None:
        lock = _try_lock(journal)
    with lock:
        yield


def _try_lock(journal: Journal) -> IO | None:
    """Lock the folder; None if the one before removed it at the same moment."""
    try:
        journal.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{journal.folder} cannot be made ({error.strerror}); choose another OUT"
        ) from error
    try:
        lock = (journal.folder / "lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock if os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name)) else None
    except FileNotFoundError:
        return None
    except BlockingIOError:
        raise UserError(
            f"another process is converting into {journal.out}; wait for it, or choose another "
            "folder"
        ) from None


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Say what differs between two fingerprints."""
    changed = [key for key in now if before.get(key) != now[key]]
    options = [key for key in changed if key not in ("parts", "files")]
    if options:
        return f"other options ({', '.join(options)})"
    for name in {**before["files"], **now["files"]}:
        if before["files"].get(name) != now["files"].get(name):
            return f"other inputs ({name} is new, gone or changed)"
    return "the inputs in another order"
