"""Learning curves of the models beside each other, by time and by structures seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from escaip_fairchem.bench.accuracy.options import MODELS
from escaip_fairchem.bench.accuracy.results import AXES, ERRORS
from escaip_fairchem.files import save_figure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from escaip_fairchem.bench.accuracy.results import Outcome

# Okabe and Ito's colours, which people with any colour vision tell apart.
_STYLES = dict(
    zip(
        MODELS,
        (("#0072B2", "o"), ("#56B4E9", "s"), ("#D55E00", "^"), ("#009E73", "D")),
        strict=True,
    )
)


def draw(found: Sequence[Outcome], path: Path) -> Path | None:
    """Draw a panel for each error and axis; a line for each training.

    Args:
        found: The trainings.
        path: File to write.

    Returns:
        The file, or None where nothing has been evaluated.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = [outcome for outcome in found if outcome.curve]
    if not found:
        return None
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(ERRORS), len(AXES))
    baselines = next((outcome.baselines for outcome in found if outcome.baselines), {})
    for row, error in zip(panels, ERRORS, strict=True):
        for axes, axis in zip(row, AXES, strict=True):
            for outcome in found:
                _curve(axes, outcome, axis, error)
            if error in baselines:
                lowest = min(row[error] for outcome in found for row in outcome.curve)
                # a model may begin far above it
                axes.set_ylim(0, 1.3 * baselines[error])
                if lowest < 0.2 * baselines[error]:
                    axes.set_yscale("log")
                    axes.set_ylim(0.8 * lowest, 1.3 * baselines[error])
                axes.axhline(baselines[error], color="0.6", linestyle="--", label="baseline")
            axes.set_xlim(left=0)
            axes.set(xlabel=AXES[axis], ylabel=f"{ERRORS[error]}, validation")
    axes = panels[0][0]
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=3)
    save_figure(figure, path)
    return path


def _curve(axes: Any, outcome: Outcome, axis: str, error: str) -> None:
    color, marker = _STYLES[outcome.model]
    axes.plot(
        [row[axis] for row in outcome.curve],
        [row[error] for row in outcome.curve],
        color=color, marker=marker, markersize=4, linewidth=1.2, label=outcome.title,
    )  # fmt: skip
