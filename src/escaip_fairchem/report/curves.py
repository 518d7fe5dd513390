"""Learning curves as SVG that takes the colours and the font of the page around it."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from escaip_fairchem.report.run import finite

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from escaip_fairchem.report.run import Run

#: What curves are drawn against: column of metrics.csv, and how it is called.
AXES = {"step": "steps", "samples": "samples seen", "wall_time_s": "time"}
# Titles of the panels, and what the columns in them end in.
_PANELS = {
    "loss": ("train_loss", "val_loss"),
    "energy MAE, eV": ("energy_mae",),
    "force MAE, eV/A": ("forces_mae",),
    "stress MAE, eV/A^3": ("stress_mae",),
    "force cosine": ("forces_cosine_similarity",),
    "EFwT": ("efwt",),
}
_POINTS = 40_000  # of a panel together, and
_MOST, _LEAST = 400, 40  # of a curve
_FEW = 60  # points that are marked
_STYLES = ("-", ":", "-.", "--")
# Colours of the drawing that stand for those of the page.
_INK, _GRID = "#010203", "#040506"
# Readable on white and on black.
PALETTE = (
    "#3b7dd8", "#e0731d", "#2f9e5b", "#d6453d", "#9467bd",
    "#a0684f", "#d563b4", "#7f8a93", "#a8a01f", "#1aa9bd",
)  # fmt: skip


@dataclass
class Panel:
    """A figure.

    Attributes:
        title: What is drawn, with its unit.
        svg: The figure, without a reference to anything outside it.
        note: What lines mean where they are of several kinds.
    """

    title: str
    svg: str
    note: str


def colors(number: int) -> list[str]:
    """A colour for each run."""
    if number <= len(PALETTE):
        return list(PALETTE[:number])
    import matplotlib as mpl
    from matplotlib.colors import to_hex

    scale = mpl.colormaps["turbo"]
    # its ends are too dark
    return [to_hex(scale(0.08 + 0.84 * place / (number - 1))) for place in range(number)]


def draw_curves(runs: Sequence[Run], against: str) -> list[Panel]:
    """Draw the learning curves of runs.

    Args:
        runs: In the order of their colours; the lines of number i have the class ``run-i``.
        against: One of `AXES`.

    Returns:
        A figure for each kind of metric that any run has.
    """
    import matplotlib as mpl

    settings = {
        "svg.fonttype": "none",
        "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK,
        "xtick.color": _INK, "ytick.color": _INK, "grid.color": _GRID, "font.size": 9,
        "axes.spines.top": False, "axes.spines.right": False, "path.simplify": False,
    }  # fmt: skip
    panels = []
    for title, endings in _PANELS.items():
        curves = [
            (place, column, points)
            for place, run in enumerate(runs)
            for column in dict.fromkeys(name for row in run.rows for name in row)
            if column.endswith(endings) and (points := _points(run, column, against))
        ]
        if curves:
            with mpl.rc_context({**settings, "svg.hashsalt": f"{title} {against}"}):
                panels.append(_draw(title, runs, curves, against))
    return panels


def _draw(title: str, runs: Sequence[Run], curves: list[tuple], against: str) -> Panel:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(linewidth=0.6)
    axes.set_axisbelow(True)
    columns = list(dict.fromkeys(column for _, column, _ in curves))
    kept = max(_LEAST, min(_MOST, _POINTS // len(curves)))
    unit, scale = _time(curves) if against == "wall_time_s" else ("", 1)
    palette = colors(len(runs))
    values = []
    for number, (place, column, points) in enumerate(curves):
        x, y = zip(*thinned(points, kept), strict=True)
        values += y
        training = column == "train_loss"
        style = columns.index(column) - ("train_loss" in columns) if not training else 0
        axes.plot(
            [value / scale for value in x], y, _STYLES[style % len(_STYLES)],
            color=palette[place], linewidth=0.7 if training else 1.5, alpha=0.6 if training else 1,
            marker="o" if len(x) <= _FEW and not training else "", markersize=2.6,
            gid=f"run-{place}.{number}",
        )  # fmt: skip
    values += _baselines(axes, runs, columns, {place for place, _, _ in curves})
    positive = min(values) > 0
    if positive and max(values) > 10 * min(values):
        axes.set_yscale("log")
    elif min(values) >= 0:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(AXES[against] + (f", {unit}" if unit else ""))
    axes.set_xlim(left=0)
    if against == "samples":
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=5)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    note = "" if len(columns) == 1 else "; ".join(_kinds(columns))
    return Panel(title, _inline(file.getvalue(), title), note)


def _points(run: Run, column: str, against: str) -> list[tuple[float, float]]:
    pairs = [(row[against], row[column]) for row in run.rows if column in row and against in row]
    return [(x, y) for x, y in pairs if finite(x) and finite(y)]


def thinned(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many points of a curve: the lowest and highest of each stretch, and both ends.

    Args:
        points: By x.
        most: At least 6.
    """
    if len(points) <= most:
        return points
    stretches = (most - 2) // 2
    inner = points[1:-1]
    kept = [points[0]]
    for stretch in range(stretches):
        part = range(stretch * len(inner) // stretches, (stretch + 1) * len(inner) // stretches)
        low, high = (choose(part, key=lambda i: inner[i][1]) for choose in (min, max))
        kept += [inner[i] for i in sorted({low, high})]
    return [*kept, points[-1]]


def _baselines(axes: Any, runs: Sequence[Run], columns: list[str], drawn: set[int]) -> list[float]:
    """A line for what the trivial models have: one if it is the same for all, or one for each."""
    found = {}
    for place in sorted(drawn):
        for column in columns:
            value = runs[place].metrics.get(column, {}).get("baseline")
            if finite(value):
                found.setdefault(value, place)
    style = {"linestyle": "--", "linewidth": 0.9, "alpha": 0.8}
    if len(found) == 1:
        axes.axhline(*found, color=_INK, **style)
        axes.annotate(
            "baseline", (1, *found), xycoords=("axes fraction", "data"), ha="right", va="bottom",
            fontsize=7.5,
        )  # fmt: skip
    else:
        for value, place in found.items():
            axes.axhline(value, color=colors(len(runs))[place], **style)
    return list(found)


def _kinds(columns: list[str]) -> Iterator[str]:
    words = {"-": "line", ":": "dotted", "-.": "dot and dash", "--": "dashes"}
    validation = [column for column in columns if column != "train_loss"]
    for place, column in enumerate(validation):
        yield f"{words[_STYLES[place % len(_STYLES)]]}: {column}"
    if "train_loss" in columns:
        yield "thin: train_loss"


def _time(curves: list[tuple]) -> tuple[str, float]:
    longest = max(points[-1][0] for _, _, points in curves)
    return next(((unit, s) for unit, s in (("h", 3600), ("min", 60)) if longest >= 2 * s), ("s", 1))


def _inline(svg: str, title: str) -> str:
    """An SVG file as a part of a page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" '
                 rf'aria-label="{title}">', svg, count=1)  # fmt: skip
    # names that are used within the figure have other forms
    svg = re.sub(r'<g id="(run-\d+)\.\d+">', r'<g class="\1">', svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = svg.replace(_INK, "currentColor").replace(_GRID, "var(--line)")
    # coordinates to a hundredth of a point; the words of the figure stay as they are
    svg = re.sub(r' (d|x|y|transform)="[^"]*"', lambda found: _rounded(found[0]), svg)
    return re.sub(r"\s*\n\s*", " ", svg)


def _rounded(text: str) -> str:
    return re.sub(r"(\d\.\d\d)\d+", r"\1", text)
