"""Figures of a sweep, in the form of the paper's Figure 5: runtime and memory against size."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean, pstdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from escaip_fairchem.bench.report import Row


def draw(rows: list[Row], path: Path, *, against: str) -> Path:
    """Draw a panel for each quantity: mean over batches, with their spread.

    Args:
        rows: The sweep.
        path: File to write.
        against: ``systems`` (batch size) or ``atoms`` (system size, logarithmic).

    Returns:
        The file.
    """
    quantities = list(dict.fromkeys((row.quantity, row.unit) for row in rows))
    figure, panels = _figure(len(quantities))
    for axes, (quantity, unit) in zip(panels, quantities, strict=True):
        for model in dict.fromkeys(row.model for row in rows):
            chosen = [r for r in rows if (r.quantity, r.model) == (quantity, model)]
            _curve(axes, chosen, against, model)
        axes.set(title=quantity, ylabel=unit)
        if against == "systems":
            _label_sizes(axes, rows)
        else:
            axes.set(xlabel="atoms", xscale="log", yscale="log")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    return path


def _curve(axes: Axes, rows: list[Row], against: str, label: str) -> None:
    values = defaultdict(list)
    for row in rows:
        values[getattr(row, against)].append(row.min)
    sizes = sorted(values)
    centers = [mean(values[size]) for size in sizes]
    spreads = [pstdev(values[size]) for size in sizes]
    axes.errorbar(sizes, centers, yerr=spreads, marker="o", markersize=4, capsize=3, label=label)


def _label_sizes(axes: Axes, rows: list[Row]) -> None:
    """Each batch size, and the mean number of atoms that it adds up to."""
    atoms = defaultdict(list)
    for row in rows:
        atoms[row.systems].append(row.atoms)
    sizes = sorted(atoms)
    axes.set(xscale="log", xlabel="structures in the batch (atoms in total)")
    axes.set_xticks(sizes, [f"{size}\n({mean(atoms[size]):.0f})" for size in sizes])
    axes.minorticks_off()


def _figure(columns: int) -> tuple[Any, Any]:
    # Without pyplot: no window system is touched and no global state is changed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * columns, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]
