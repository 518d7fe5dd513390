"""What the folders that a user names hold: runs, sweeps, evaluations."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from escaip_fairchem.errors import UserError
from escaip_fairchem.sweep.store import STATE_NAME
from escaip_fairchem.train.metrics import FILE_NAME
from escaip_fairchem.train.status import STATUS_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CONFIG_NAME = "canonical_config.yaml"
SUMMARY_NAME = "summary.json"  # as in train.summary, which imports torch
EVALUATION_NAME = "metrics.json"
PLAN = Path("results") / "plan.json"
_RUN_FILES = (STATUS_NAME, FILE_NAME, SUMMARY_NAME, CONFIG_NAME)
_DEPTH = 4


@dataclass(frozen=True)
class Source:
    """A folder with something to report.

    Attributes:
        kind: ``run``, ``sweep`` or ``evaluation``.
        folder: Absolute.
    """

    kind: str
    folder: Path


def find(folders: Sequence[Path], problems: list[str]) -> list[Source]:
    """What is in folders, or in folders below them; each once, in order.

    Args:
        folders: Runs, sweeps, evaluations, or folders of these.
        problems: Gets a line for each folder with none.

    Raises:
        UserError: A folder does not exist, or there is nothing in any.
    """
    found: dict[Source, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; give that of a run, sweep or evaluation")
        here = _below(folder.resolve(), _DEPTH)
        if not here:
            problems.append(f"{folder}: no run, sweep or evaluation in it")
        found |= dict.fromkeys(here)
    if not found:
        given = ", ".join(map(str, folders))
        raise UserError(
            f"no run, sweep or evaluation in {given}; a run has {FILE_NAME} and {CONFIG_NAME}"
        )
    return list(found)


def _below(folder: Path, depth: int) -> list[Source]:
    if (folder / STATE_NAME).exists():
        return [Source("sweep", folder)]
    if (folder / EVALUATION_NAME).exists() or (folder / PLAN).exists():
        return [Source("evaluation", folder)]
    if any((folder / name).exists() for name in _RUN_FILES):
        return [Source("run", folder)]
    if not depth:
        return []
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    return [source for path in inner for source in _below(path, depth - 1)]


def short_names(folders: Iterable[Path]) -> dict[Path, str]:
    """The ends of paths, each as long as it must be to differ from the others.

    Args:
        folders: Absolute, each once.
    """
    lengths = dict.fromkeys(folders, 1)
    while True:
        names = {folder: "/".join(folder.parts[-n:]) for folder, n in lengths.items()}
        often = Counter(names.values())
        again = [folder for folder, name in names.items() if often[name] > 1]
        if not again:
            return names
        lengths |= {folder: lengths[folder] + 1 for folder in again}
