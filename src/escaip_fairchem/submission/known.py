"""What a data set says about a test split: names, sizes, and which atoms are held in place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from escaip_fairchem.submission.boards import Board


@dataclass(frozen=True)
class Known:
    """The structures of a split, in the order of the data set.

    Attributes:
        sid: Systems, (n,) str.
        fid: Frames, (n,) str, empty where there is none.
        natoms: Atoms, (n,).
        fixed: Which are held in place, (N,) bool.
    """

    sid: np.ndarray
    fid: np.ndarray
    natoms: np.ndarray
    fixed: np.ndarray

    @property
    def sid_fid(self) -> np.ndarray:
        """The other form of ids."""
        return np.char.add(np.char.add(self.sid, "_"), self.fid)

    @property
    def free(self) -> np.ndarray:
        """Atoms that are not held in place, of each structure, (n,)."""
        starts = np.cumsum(self.natoms) - self.natoms
        return np.add.reduceat(~self.fixed, starts, dtype=np.int64)


def find_splits(places: Sequence[str], board: Board) -> dict[str, str]:
    """Where the data of each split of a board are.

    Args:
        places: A folder that holds one for each split, called as the split or ``test_SPLIT``,
            or words ``SPLIT=PATH``.
        board: The leaderboard.

    Raises:
        UserError: A split is not there, or unknown.
    """
    found = dict(place.split("=", 1) for place in places if "=" in place)
    for name in found:
        if name not in board.splits:
            raise UserError(f"{board.title} has no split {name}: {', '.join(board.splits)}")
    for folder in (Path(place) for place in places if "=" not in place):
        for split in board.splits:
            of_split = (folder / split, folder / f"test_{split}")
            # `escaip convert --unlabelled OUT` writes OUT/test
            candidates = [path for each in of_split for path in (each / "test", each)]
            existing = [str(path) for path in candidates if path.is_dir()]
            if existing:
                found.setdefault(split, existing[0])
    absent = [split for split in board.splits if split not in found]
    if absent:
        raise UserError(
            f"no data of split {absent[0]} in {' '.join(places)}: give a folder that holds "
            f"{absent[0]} or test_{absent[0]}, or --dataset {absent[0]}=PATH"
        )
    return {split: found[split] for split in board.splits}


def read_known(split: str, sources: Mapping[str, str]) -> Known:
    """Read what a data set says about a split.

    Args:
        split: Name of the split.
        sources: Paths of all splits, as `escaip_fairchem.data.datasets.create_dataset` takes them.

    Raises:
        UserError: No data there, or structures without ``sid``.
    """
    from tqdm import tqdm

    from escaip_fairchem.data.frames import free_atoms
    from escaip_fairchem.predict.data import Structures

    dataset = Structures({split: sources[split]}, "test").splits[split]
    sid, fid, natoms, fixed = [], [], [], []
    for row in tqdm(range(len(dataset)), desc=f"read {split}", unit=" structures", disable=None):
        atoms = dataset.get_atoms(row)
        if "sid" not in atoms.info:
            raise UserError(f"{sources[split]}, structure {row} has no sid, so nothing to name it")
        sid.append(str(atoms.info["sid"]))
        fid.append(str(atoms.info.get("fid", "")))
        natoms.append(len(atoms))
        fixed.append(~free_atoms(atoms))
    return Known(np.array(sid), np.array(fid), np.array(natoms), np.concatenate(fixed))
