"""The page: one HTML file that needs no other, and no script."""

from __future__ import annotations

import datetime as dt
import os
from typing import TYPE_CHECKING, Any

from escaip_fairchem import __version__
from escaip_fairchem.errors import UserError
from escaip_fairchem.files import write_whole
from escaip_fairchem.report.collect import Collection, collect
from escaip_fairchem.report.curves import AXES, colors, draw_curves
from escaip_fairchem.report.evaluation_tables import by_element, evaluated, subsets
from escaip_fairchem.report.run_tables import differing, final_metrics, origin, overview, speed
from escaip_fairchem.report.table import breakable, short

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from escaip_fairchem.report.run import Run


def write_report(folders: Sequence[Path], out: Path, *, plot: bool = False) -> Collection:
    """Write the page that compares runs.

    Args:
        folders: Of runs, sweeps, evaluations, or folders of these.
        out: The page.
        plot: First draw parity and errors by element of runs that have a checkpoint and no figure.

    Returns:
        What it is about, with what is damaged.

    Raises:
        UserError: A folder does not exist, or there is nothing in any, or `out` cannot be written.
    """
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out: {out} is no file that can be written; its folder must exist")
    found = collect(folders)
    if plot:
        _plot_missing(found.runs)
        found = collect(folders)
    page = render(found)
    try:
        write_whole(out.absolute(), page)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror}") from error
    return found


def render(found: Collection) -> str:
    """The page as text.

    Args:
        found: What it is about.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("escaip_fairchem.report", "."),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"short": short, "exact": _exact, "breakable": breakable}
    runs = found.runs
    curves = {axis: draw_curves(runs, axis) for axis in AXES}
    return environment.get_template("page.html").render(
        found=found,
        runs=list(zip(range(len(runs)), runs, colors(len(runs)), strict=True)),
        problems=all_problems(found),
        made=dt.datetime.now().astimezone().isoformat(" ", "minutes"),
        version=__version__,
        axes=AXES,
        curves=curves,
        undrawn={axis: _undrawn(runs, axis) for axis in AXES},
        overview=overview(runs) if runs else None,
        differing=differing(runs),
        metrics=final_metrics(runs) if any(run.metrics for run in runs) else None,
        evaluated=evaluated(found.evaluations) if found.evaluations else None,
        subsets=subsets(found.evaluations),
        elements=by_element(runs, found.evaluations),
        speed=speed(runs) if runs else None,
        origin=origin(runs) if runs else None,
    )


def all_problems(found: Collection) -> list[str]:
    """What is damaged.

    Args:
        found: What a report is about.
    """
    every = [*found.runs, *found.evaluations]
    return [*found.problems, *(problem for entry in every for problem in entry.problems)]


def _undrawn(runs: Sequence[Run], axis: str) -> list[str]:
    """Runs that have rows, but not against this."""
    return [run.name for run in runs if run.rows and not any(axis in row for row in run.rows)]


def _exact(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _plot_missing(runs: Sequence[Run]) -> None:
    from escaip_fairchem.train.plot import plot_run

    for run in runs:
        if run.checkpoint is None or run.parity is not None:
            continue
        print(f"{os.path.relpath(run.folder)}:")
        try:
            plot_run(run.folder)
        except Exception as error:  # whatever is wrong with one, the others are reported
            print(f"  no figures: {' '.join(str(error).split())}")
