"""From the chunks of a conversion to the folder that fairchem trains from.

Rows are copied as they are. The order of frames is that of the inputs, whoever read them.
"""

from __future__ import annotations

import csv
import shutil
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from escaip_fairchem.data import checks, store
from escaip_fairchem.data.facts import Statistics
from escaip_fairchem.data.pool import run_tasks
from escaip_fairchem.data.rows import write_rows
from escaip_fairchem.data.summary import REJECTED_FILE
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from escaip_fairchem.data.journal import Journal, PartJournal
    from escaip_fairchem.data.plan import Plan


@dataclass(frozen=True)
class Rejection:
    """A record that was left out; ``rest`` if all after it were too."""

    path: Path
    index: int
    name: str
    reason: str
    rest: bool = False

    def __str__(self) -> str:
        """Place and reason in one line."""
        frame = f"frame {self.index}" + (f" ({self.name})" if self.name else "")
        place = f"from {frame} on" if self.rest else frame
        return f"{self.path}, {place}: {self.reason}"


class Frames:
    """All frames that were read, in order: what is needed of all of them at once.

    Attributes:
        kept: Which of them go into the set, (N,) bool.
    """

    def __init__(self, plan: Plan, journal: Journal) -> None:
        """Collect the chunks."""
        self._plan = plan
        self._parts = [journal.part(number) for number in range(len(plan.parts))]
        self.chunks = [
            (number, chunk)
            for number, part in enumerate(self._parts)
            for chunk in range(part.end["chunks"])
        ]
        sizes = [len(self.load(k, "id")["id"]) for k in range(len(self.chunks))]
        self.starts = np.cumsum([0, *sizes])
        self.kept = np.ones(self.starts[-1], dtype=bool)
        self._duplicates: list[tuple[int, int]] = []

    def __len__(self) -> int:
        """Number of frames, kept or not."""
        return len(self.kept)

    def part(self, chunk: int) -> PartJournal:
        """The journal that a chunk belongs to."""
        return self._parts[self.chunks[chunk][0]]

    def load(self, chunk: int, *names: str) -> dict[str, np.ndarray]:
        """Columns of a chunk."""
        return self.part(chunk).load(self.chunks[chunk][1], *names)

    def column(self, name: str, dtype: type) -> np.ndarray:
        """A column of all frames, (N,)."""
        values = np.empty(len(self), dtype=dtype)
        for chunk, (start, stop) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            values[start:stop] = self.load(chunk, name)[name]
        return values

    @cached_property
    def in_val_files(self) -> np.ndarray:
        """Which frames are of official validation files, (N,) bool."""
        sides = [self._plan.is_val[number] for number, _ in self.chunks]
        return np.repeat(np.array(sides, dtype=bool), np.diff(self.starts))

    def groups(self) -> np.ndarray:
        """Number of each frame's group, (N,), in order of first appearance."""
        codes: dict[str, int] = {}
        values = np.empty(len(self), dtype=np.int32)
        for chunk, (start, stop) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            table = self.load(chunk, "groups", "group_of")
            known = [codes.setdefault(group, len(codes)) for group in table["groups"].tolist()]
            values[start:stop] = np.array(known, dtype=np.int32)[table["group_of"]]
        return values

    def drop_duplicates(self) -> None:
        """Keep the first of the frames that share an id, on either side."""
        ids = self.column("id", np.uint64)
        for side in (False, True):
            members = np.flatnonzero((ids != 0) & (self.in_val_files == side))
            order = members[np.argsort(ids[members], kind="stable")]
            new = np.append(True, ids[order][1:] != ids[order][:-1])[: len(order)]
            first = order[new][np.cumsum(new) - 1]
            self._duplicates += zip(order[~new].tolist(), first[~new].tolist(), strict=True)
        self._duplicates.sort()
        self.kept[[frame for frame, _ in self._duplicates]] = False

    def rejections(self) -> Iterator[Rejection]:
        """What was left out, in order; duplicates last."""
        chunk = 0
        for number, part in enumerate(self._parts):
            path, end = self._plan.parts[number].paths[0], part.end
            for _ in range(end["chunks"]):
                table = self.load(chunk, "rejected_index", "rejected_name", "rejected_reason")
                for index, name, reason in zip(*table.values(), strict=True):
                    yield Rejection(path, int(index), str(name), str(reason))
                chunk += 1
            if end["failed"]:
                yield Rejection(path, end["failed"]["index"], "", end["failed"]["reason"], True)
        for frame, first in self._duplicates:
            path, index, name = self._place(frame)
            other, other_index, _ = self._place(first)
            reason = f"same id as {other}, frame {other_index}"
            yield Rejection(path, index, name, reason)

    def _place(self, frame: int) -> tuple[Path, int, str]:
        """File, index and name of a frame."""
        chunk = int(np.searchsorted(self.starts, frame, side="right")) - 1
        table, row = self.load(chunk, "index", "name"), frame - self.starts[chunk]
        path = self._plan.parts[self.chunks[chunk][0]].paths[0]
        return path, int(table["index"][row]), str(table["name"][row])

    def check_scales(self) -> None:
        """Judge the units of the whole set."""
        forces, stresses = (
            self.column(name, np.float32)[self.kept] for name in ("force_rms", "stress_rms")
        )
        checks.check_scales(forces, stresses)

    @property
    def n_duplicates(self) -> int:
        """Frames that were dropped for their id."""
        return len(self._duplicates)

    def residuals(
        self, sides: dict[str, np.ndarray], energies: np.ndarray
    ) -> dict[str, tuple[float, float, float]]:
        """Smallest, largest and rms energy above those of the elements, (120,), eV, by side."""
        found = {}
        for name, chosen in sides.items():
            low, high, squares, count = np.inf, -np.inf, 0.0, 0
            for chunk, (start, stop) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
                table, mask = self.load(chunk, "energy", "counts", "elements"), chosen[start:stop]
                if mask.any():
                    rest = table["energy"] - table["counts"] @ energies[table["elements"]]
                    low, high = min(low, rest[mask].min()), max(high, rest[mask].max())
                    squares, count = squares + float(rest[mask] @ rest[mask]), count + mask.sum()
            found[name] = (float(low), float(high), float((squares / count) ** 0.5))
        return found

    def pieces(self, frames: np.ndarray) -> list[tuple[PartJournal, int, np.ndarray]]:
        """Cut frames, (M,) ascending, at the chunks: journal, chunk, rows in it."""
        owner = np.searchsorted(self.starts, frames, side="right") - 1
        cuts = np.flatnonzero(np.diff(owner)) + 1
        return [
            (self.part(int(k[0])), self.chunks[int(k[0])][1], some - self.starts[k[0]])
            for k, some in zip(np.split(owner, cuts), np.split(frames, cuts), strict=True)
        ]


