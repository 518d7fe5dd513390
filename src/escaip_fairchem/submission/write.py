"""From predictions to the file of a leaderboard, part by part: memory does not grow with the data.

Equal predictions give equal bytes.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.errors import UserError
from escaip_fairchem.files import whole_file
from escaip_fairchem.predict.parts import Plan, missing, part_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from escaip_fairchem.submission.boards import Board

ID_FORMATS = ("auto", "sid", "sid_fid")
ATOMS = ("all", "free")
FIXED_FORCES = ("zero", "predicted")


def write_submission(
    folder: str | Path,
    board: Board,
    path: str | Path,
    *,
    ids: str = "auto",
    atoms: str = "all",
    fixed_forces: str = "zero",
) -> dict[str, str]:
    """Write the file of a leaderboard, whole or not at all.

    Args:
        folder: Predictions (`escaip_fairchem.predict.parts`) of the board's splits, all there.
        board: The leaderboard.
        path: The file to write.
        ids: ``sid``, ``sid_fid`` (joined by an underscore), or ``auto``: ``sid`` if that names
            each structure of a split, in all splits, else ``sid_fid``.
        atoms: ``all``, or ``free`` for those that are not held in place.
        fixed_forces: With all atoms, those of atoms held in place: ``zero``, as ASE gives them and
            so the published example, or as ``predicted``.

    Returns:
        What was chosen: ``ids``, ``atoms`` and ``fixed_forces``.

    Raises:
        UserError: A part or a split is missing, ids are not unique, or a setting is unknown.
    """
    for name, value, known in (
        ("ids", ids, ID_FORMATS), ("atoms", atoms, ATOMS),
        ("fixed_forces", fixed_forces, FIXED_FORCES),
    ):  # fmt: skip
        if value not in known:
            raise UserError(f"{name}={value}; choose one of {', '.join(known)}")
    folder, path = Path(folder), Path(path)
    plan = Plan.read(folder)
    _require_complete(folder, plan, board)
    names = {split: _names(folder, plan, split) for split in board.splits}
    if ids == "auto":
        unique = all(len(np.unique(sid)) == len(sid) for sid, _ in names.values())
        ids = "sid" if unique else "sid_fid"
    with whole_file(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        for split in board.splits:
            values = _ids(split, *names.pop(split), ids)
            _put(archive, f"{split}_ids", values.dtype, values.shape, [values])
            energies = (part["energy"] for part in _read(folder, plan, split, ["energy"]))
            _put(archive, f"{split}_energy", np.float32, values.shape, energies)
            if board.forces:
                _put_forces(archive, folder, plan, split, atoms, fixed_forces == "zero")
    return {"ids": ids, "atoms": atoms, "fixed_forces": fixed_forces}


def _require_complete(folder: Path, plan: Plan, board: Board) -> None:
    absent = [split for split in board.splits if split not in plan.splits]
    if absent:
        raise UserError(
            f"{folder} has no predictions of {', '.join(absent)}: {board.title} takes all of "
            f"{', '.join(board.splits)}; set splits.{absent[0]}=PATH"
        )
    todo = missing(folder)
    if todo:
        raise UserError(
            f"{folder} lacks {len(todo)} of {len(plan.parts())} parts, first "
            f"{part_path(folder, *todo[0]).name} of {todo[0][0]}; the same command again goes on"
        )


def _read(
    folder: Path, plan: Plan, split: str, names: list[str]
) -> Iterator[dict[str, np.ndarray]]:
    """Some arrays of each part of a split, in the order of its rows."""
    for of_split, index in plan.parts():
        if of_split == split:
            with np.load(part_path(folder, split, index)) as stored:
                yield {name: stored[name] for name in names}


def _names(folder: Path, plan: Plan, split: str) -> tuple[np.ndarray, np.ndarray]:
    """System and frame of each structure, (n,) str each."""
    parts = list(_read(folder, plan, split, ["row", "sid", "fid"]))
    rows, sid, fid = (np.concatenate([part[name] for part in parts]) for name in parts[0])
    if not np.array_equal(rows, np.arange(plan.splits[split].rows)):
        raise UserError(f"{folder / split}: the parts hold other rows than planned; remove them")
    return sid, fid


def _ids(split: str, sid: np.ndarray, fid: np.ndarray, kind: str) -> np.ndarray:
    """Names for the leaderboard, (n,) str."""
    if kind == "sid_fid":
        if (fid == "").any():
            raise UserError(
                f"split {split}: structure {np.argmax(fid == '')} has no fid, which ids=sid_fid "
                "needs (and ids=auto where several structures have one sid); store it under "
                "info['fid']"
            )
        sid = np.char.add(np.char.add(sid, "_"), fid)
    values, first, count = np.unique(sid, return_index=True, return_counts=True)
    if len(values) < len(sid):
        again = values[count > 1][np.argmin(first[count > 1])]
        hint = "; set ids=sid_fid" if kind == "sid" else ""
        raise UserError(
            f"split {split}: {len(sid) - len(values)} ids are there more than once, first {again}"
            + hint
        )
    return sid


def _put_forces(
    archive: zipfile.ZipFile, folder: Path, plan: Plan, split: str, atoms: str, zero: bool
) -> None:
    """Write the forces and where to cut them."""
    sizes = [
        np.add.reduceat(
            ~part["fixed"] if atoms == "free" else np.ones_like(part["fixed"]),
            np.cumsum(part["natoms"]) - part["natoms"],
            dtype=np.int64,
        )
        for part in _read(folder, plan, split, ["natoms", "fixed"])
    ]
    ends = np.cumsum(np.concatenate(sizes))
    forces = (
        _forces(part, atoms, zero) for part in _read(folder, plan, split, ["fixed", "forces"])
    )
    _put(archive, f"{split}_forces", np.float32, (int(ends[-1]), 3), forces)
    _put(archive, f"{split}_chunk_idx", np.int64, (len(ends) - 1,), [ends[:-1]])


def _forces(part: dict[str, np.ndarray], atoms: str, zero: bool) -> np.ndarray:
    """Forces of a part as the leaderboard gets them, (M, 3), eV/A."""
    forces, fixed = part["forces"], part["fixed"]
    if atoms == "free":
        return forces[~fixed]
    return np.where(fixed[:, None], np.float32(0), forces) if zero else forces


def _put(
    archive: zipfile.ZipFile, name: str, dtype: Any, shape: tuple, pieces: Iterable[np.ndarray]
) -> None:
    """Write one array, piece by piece, as ``np.savez`` does."""
    dtype = np.dtype(dtype)
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype).tobytes())
