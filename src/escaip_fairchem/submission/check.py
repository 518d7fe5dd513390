"""Check a file before it is submitted."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from escaip_fairchem.submission import against, numbers
from escaip_fairchem.submission.boards import Board, board_of
from escaip_fairchem.submission.reading import Archive
from escaip_fairchem.submission.report import Report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from escaip_fairchem.submission.known import Known

GIB = 2**30


@dataclass(frozen=True)
class Expectations:
    """What a file is checked against.

    Attributes:
        board: The leaderboard; None takes the one that the arrays' names fit best.
        dataset: Folder of the test splits, or ``SPLIT=PATH`` for each; empty for none.
        atoms: ``all`` or ``free``: whose forces the file has.
        any_order: Accept another order than that of the data set.
        max_gib: Largest size of the file, GiB; None for any.
    """

    board: Board | None = None
    dataset: Sequence[str] = ()
    atoms: str = "all"
    any_order: bool = False
    max_gib: float | None = None


@dataclass
class _Split:
    """Arrays of a split that fit together; None where they do not."""

    ids: np.ndarray | None = None
    energy: np.ndarray | None = None
    forces: np.ndarray | None = None
    ends: np.ndarray | None = None


@dataclass
class _Seen:
    """What is kept of the splits before, to compare the next with."""

    ids: dict[str, np.ndarray] = field(default_factory=dict)
    energy: dict[str, np.ndarray] = field(default_factory=dict)
    numbers: dict[str, numbers.SplitNumbers] = field(default_factory=dict)


def check(path: str | Path, expected: Expectations | None = None) -> Report:
    """Check a file: arrays, ids, sizes, numbers, and the data set if one is given.

    Args:
        path: The file.
        expected: What to check it against.

    Raises:
        UserError: There is no such file, or no data set.
    """
    expected = expected or Expectations()
    path, report, seen = Path(path), Report(), _Seen()
    archive = Archive(path)
    board = expected.board or board_of(archive.entries)
    sources = {}
    if expected.dataset:
        from escaip_fairchem.submission.known import find_splits, read_known

        sources = find_splits(expected.dataset, board)
    _check_file(report, archive, board, expected.max_gib)
    for split in board.splits:
        arrays = _load(report, archive, board, split)
        _check_seen(report, split, arrays, seen)
        _check_numbers(report, split, board, arrays, expected.atoms == "all", seen)
        if sources and arrays.ids is not None:
            _check_known(report, split, arrays, read_known(split, sources), expected)
    notes, report.table = report.table[1:], report.table[:1]
    numbers.compare_splits(report, seen.numbers)
    report.table += notes
    return report


def _check_file(report: Report, archive: Archive, board: Board, max_gib: float | None) -> None:
    """Names of the arrays, and the size of the file."""
    size = archive.path.stat().st_size
    report.table.append(f"{archive.path}: {board.title}, {size / 2**20:,.1f} MiB")
    if max_gib is not None and size > max_gib * GIB:
        report.problems.append(f"the file has {size / GIB:.3f} GiB, more than {max_gib:g}")
    keys = board.keys()
    for name in archive.twice:
        report.problems.append(f"{name} is there more than once")
    for name in keys:
        if name not in archive.entries:
            report.problems.append(f"{name} is missing")
    for name in archive.entries:
        if name not in keys:
            near = difflib.get_close_matches(name, keys, n=1)
            hint = f" (instead of {near[0]}?)" if near and near[0] not in archive.entries else ""
            report.problems.append(f"{name} is no array of {board.title}{hint}")


def _load(report: Report, archive: Archive, board: Board, split: str) -> _Split:
    """Load the arrays of a split, and say what is wrong with each."""
    found = _Split()
    loaded = {}
    for name in board.fields:
        key = f"{split}_{name}"
        if key not in archive.entries:
            continue
        loaded[name] = archive.load(key)
        if loaded[name] is None:
            report.problems.append(f"{key} {archive.entries[key].error}")
    found.ids = _ids(report, f"{split}_ids", loaded.get("ids"))
    found.energy = _values(report, f"{split}_energy", loaded.get("energy"), ())
    if found.ids is not None and found.energy is not None and len(found.ids) != len(found.energy):
        report.problems.append(
            f"{split}_energy has {len(found.energy):,} values for {len(found.ids):,} ids"
        )
        found.energy = None
    found.forces = _values(report, f"{split}_forces", loaded.get("forces"), (3,))
    if found.forces is not None and found.ids is not None:
        cuts = loaded.get("chunk_idx")
        found.ends = _ends(report, f"{split}_chunk_idx", cuts, len(found.ids), len(found.forces))
    return found


def _ids(report: Report, key: str, ids: np.ndarray | None) -> np.ndarray | None:
    """Ids as strings, if they are usable."""
    if ids is None:
        return None
    if ids.ndim != 1 or not len(ids):
        report.problems.append(f"{key} has shape {ids.shape}, not (n,)")
        return None
    if ids.dtype.kind not in "Uiu":
        report.problems.append(f"{key} is of type {ids.dtype}: strings are expected")
        return None
    ids = ids.astype(str)
    if ((np.char.strip(ids) != ids) | (ids == "")).any():
        report.problems.append(f"{key}: some ids are empty or have blanks around them")
    values, count = np.unique(ids, return_counts=True)
    if len(values) < len(ids):
        again = values[count > 1]
        report.problems.append(
            f"{key}: {len(ids) - len(values):,} are there more than once, first {again[0]}"
        )
    if len(ids) > 1 and (ids == np.arange(len(ids)).astype(str)).all():
        report.remarks.append(f"{key} are row numbers: has the data set sids?")
    return ids


def _values(
    report: Report, key: str, values: np.ndarray | None, rest: tuple[int, ...]
) -> np.ndarray | None:
    """Predictions, if they have the right type and shape."""
    if values is None:
        return None
    if values.dtype != np.dtype("<f4"):
        report.problems.append(f"{key} is of type {values.dtype}: float32 is expected")
        if values.dtype.kind != "f":
            return None
    if values.ndim != 1 + len(rest) or values.shape[1:] != rest or not len(values):
        wanted = "(N, 3)" if rest else "(n,)"
        turned = " (transposed)" if rest and values.ndim == 2 and values.shape[0] == 3 else ""
        report.problems.append(f"{key} has shape {values.shape}{turned}, not {wanted}")
        return None
    bad = ~np.isfinite(values)
    if bad.any():
        first = int(np.argmax(bad.reshape(len(values), -1).any(axis=1)))
        report.problems.append(f"{key}: {bad.sum():,} values are NaN or infinite, first {first}")
        return None
    numbers.judge_precision(report, key, values)
    return values


def _ends(
    report: Report, key: str, cuts: np.ndarray | None, structures: int, rows: int
) -> np.ndarray | None:
    """Where the forces of each structure end, if the cuts are usable."""
    if cuts is None:
        return None
    if cuts.dtype.kind not in "iu":
        report.problems.append(f"{key} is of type {cuts.dtype}: integers are expected")
        return None
    if cuts.shape != (structures - 1,):
        hint = ""
        if cuts.shape == (structures,):
            hint = ": leave out the " + ("last" if cuts[-1] == rows else "first")
        report.problems.append(
            f"{key} has shape {cuts.shape} for {structures:,} ids, not ({structures - 1},){hint}"
        )
        return None
    ends = np.append(cuts.astype(np.int64), rows)
    sizes = np.diff(ends, prepend=0)
    if (cuts < 0).any() or (cuts > rows).any():
        report.problems.append(f"{key} has cuts outside of 0 to {rows:,}, the rows of forces")
    elif (sizes < 0).any():
        report.problems.append(f"{key} falls, first at {np.argmax(sizes < 0)}: cuts must rise")
    elif (sizes == 0).any():
        report.problems.append(
            f"{key} gives {(sizes == 0).sum():,} structures no forces, "
            f"first {np.argmax(sizes == 0)}"
        )
    else:
        if sizes.max() > numbers.LARGEST_STRUCTURE:
            report.remarks.append(f"{key}: a structure of {sizes.max():,} atoms")
        return ends
    return None


def _check_seen(report: Report, split: str, arrays: _Split, seen: _Seen) -> None:
    """Whether a split has ids or predictions of one before."""
    if arrays.ids is not None:
        for other, ids in seen.ids.items():
            shared = np.intersect1d(ids, arrays.ids)
            if len(shared):
                report.problems.append(
                    f"{split}_ids: {len(shared):,} are in {other}_ids too, first {shared[0]}"
                )
        seen.ids[split] = arrays.ids
    if arrays.energy is not None:
        for other, energy in seen.energy.items():
            if len(energy) > 1 and np.array_equal(energy, arrays.energy):
                report.problems.append(f"{split}_energy equals {other}_energy")
        seen.energy[split] = arrays.energy


def _check_numbers(
    report: Report, split: str, board: Board, arrays: _Split, all_atoms: bool, seen: _Seen
) -> None:
    """Whether the predictions are plausible."""
    if arrays.ids is None or arrays.energy is None or (board.forces and arrays.ends is None):
        return
    found = numbers.measure(arrays.ids, arrays.energy, arrays.forces, arrays.ends)
    seen.numbers[split] = found
    numbers.judge(report, split, board, found, all_atoms)
    if board.forces:
        numbers.judge_shift(report, split, arrays.forces, arrays.ends)


def _check_known(
    report: Report, split: str, arrays: _Split, known: Known, expected: Expectations
) -> None:
    """Whether a split fits its data set."""
    places = against.compare_ids(report, split, arrays.ids, known, expected.any_order)
    if places is None or arrays.ends is None:
        return
    sizes = {"all": known.natoms[places], "free": known.free[places]}
    if expected.atoms == "free":
        sizes = dict(reversed(sizes.items()))
    if not against.compare_sizes(report, split, arrays.ids, np.diff(arrays.ends, prepend=0), sizes):
        return
    if expected.atoms == "all":
        of_atom = np.split(known.fixed, np.cumsum(known.natoms)[:-1])
        fixed = np.concatenate([of_atom[place] for place in places])
        against.compare_fixed(report, split, arrays.forces, fixed)
