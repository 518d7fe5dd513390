"""Tables of a report, before they are HTML."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

Note = tuple[str, Any, str]


@dataclass
class Cell:
    """A value with what is said of it.

    Attributes:
        value: Text, a number, or None for what is not known.
        notes: Below it: text before a number, the number or None, text behind it.
        best: The best of its column.
        wide: Text that may be long, such as a path: it is broken anywhere.
        soft: Not what the reader looks for.
        state: A state, which has a colour.
    """

    value: Any
    notes: list[Note] = field(default_factory=list)
    best: bool = False
    wide: bool = False
    soft: bool = False
    state: bool = False


@dataclass
class Row:
    """A row.

    Attributes:
        cells: Values or cells; the first names the row.
        run: Number of the run that it is of.
    """

    cells: list[Any]
    run: int | None = None

    def __post_init__(self) -> None:
        """Make cells of plain values."""
        self.cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in self.cells]


@dataclass
class Table:
    """A table.

    Attributes:
        columns: Titles.
        rows: As many cells each.
        runs: For each column, the number of the run that it is of.
        title: Of the table.
        note: Below the table.
    """

    columns: list[str]
    rows: list[Row]
    runs: list[int | None] = field(default_factory=list)
    title: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        """By default, columns are of no run."""
        self.runs = self.runs or [None] * len(self.columns)

    def numeric(self, column: int) -> bool:
        """Whether a column has numbers."""
        return any(isinstance(row.cells[column].value, int | float) for row in self.rows)


def without_empty_columns(table: Table) -> Table:
    """The table without columns in which nothing is known."""
    kept = [
        place
        for place in range(len(table.columns))
        if any(row.cells[place].value is not None for row in table.rows)
    ]
    return Table(
        [table.columns[place] for place in kept],
        [Row([row.cells[place] for place in kept], row.run) for row in table.rows],
        [table.runs[place] for place in kept], table.title, table.note,
    )  # fmt: skip


def breakable(text: str) -> Markup:
    """Text of paths, keys and names, which may go on in the next line behind their parts."""
    return Markup(re.sub(r"([._+=,-]|(?<!eV)/)(?=\w)", r"\1<wbr>", str(escape(text))))


def short(value: float) -> str:
    """A number as a reader wants it; the exact one stands beside it."""
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
