"""metrics.csv, the learning curve of a run, as numbers; imports the standard library only."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME = "metrics.csv"


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
            {name: _number(cell) for name, cell in row.items() if cell}
            for row in csv.DictReader(file)
        ]


def _number(cell: str) -> int | float:
    return int(cell) if cell.isdigit() else float(cell)
