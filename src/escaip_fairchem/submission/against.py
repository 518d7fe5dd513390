"""Compare a split of a file with its data set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from escaip_fairchem.submission.known import Known
    from escaip_fairchem.submission.report import Report


def compare_ids(
    report: Report, split: str, ids: np.ndarray, known: Known, any_order: bool
) -> np.ndarray | None:
    """Find each id in the data set.

    Args:
        report: Where findings go.
        split: Name of the split.
        ids: Of the file, (n,) str.
        known: The data set.
        any_order: Accept another order than that of the data set.

    Returns:
        The place of each structure of the file in the data set, (n,); None unless each structure
        of the data set is there once.
    """
    kinds = {"sid": known.sid, "sid_fid": known.sid_fid}
    shared = {name: int(np.isin(ids, values).sum()) for name, values in kinds.items()}
    kind = max(shared, key=shared.get)
    names = kinds[kind]
    order = np.argsort(names, kind="stable")
    places = order[np.minimum(np.searchsorted(names, ids, sorter=order), len(names) - 1)]
    foreign = names[places] != ids
    absent = np.setdiff1d(names, ids)
    if foreign.any():
        report.problems.append(
            f"{split}_ids: {foreign.sum():,} are not in the data set, first {ids[foreign][0]}"
        )
    if len(absent):
        first = names[np.isin(names, absent)][0]
        report.problems.append(f"{split}_ids: {len(absent):,} are missing, first {first}")
    if kind == "sid" and len(np.unique(names)) < len(names):
        report.problems.append(
            f"{split}_ids: ids are sid, which several structures share; join sid and fid by _"
        )
        return None
    if foreign.any() or len(absent) or len(ids) != len(names):
        return None
    moved = places != np.arange(len(places))
    if moved.any() and not any_order:
        report.problems.append(
            f"{split}_ids: {moved.sum():,} are in another order than in the data set, first "
            f"{ids[moved][0]}; with --any-order this is accepted"
        )
    return places


def compare_sizes(
    report: Report, split: str, ids: np.ndarray, sizes: np.ndarray, expected: dict[str, np.ndarray]
) -> bool:
    """Compare how many forces each structure has with the data set.

    Args:
        report: Where findings go.
        split: Name of the split.
        ids: Of the file, (n,) str.
        sizes: Forces of each structure of the file, (n,).
        expected: The same by the data set, first as wanted, then for the other choice of atoms.

    Returns:
        Whether they are as wanted.
    """
    (wanted, by_data), (other, by_other) = expected.items()
    wrong = sizes != by_data
    if not wrong.any():
        return True
    if np.array_equal(sizes, by_other):
        report.problems.append(
            f"{split}_forces are those of {other} atoms, {wanted} are expected; with --atoms "
            f"{other} this is accepted"
        )
        return False
    first = int(np.argmax(wrong))
    hint = ""
    if np.array_equal(np.sort(sizes), np.sort(by_data)):
        hint = ": ids or forces have changed places"
    report.problems.append(
        f"{split}_chunk_idx: {wrong.sum():,} structures have another number of forces than in the "
        f"data set, first {ids[first]} with {sizes[first]}, not {by_data[first]}{hint}"
    )
    return False


def compare_fixed(report: Report, split: str, forces: np.ndarray, fixed: np.ndarray) -> None:
    """Compare which forces are zero with the atoms held in place.

    Args:
        report: Where findings go.
        split: Name of the split.
        forces: Of all atoms, (N, 3).
        fixed: Held in place, in the order of the file, (N,) bool.
    """
    if not fixed.any():
        return
    zero = ~forces.any(axis=1)
    zero_of_fixed = zero[fixed].mean()
    elsewhere = int((zero & ~fixed).sum())
    if zero_of_fixed < 1 and zero[fixed].any() and elsewhere:
        report.problems.append(
            f"{split}_forces: {(~zero & fixed).sum():,} of {fixed.sum():,} atoms held in place "
            f"have forces, {elsewhere:,} free ones have none: rows have changed places"
        )
    elif elsewhere > 0.01 * (~fixed).sum():
        report.remarks.append(f"{split}_forces: {elsewhere:,} free atoms have none at all")
    norms = np.linalg.norm(forces, axis=1)
    free = norms[~fixed].mean() if (~fixed).any() else 0.0
    report.table.append(
        f"{split}: mean force {norms[fixed].mean():.4g} eV/A of {fixed.sum():,} atoms held in "
        f"place ({zero_of_fixed:.0%} are zero), {free:.4g} of the free ones"
    )
