"""The figure of `escaip inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.data.survey import FORCE_EDGES

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from escaip_fairchem.data.report import Inspection

BINS = 60


def draw(found: Inspection, path: Path, title: str) -> Path:
    """Draw elements, sizes, forces, energies, neighbours and outliers.

    Args:
        found: What is drawn.
        path: The PNG to write.
        title: Name of the set.

    Returns:
        ``path``.
    """
    figure, axes = _figure()
    facts = found.facts
    _elements(axes[0], facts.element_atoms)
    axes[1].hist(facts.natoms, BINS)
    axes[1].set(xlabel="atoms per structure", ylabel="structures", yscale="log")
    _forces(axes[2], facts.force_histogram)
    known = np.isfinite(found.residual)
    _energies(axes[3], found.per_atom[known], found.residual[known])
    _neighbors(axes[4], facts.neighbors, found)
    axes[5].plot(np.array(facts.max_force)[known], found.residual[known], ".", markersize=3)
    axes[5].set(xlabel="largest force, eV/A", ylabel="above references, eV per atom")
    axes[5].set_xscale("symlog", linthresh=0.01)
    figure.suptitle(f"{title}: {len(facts)} structures")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _elements(axes: Axes, atoms: np.ndarray) -> None:
    from ase.data import chemical_symbols

    present = np.flatnonzero(atoms)
    axes.bar(np.arange(len(present)), atoms[present])
    symbols = [chemical_symbols[z] for z in present]
    turned = 90 if len(present) > 20 else 0
    size = min(8, 300 / len(present))
    axes.set_xticks(np.arange(len(present)), symbols, fontsize=size, rotation=turned)
    axes.set(ylabel="atoms", yscale="log", xlabel="element")


def _forces(axes: Axes, histogram: np.ndarray) -> None:
    (filled,) = histogram.nonzero()
    if len(filled):
        coarse = FORCE_EDGES[filled[0] : filled[-1] + 2]
        axes.stairs(histogram[filled[0] : filled[-1] + 1], coarse, fill=True)
        axes.set(xscale="symlog" if coarse[0] == 0 else "log")
    axes.set(xlabel="force component, eV/A", ylabel="free atoms x 3, bins of 1 %")


def _energies(axes: Axes, before: np.ndarray, after: np.ndarray) -> None:
    if len(before):
        axes.hist(after, BINS, label="above references")
        axes.hist(before - np.median(before), BINS, histtype="step", label="about their median")
        axes.legend(fontsize="small")
    axes.set(xlabel="energy, eV per atom", ylabel="structures", yscale="log")


def _neighbors(axes: Axes, histogram: np.ndarray, found: Inspection) -> None:
    most = int(histogram.nonzero()[0].max())
    axes.bar(np.arange(most + 1), histogram[: most + 1], width=1.0)
    axes.axvline(found.max_neighbors, color="black", linestyle="--", label="max_neighbors")
    axes.legend(fontsize="small")
    axes.set(xlabel=f"neighbours within {found.cutoff:g} A", ylabel="atoms")


def _figure() -> tuple[Any, Any]:
    # Without pyplot: no window system is touched and no global state is changed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.0, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(2, 3).ravel()
