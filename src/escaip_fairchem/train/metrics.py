"""metrics.csv, the learning curve of a run, as numbers; imports no large library."""

from __future__ import annotations

import csv
import math
from typing import TYPE_CHECKING, Any

from escaip_fairchem.describe import UNITS, rises

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME = "metrics.csv"
#: Columns that say where the training is.
NOT_METRICS = ("step", "epoch", "lr", "wall_time_s", "samples")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.csv.

    Args:
        path: The file; it need not exist.

    Returns:
        One dictionary a row, numbers as numbers, without the cells that are empty.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {name: number(cell) for name, cell in row.items() if cell}
            for row in csv.DictReader(file)
        ]


def number(cell: str) -> int | float:
    """A cell as a number; raises ValueError if it is none."""
    return int(cell) if cell.isdigit() else float(cell)


def last_and_best(
    rows: list[dict[str, Any]], baselines: dict[str, float]
) -> dict[str, dict[str, float | str]]:
    """Last and best value of each metric, with its unit and its baseline.

    Args:
        rows: Of metrics.csv.
        baselines: Of trivial models, by the names of the columns.

    Returns:
        By column: ``last`` and ``best`` (None without a finite value), ``best_step``, ``unit``,
        and ``baseline`` where there is one.
    """
    found: dict[str, dict[str, float | str]] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        if name in NOT_METRICS:
            continue
        history = [(row[name], row["step"]) for row in rows if name in row]
        finite = [entry for entry in history if math.isfinite(entry[0])] or [(None, None)]
        best, step = (max if rises(name) else min)(finite, key=lambda entry: entry[0])
        last = history[-1][0] if math.isfinite(history[-1][0]) else None  # JSON has no NaN
        found[name] = {"last": last, "best": best, "best_step": step, "unit": unit_of(name)}
        if name in baselines:
            found[name]["baseline"] = baselines[name]
    return found


def unit_of(metric: str) -> str:
    """Unit of a metric by its column name; empty for losses, cosines and fractions."""
    if rises(metric) or metric.endswith("loss"):
        return ""
    name = next((text for key, text in UNITS.items() if f"_{key}_" in f"_{metric}_"), "")
    squared = "^2" if metric.endswith("_mse") else ""
    return f"{name}/atom{squared}" if "per_atom" in metric else f"{name}{squared}"
