"""A folder of predictions: ``plan.json``, and one file for each fixed range of rows.

The plan alone decides which rows a file holds, so that the files do not depend on how many
processes made them, nor on how often those were killed. A file appears under its name when it is
complete, and is never made again.

``SPLIT/part-00000.npz`` holds, for n structures with N atoms together:

=============  ===============  ===================================================
``row``        (n,) int64       place in the data set
``natoms``     (n,) int32       atoms
``numbers``    (N,) uint8       atomic numbers
``fixed``      (N,) bool        held in place
``sid``        (n,) str         name of the system
``fid``        (n,) str         its frame, empty where there is none
``subset``     (n,) str         part of the data set it is from, where structures have one
``energy``     (n,) float64     predicted, eV
``forces``     (N, 3) float32   predicted, eV/A
``stress``     (n, 9) float32   predicted, eV/A^3, if the model has it
``*_label``    as these         labels, NaN where a structure has none; absent if no structure has
=============  ===============  ===================================================
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.errors import UserError
from escaip_fairchem.files import whole_file, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PLAN_NAME = "plan.json"
#: Arrays with an entry an atom; all others have one a structure.
PER_ATOM = ("numbers", "fixed", "forces", "positions")


@dataclass(frozen=True)
class Split:
    """One data set of a plan.

    Attributes:
        sources: Its folders or files.
        rows: Structures in it.
        sha256: Of what tells it from other data.
    """

    sources: tuple[str, ...]
    rows: int
    sha256: str


@dataclass(frozen=True)
class Plan:
    """What a folder of predictions is to hold.

    Attributes:
        checkpoint: Path of the inference checkpoint.
        checkpoint_sha256: Of its content.
        task: Data set of the checkpoint whose tasks are predicted.
        part_rows: Structures of a part; the last of a split may have fewer.
        settings: What else predictions depend on, such as the atoms of a batch.
        splits: The data sets by the names of their splits.
    """

    checkpoint: str
    checkpoint_sha256: str
    task: str
    part_rows: int
    settings: dict[str, Any]
    splits: dict[str, Split]

    @classmethod
    def make(cls, **values: Any) -> Plan:
        """Make a plan; arguments as the attributes.

        Raises:
            UserError: If there is nothing to predict, or ``part_rows`` is not positive.
        """
        plan = cls(**values)
        if not plan.splits:
            raise UserError("no data set to predict; set splits.NAME=PATH")
        if plan.part_rows < 1:
            raise UserError(f"part_rows={plan.part_rows}; a part needs at least one row")
        for name in plan.splits:
            if name != Path(name).name or name.startswith("."):
                raise UserError(f"splits.{name}: the name of a split is that of a folder too")
        return plan

    @classmethod
    def read(cls, folder: str | Path) -> Plan:
        """Read the plan of a folder.

        Raises:
            UserError: If there is none.
        """
        path = Path(folder) / PLAN_NAME
        if not path.is_file():
            raise UserError(f"no {PLAN_NAME} in {folder}: no predictions have been started there")
        stored = json.loads(path.read_text())
        stored["splits"] = {
            name: Split(**{**split, "sources": tuple(split["sources"])})
            for name, split in stored["splits"].items()
        }
        return cls(**stored)

    def write(self, folder: str | Path) -> None:
        """Put the plan into a folder, unless an equal one is there.

        Raises:
            UserError: If predictions of another checkpoint, data or settings are there.
        """
        folder = Path(folder)
        path = folder / PLAN_NAME
        if path.is_file():
            self._require_equal(Plan.read(folder), folder)
            return
        write_whole(path, json.dumps(asdict(self), indent=1) + "\n")

    def parts(self) -> list[tuple[str, int]]:
        """All parts: names of splits, and numbers within them."""
        return [
            (name, index)
            for name, split in self.splits.items()
            for index in range(-(-split.rows // self.part_rows))
        ]

    def rows(self, split: str, index: int) -> range:
        """Rows of a part."""
        start = index * self.part_rows
        return range(start, min(start + self.part_rows, self.splits[split].rows))

    def _require_equal(self, there: Plan, folder: Path) -> None:
        checkpoint = there.checkpoint_sha256 != self.checkpoint_sha256
        differences = [f"another checkpoint, {there.checkpoint}"] if checkpoint else []
        ours, theirs = (
            {"task": plan.task, "part_rows": plan.part_rows, **plan.settings}
            for plan in (self, there)
        )
        differences += [
            f"{name}={theirs.get(name)}"
            for name in dict.fromkeys([*ours, *theirs])
            if ours.get(name) != theirs.get(name)
        ]
        if list(there.splits) != list(self.splits):
            differences.append(f"splits {', '.join(there.splits)}")
        differences += [
            f"other data of split {name}, {', '.join(there.splits[name].sources)}"
            for name in self.splits
            if name in there.splits and there.splits[name].sha256 != self.splits[name].sha256
        ]
        if differences:
            raise UserError(
                f"{folder} holds predictions of {'; '.join(differences)}: choose another folder "
                "(job.timestamp_id=NAME) or remove this one"
            )


def part_path(folder: str | Path, split: str, index: int) -> Path:
    """File of a part."""
    return Path(folder) / split / f"part-{index:05d}.npz"


def write_part(
    folder: str | Path, split: str, index: int, arrays: Mapping[str, np.ndarray]
) -> None:
    """Write a part in one step; equal arrays give equal bytes.

    Args:
        folder: Folder of the plan.
        split: Name of the split.
        index: Number of the part.
        arrays: The arrays named at the top of this module.
    """
    path = part_path(folder, split, index)
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)
    for abandoned in path.parent.glob(f".{path.name}.partial-*"):  # by processes killed in here
        abandoned.unlink(missing_ok=True)


def missing(folder: str | Path) -> list[tuple[str, int]]:
    """Parts that are planned and not there: names of splits, and numbers within them."""
    return [part for part in Plan.read(folder).parts() if not part_path(folder, *part).is_file()]


def complete(folder: str | Path) -> bool:
    """Whether all parts are there."""
    return not missing(folder)


def read_split(folder: str | Path, split: str) -> Iterator[dict[str, np.ndarray]]:
    """Go through the parts of a split in the order of its rows.

    Args:
        folder: Folder of the plan.
        split: Name of the split.

    Yields:
        The arrays of a part.

    Raises:
        UserError: If a part is not there.
    """
    for name, index in Plan.read(folder).parts():
        if name != split:
            continue
        path = part_path(folder, name, index)
        if not path.is_file():
            raise UserError(f"{path} is missing; the same command again goes on")
        with np.load(path) as stored:
            yield dict(stored)


def select(arrays: Mapping[str, np.ndarray], chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Some structures of a part.

    Args:
        arrays: The arrays of a part.
        chosen: Which of its structures, (n,) bool.
    """
    atoms = np.repeat(chosen, arrays["natoms"])
    return {
        name: array[atoms if name.removesuffix("_label") in PER_ATOM else chosen]
        for name, array in arrays.items()
    }
