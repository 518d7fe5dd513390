"""Figures of a sweep: learning curves of all points, the metric against each override."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

from escaip_fairchem.errors import UserError
from escaip_fairchem.sweep.points import override_value
from escaip_fairchem.train.metrics import FILE_NAME, read_metrics

if TYPE_CHECKING:
    from pathlib import Path

    from escaip_fairchem.sweep.store import Sweep

_MANY = 12  # points that a legend can name


def draw(sweep: Sweep, metric: str | None = None) -> list[Path]:
    """Draw learning_curves.png and by_override.png into the folder of the sweep.

    Args:
        sweep: The sweep; points without results are left out.
        metric: Column of metrics.csv; that of the sweep by default.

    Returns:
        The files.

    Raises:
        UserError: No point has the metric.
    """
    metric = metric or sweep.metric
    curves = {}
    for name in sweep.points:
        rows = read_metrics(sweep.run(name) / FILE_NAME)
        if found := [(row["step"], row[metric]) for row in rows if metric in row]:
            curves[name] = found
    if not curves:
        raise UserError(f"no point of {sweep.folder} has {metric} yet")
    return [_curves(sweep, curves, metric), _by_override(sweep, curves, metric)]


def _curves(sweep: Sweep, curves: dict[str, list[tuple[int, float]]], metric: str) -> Path:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    colors = mpl.colormaps["viridis"].resampled(max(2, len(curves)))
    for number, (name, points) in enumerate(curves.items()):
        axes.plot(*zip(*points, strict=True), color=colors(number), marker=".", label=name)
    axes.set(xlabel="step", ylabel=metric)
    if _log(value for points in curves.values() for _, value in points):
        axes.set_yscale("log")
    if len(curves) <= _MANY:
        axes.legend(fontsize="x-small")
    path = sweep.folder / "learning_curves.png"
    figure.savefig(path, dpi=150)
    return path


def _by_override(sweep: Sweep, curves: dict[str, list[tuple[int, float]]], metric: str) -> Path:
    names = list(dict.fromkeys(key for name in curves for key in sweep.points[name])) or ["point"]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    for axes, key in zip(panels, names, strict=False):
        pairs = [
            (sweep.points[name].get(key), points[-1][1])
            for name, points in curves.items()
            if key in sweep.points[name] or key == "point"
        ]
        _panel(axes, pairs)
        axes.set_xlabel(key)
        axes.label_outer(remove_inner_ticks=False)
    for axes in list(figure.axes)[len(names) :]:
        axes.remove()
    for axes in figure.axes[::columns]:
        axes.set_ylabel(f"last {metric}")
    path = sweep.folder / "by_override.png"
    figure.savefig(path, dpi=150)
    return path


def _panel(axes: Any, pairs: list[tuple[Any, float]]) -> None:
    """Numbers on an axis (logarithmic if they span much), anything else in columns."""
    given = [value for value, _ in pairs]
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in given):
        axes.plot(given, [y for _, y in pairs], "o", alpha=0.7)
        if _log(given):
            axes.set_xscale("log")
        elif all(isinstance(v, int) for v in given) and len(set(given)) <= _MANY:
            axes.set_xticks(sorted(set(given)))
    else:
        labels = [v if isinstance(v, str) else override_value(v) for v in given]
        places = {label: place for place, label in enumerate(dict.fromkeys(labels))}
        axes.plot([places[label] for label in labels], [y for _, y in pairs], "o", alpha=0.7)
        axes.set_xticks(list(places.values()), list(places))
        axes.set_xlim(-0.5, len(places) - 0.5)


def _log(values: Any) -> bool:
    values = [value for value in values if math.isfinite(value)]
    return bool(values) and min(values) > 0 and max(values) / min(values) >= 10
