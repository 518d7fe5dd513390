"""Tables as CSV and as text, and empty figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from escaip_fairchem.errors import UserError
from escaip_fairchem.files import save_figure, write_csv

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.figure import Figure


def require_writable(path: Path) -> None:
    """Refuse a table that could not be written, before anything is measured.

    Raises:
        UserError: It is no .csv, or its folder is missing.
    """
    if path.suffix != ".csv":
        raise UserError(f"--out {path}: give a name that ends in .csv; the figure gets .png")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}; make it first")


def write_rows(rows: Sequence[dict[str, Any]], path: Path, *, device: str = "cpu") -> None:
    """Write a table whole, in place of an older one; each row says when and with what.

    Args:
        rows: Columns and values; a column may be missing from some.
        path: The file.
        device: What was measured on: ``cpu`` or ``cuda``.
    """
    from escaip_fairchem.bench.report import environment

    made = environment(device)
    write_csv(path, ({name: rounded(value) for name, value in (made | r).items()} for r in rows))


def rounded(value: Any) -> Any:
    """Numbers with six digits, None as nothing."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def text_table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Some columns of the rows for a terminal, numbers with four digits."""
    from escaip_fairchem.sweep.table import aligned

    def cell(value: Any) -> str:
        if value is None:
            return ""
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "\n".join(aligned([list(columns), *([cell(r.get(c)) for c in columns] for r in rows)]))


def figure(columns: int, width: float = 4.8) -> tuple[Figure, Any]:
    """A figure without a window system, and its panels beside each other."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width * columns, 4.2), layout="constrained")
    return made, made.subplots(1, columns, squeeze=False)[0]


def finish(made: Figure, path: Path, claim: object) -> Path:
    """Write the claim under a figure, and the figure beside its table.

    Args:
        made: The figure.
        path: The table.
        claim: What was published.

    Returns:
        The file.
    """
    made.supxlabel(str(claim), fontsize=7, wrap=True)
    path = path.with_suffix(".png")
    save_figure(made, path)
    return path