def write_side(
    folder: Path, frames: Frames, chosen: np.ndarray, workers: int, report: Callable[[int], None]
) -> Statistics:
    """Write the frames of one side, (N,) bool, and their metadata.

    Shards that are there already are complete and stay.

    Returns:
        The statistics of these frames.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for rest in folder.glob(".*.partial*"):
        rest.unlink()
    members = np.flatnonzero(chosen)
    tasks: list[tuple] = []
    for number, (start, stop) in enumerate(store.shard_bounds(len(members))):
        path = folder / store.shard_name(number)
        if path.exists():
            report(stop - start)
        else:
            tasks.append((write_shard, (path, frames.pieces(members[start:stop]))))
    run_tasks(tasks, workers, report)
    statistics, natoms, mean_force = Statistics(), [], []
    for chunk, (start, stop) in enumerate(zip(frames.starts, frames.starts[1:], strict=False)):
        table, mask = frames.load(chunk), chosen[start:stop]
        statistics.add(table, mask)
        natoms.append(table["natoms"][mask])
        mean_force.append(table["mean_force"][mask])
    forces = np.concatenate(mean_force)
    per_frame = {"mean_force": forces} if np.isfinite(forces).all() else {}
    store.write_metadata(folder, np.concatenate(natoms), **per_frame)
    return statistics


def write_shard(
    path: Path,
    pieces: list[tuple[PartJournal, int, np.ndarray]],
    report: Callable[[int], None],
) -> None:
    """Write rows of chunks into one file."""
    spans = [(part.rows(k), part.load(k, "offsets")["offsets"], rows) for part, k, rows in pieces]

    def encoded() -> Iterator[bytes]:
        for source, offsets, rows in spans:
            with source.open("rb") as file:
                for row in rows:
                    file.seek(offsets[row])
                    yield file.read(offsets[row + 1] - offsets[row])
                    report(1)

    n_bytes = sum(int((offsets[rows + 1] - offsets[rows]).sum()) for _, offsets, rows in spans)
    write_rows(path, encoded(), sum(len(rows) for *_, rows in spans), n_bytes)


def write_rejections(folder: Path, frames: Frames) -> tuple[int, Rejection | None]:
    """Write ``rejected.csv`` if there is anything to tell; returns their number and the first."""
    path, count, first = folder / REJECTED_FILE, 0, None
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "index", "name", "reason"])
        for rejection in frames.rejections():
            first = first or rejection
            count += 1
            reason = f"all from here on: {rejection.reason}" if rejection.rest else rejection.reason
            writer.writerow([rejection.path, rejection.index, rejection.name, reason])
    if not count:
        path.unlink()
    return count, first


def fresh_folder(journal: Journal, choice: dict) -> Path:
    """Where the set is put together; what an interrupted run wrote for another choice goes."""
    if journal.read("choice") != choice:
        if journal.new.exists():
            shutil.rmtree(journal.new)
        journal.note("choice", choice)
    journal.new.mkdir(exist_ok=True)
    return journal.new


def refuse_nothing(frames: Frames) -> None:
    """Raise if no frame is kept, with the first reason.

    Raises:
        UserError: If so.
    """
    if not frames.kept.any():
        first = next(frames.rejections(), None)
        raise UserError(
            f"{first} (no frame could be used)" if first else "the inputs hold no frame"
        )
