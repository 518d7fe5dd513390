"""One evaluation, as its folder tells of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from escaip_fairchem.report.files import read_figure, read_json
from escaip_fairchem.report.find import EVALUATION_NAME
from escaip_fairchem.report.run import is_number

if TYPE_CHECKING:
    from pathlib import Path

FIGURES = {"parity.png": "parity", "errors.png": "by force and atoms"}


@dataclass
class Split:
    """A split of an evaluation, or the mean over them.

    Attributes:
        name: Of the split.
        counts: Structures, atoms, and so on.
        metrics: As in metrics.json.
        subsets: Metrics of each subset.
        elements: Rows by element.
        figures: Addresses by title.
    """

    name: str
    counts: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    subsets: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    elements: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, str] = field(default_factory=dict)


@dataclass
class Evaluation:
    """What a report says of an evaluation.

    Attributes:
        folder: Absolute.
        name: In the report.
        content: Of metrics.json.
        splits: Its splits, and their mean.
        missing: What the folder does not have.
        problems: Files that are damaged.
    """

    folder: Path
    name: str
    content: dict[str, Any] = field(default_factory=dict)
    splits: list[Split] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_evaluation(folder: Path, name: str) -> Evaluation:
    """Read the folder of an evaluation, whatever is left of it.

    Args:
        folder: Absolute.
        name: What the report calls it.
    """
    path = folder / EVALUATION_NAME
    found = Evaluation(folder, name)
    found.content = read_json(path, found.problems)
    if not path.exists():
        found.missing.append(f"no {EVALUATION_NAME}: not all is predicted; its command goes on")
    for split, given in _dicts(found.content.get("splits")).items():
        counts = given.get("counts")
        entry = Split(split, counts if isinstance(counts, dict) else {})
        entry.metrics = _metrics(given.get("metrics"))
        entry.subsets = {
            subset: _metrics(metrics) for subset, metrics in _dicts(given.get("by_subset")).items()
        }
        entry.elements = _elements(given.get("by_element"))
        for file, title in FIGURES.items():
            if address := read_figure(folder / split / file, found.problems):
                entry.figures[title] = address
            elif not (folder / split / file).exists():
                found.missing.append(f"no {split}/{file}")
        if not entry.metrics:
            found.problems.append(f"{path}: split {split} has no metrics")
        found.splits.append(entry)
    if found.content and not found.splits:
        found.problems.append(f"{path}: it has no splits")
    if average := _metrics(found.content.get("average")):
        found.splits.append(Split("average", metrics=average))
    return found


def _dicts(given: Any) -> dict[str, dict[str, Any]]:
    """The entries that are dictionaries."""
    items = given.items() if isinstance(given, dict) else ()
    return {str(key): value for key, value in items if isinstance(value, dict)}


def _metrics(given: Any) -> dict[str, dict[str, Any]]:
    """Those with a number, or null for one that is not finite."""
    return {
        name: metric
        for name, metric in _dicts(given).items()
        if all(metric.get(key) is None or is_number(metric[key]) for key in ("value", "baseline"))
    }


def _elements(given: Any) -> list[dict[str, Any]]:
    rows = [row for row in given if isinstance(row, dict)] if isinstance(given, list) else []
    return [row for row in rows if isinstance(row.get("element"), str)]
