"""One run, as its folder tells of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from escaip_fairchem.describe import find_checkpoint
from escaip_fairchem.errors import UserError
from escaip_fairchem.report.differences import flat
from escaip_fairchem.report.files import read_figure, read_json, read_rows, read_yaml
from escaip_fairchem.report.find import CONFIG_NAME, SUMMARY_NAME
from escaip_fairchem.train.metrics import FILE_NAME, last_and_best
from escaip_fairchem.train.status import STATUS_NAME, RunStatus, read_status

if TYPE_CHECKING:
    from pathlib import Path

ELEMENTS_NAME = "errors_by_element.csv"
PARITY_NAME = "parity.png"


@dataclass
class Run:
    """What a report says of a run.

    Attributes:
        folder: Absolute.
        name: In the report.
        state: As in status.json, or as the sweep that it belongs to knows better.
        status: Content of status.json.
        rows: Rows of metrics.csv.
        metrics: As in summary.json, or from `rows` where there is none.
        summary: Content of summary.json.
        config: From `flat`; None where there is none.
        checkpoint: The newest, if there is one.
        parity: Address of the figure.
        elements: Rows of errors_by_element.csv.
        missing: What the folder does not have, and what would make it.
        problems: Files that are damaged.
    """

    folder: Path
    name: str
    state: str = "absent"
    reason: str | None = None
    status: RunStatus = field(default_factory=RunStatus)
    rows: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, str] | None = None
    checkpoint: Path | None = None
    parity: str | None = None
    elements: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def last(self, column: str) -> float | None:
        """Last value of a column of metrics.csv."""
        return next((row[column] for row in reversed(self.rows) if column in row), None)

    def said(self, key: str) -> Any:
        """A plain value of the summary; None if it is not there."""
        value = self.summary.get(key)
        return value if isinstance(value, str | int | float) else None

    def versions(self) -> dict[str, str]:
        """Versions of what computed the run."""
        found = self.summary.get("versions")
        return {k: str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def read_run(folder: Path, name: str) -> Run:
    """Read the folder of a run, whatever is left of it.

    Args:
        folder: Absolute; it need not exist.
        name: What the report calls it.
    """
    run = Run(folder, name)
    # its parser reads numbers of the wrong kind without a word
    stored = read_json(folder / STATUS_NAME, run.problems)
    run.status = read_status(folder)
    _require_numbers(run, stored)
    run.state, run.reason = run.status.state, run.status.reason
    run.rows = read_rows(folder / FILE_NAME, run.problems, "step")
    run.summary = read_json(folder / SUMMARY_NAME, run.problems)
    config = read_yaml(folder / CONFIG_NAME, run.problems)
    run.config = flat(config) if config else None
    run.metrics = _metrics(run)
    run.parity = read_figure(folder / PARITY_NAME, run.problems)
    run.elements = _elements(folder / ELEMENTS_NAME, run.problems)
    try:
        run.checkpoint = find_checkpoint(folder)
    except UserError:
        run.missing.append("no checkpoint")
    _note_missing(run)
    return run


def _require_numbers(run: Run, stored: dict[str, Any]) -> None:
    """Put plain defaults where status.json has something else."""
    plain = RunStatus()
    for key in ("step", "total_steps", "epoch", "loss", "steps_per_second", "updated"):
        value = stored.get(key)
        if value is not None and not is_number(value):
            run.problems.append(f"{run.folder / STATUS_NAME}: {key} is no number")
            setattr(run.status, key, getattr(plain, key))
    for key in ("state", "reason"):
        if (value := getattr(run.status, key)) is not None:
            setattr(run.status, key, str(value))


def _elements(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    before = len(problems)
    rows = read_rows(path, problems, "element", text="element")
    if not rows and path.exists() and len(problems) == before:
        problems.append(f"{path} is damaged: it has no rows")
    return rows


def _metrics(run: Run) -> dict[str, dict[str, Any]]:
    """Those of summary.json that are whole; else what metrics.csv says, without baselines."""
    said = run.summary.get("metrics")
    if run.summary and not isinstance(said, dict):
        run.problems.append(f"{run.folder / SUMMARY_NAME}: it has no metrics")
    if not isinstance(said, dict):
        return last_and_best(run.rows, {})
    found = {}
    for name, values in said.items():
        numbers = (
            [values.get(key) for key in ("last", "best", "best_step", "baseline")]
            if (isinstance(values, dict))
            else [""]
        )
        if all(value is None or is_number(value) for value in numbers):
            found[name] = {**values, "unit": str(values.get("unit", ""))}
        else:
            run.problems.append(f"{run.folder / SUMMARY_NAME}: {name} is no metric")
    return found


def is_number(value: Any) -> bool:
    """Whether it is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _note_missing(run: Run) -> None:
    folder = run.folder
    if not folder.is_dir():
        run.missing = ["not started"]
        return
    if not (folder / STATUS_NAME).exists():
        run.missing.append(f"no {STATUS_NAME}: how it ended is not known")
    if not (folder / FILE_NAME).exists():
        run.missing.append(f"no {FILE_NAME}: no learning curve")
    elif run.rows and not any("samples" in row for row in run.rows):
        run.missing.append(f"no samples in {FILE_NAME}: an earlier version wrote it")
    if not (folder / SUMMARY_NAME).exists():
        run.missing.append(
            f"no {SUMMARY_NAME}, which the end of a run writes: no baselines, speed and versions"
        )
    if not (folder / CONFIG_NAME).exists():
        run.missing.append(f"no {CONFIG_NAME}: not in the differences")
    if run.checkpoint and not (folder / PARITY_NAME).exists():
        run.missing.append("no parity figure: `escaip plot` or `--plot` draws it")
    elif run.checkpoint and _older(folder / PARITY_NAME, run.checkpoint):
        run.missing.append("the parity figure is older than the checkpoint")


def _older(path: Path, other: Path) -> bool:
    return path.stat().st_mtime < other.stat().st_mtime


def finite(value: Any) -> bool:
    """Whether it is a number that can be drawn."""
    return is_number(value) and math.isfinite(value)
