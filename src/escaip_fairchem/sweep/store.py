"""The folder of a sweep: what it consists of, and what has been decided and submitted.

DIR/sweep.json says everything; beside it are the recipe, the sweep file, the resolved configuration
of each point (configs/NAME.yaml), the runs (points/NAME) and the logs of SLURM (slurm/).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escaip_fairchem.errors import UserError
from escaip_fairchem.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable

STATE_NAME = "sweep.json"
# Where and when a point runs may change between its starts; what it computes may not.
_MAY_DIFFER = ("job.metadata", "job.scheduler")


@dataclass
class Sweep:
    """A sweep as it lies in its folder.

    Attributes:
        folder: DIR, absolute.
        points: Name -> what varies in it.
        slurm: Whether points are SLURM jobs.
        parallel: Runs at a time, if limited.
        metric: Column of metrics.csv that points are compared by.
        halving: metric, mode, factor and steps of successive halving, or None.
        submissions: Each with ``job_id`` of the array, ``tasks`` (names of points, or None where a
            task chooses), ``rung``.
        canceled: Names of points that were cancelled.
        versions: Of the packages that composed it.
    """

    folder: Path
    points: dict[str, dict[str, Any]] = field(default_factory=dict)
    slurm: bool = False
    parallel: int | None = None
    metric: str = "val_forces_mae"
    halving: dict[str, Any] | None = None
    submissions: list[dict[str, Any]] = field(default_factory=list)
    canceled: list[str] = field(default_factory=list)
    versions: dict[str, Any] = field(default_factory=dict)

    @property
    def points_folder(self) -> Path:
        """Where the runs are."""
        return self.folder / "points"

    @property
    def log_folder(self) -> Path:
        """Where submitit keeps its files."""
        return self.folder / "slurm"

    def run(self, name: str) -> Path:
        """Folder of a point's run."""
        return self.points_folder / name

    def config(self, name: str) -> Path:
        """The resolved configuration of a point."""
        return self.folder / "configs" / f"{name}.yaml"

    def save(self) -> None:
        """Write sweep.json whole, or leave it as it was; `canceled` stays as it is there."""
        if (self.folder / STATE_NAME).is_file():
            self.canceled = load_sweep(self.folder).canceled
        self._write()

    def save_canceled(self, names: Iterable[str]) -> None:
        """Write sweep.json with the names of all points that are cancelled."""
        self.canceled = sorted(names)
        self._write()

    def _write(self) -> None:
        state = {key: value for key, value in vars(self).items() if key != "folder"}
        write_whole(self.folder / STATE_NAME, json.dumps(state, indent=1) + "\n")


def load_sweep(folder: Path) -> Sweep:
    """Read the folder of a sweep.

    Raises:
        UserError: It is none.
    """
    folder = Path(folder).resolve()
    try:
        state = json.loads((folder / STATE_NAME).read_text())
    except OSError as error:
        raise UserError(
            f"no {STATE_NAME} in {folder}; give the folder of a sweep (--dir of `escaip sweep`)"
        ) from error
    return Sweep(folder, **state)


def select(sweep: Sweep, names: list[str]) -> list[str]:
    """Points by their names, all if none are given.

    Raises:
        UserError: There is no such point.
    """
    for name in names:
        if name not in sweep.points:
            raise UserError(f"no point {name!r}; `escaip sweep status {sweep.folder}` lists them")
    return names or list(sweep.points)


def difference(stored: Any, wanted: Any, where: str = "") -> str | None:
    """The first key in which two configurations differ, with both values; None if in none.

    What may differ between the starts of one run is left out.
    """
    if where in _MAY_DIFFER or stored == wanted:
        return None
    if isinstance(stored, dict) and isinstance(wanted, dict):
        pairs = [(key, stored.get(key), wanted.get(key)) for key in {**stored, **wanted}]
    elif isinstance(stored, list) and isinstance(wanted, list) and len(stored) == len(wanted):
        pairs = [(index, *pair) for index, pair in enumerate(zip(stored, wanted, strict=True))]
    else:
        return f"{where} was {stored!r} and is {wanted!r}"
    found = (difference(a, b, f"{where}.{key}".lstrip(".")) for key, a, b in pairs)
    return next((text for text in found if text), None)
