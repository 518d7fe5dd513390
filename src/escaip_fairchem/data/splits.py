"""Who is held out: frames at random, whole groups, or frames inside every group.

Each function returns a mask (N,), true for validation, and is deterministic by seed. Groups are
given as one value for each frame, text or numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence


def split_random(n_frames: int, fraction: float, seed: int) -> np.ndarray:
    """Hold out ``fraction`` of the frames, at least one, and leave at least one."""
    if n_frames < 2:
        raise UserError(f"{n_frames} frame cannot be split into train and val; give at least 2")
    mask = np.zeros(n_frames, dtype=bool)
    n_val = min(max(1, round(fraction * n_frames)), n_frames - 1)
    mask[np.random.default_rng(seed).permutation(n_frames)[:n_val]] = True
    return mask


def split_by_group(groups: Sequence[str] | np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Hold out whole groups, in random order, as near to ``fraction`` of the frames as they allow.

    At least one group is held out, and at least one is left.
    """
    members = _members(groups)
    if len(members) < 2:
        raise UserError("all frames have the same value of the split key; choose another key")
    target = fraction * len(groups)
    chosen: list[int] = []
    held_out = 0
    for index in np.random.default_rng(seed).permutation(len(members)):
        size = len(members[index])
        if abs(held_out + size - target) < abs(held_out - target):
            chosen.append(index)
            held_out += size
    if not chosen:  # every group is more than twice the target
        chosen = [min(range(len(members)), key=lambda index: len(members[index]))]
    if len(chosen) == len(members):
        chosen.pop()
    mask = np.zeros(len(groups), dtype=bool)
    mask[np.concatenate([members[index] for index in chosen])] = True
    return mask


def split_within_groups(
    groups: Sequence[str] | np.ndarray, fraction: float, seed: int
) -> np.ndarray:
    """Hold out frames inside every group, at least one where a group has two or more."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(len(groups), dtype=bool)
    for frames in _members(groups):
        n_val = min(max(1, round(fraction * len(frames))), len(frames) - 1)
        mask[rng.permutation(frames)[:n_val]] = True
    if not mask.any():
        raise UserError(
            "every group has a single frame, so none can be held out; choose --split-by"
        )
    return mask


def _members(groups: Sequence[str] | np.ndarray) -> list[np.ndarray]:
    """Frame indices of each group, groups in order of first appearance."""
    _, first, code = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
    order = np.argsort(code, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(code))[:-1])
    return [members[group] for group in np.argsort(first)]
