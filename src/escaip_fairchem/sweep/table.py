"""Tables of a sweep for a terminal, and its results as CSV."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from escaip_fairchem.describe import find_checkpoint, rises
from escaip_fairchem.errors import UserError
from escaip_fairchem.files import write_csv
from escaip_fairchem.sweep.halving import decision, rungs
from escaip_fairchem.sweep.points import override
from escaip_fairchem.sweep.states import BUSY, log_tail, look
from escaip_fairchem.sweep.store import load_sweep
from escaip_fairchem.train.lock import holder

if TYPE_CHECKING:
    from pathlib import Path

    from escaip_fairchem.sweep.plan import Plan
    from escaip_fairchem.sweep.states import PointState
    from escaip_fairchem.sweep.store import Sweep

_LOG_LINES = 5
_FORCES = "val_forces_mae"


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows with their columns below each other."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def plan_table(plan: Plan) -> list[str]:
    """The points of a dry run, with their state and resources."""
    states = {state.name: state.state for state in look(plan.sweep)}
    varied = list(dict.fromkeys(name for point in plan.points for name in point.varied))
    rows = [["point", *varied, "state"]]
    for point in plan.points:
        cells = [_cell(point.varied.get(name)) for name in varied]
        rows.append([point.name, *cells, states.get(point.name, "new")])
    return aligned(rows)


def status_lines(sweep: Sweep) -> list[str]:
    """How the points stand; for the failed ones, why, and the end of their logs."""
    states = look(sweep)
    rows = [["point", "state", "step", "epoch", "loss", "force MAE", "steps/s", "left"]]
    if sweep.halving:
        rows[0].insert(2, "rung")
    for state in states:
        status = state.status
        of = f"/{status.total_steps}" if status.total_steps else ""
        running = state.state == "running"
        row = [
            state.name, state.state, f"{status.step}{of}", f"{status.epoch:.2f}",
            _number(status.loss), _number(state.metrics.get(_FORCES)),
            _number(status.steps_per_second), duration(status.seconds_left) if running else "",
        ]  # fmt: skip
        if sweep.halving:
            row.insert(2, str(state.rung))
        rows.append(row)
    counts = Counter(state.state for state in states)
    lines = [", ".join(f"{n} {state}" for state, n in counts.most_common()), *aligned(rows)]
    lines += _decisions(sweep)
    for state in states:
        if state.state in ("failed", "dead", "lost", "interrupted"):
            lines.append(f"{state.name} {state.state}: {state.reason or 'no reason given'}")
            if state.state != "interrupted":
                lines += [f"    {line}" for line in log_tail(sweep, state, _LOG_LINES)]
    return lines


def _decisions(sweep: Sweep) -> list[str]:
    lines = []
    for rung in range(1, len(rungs(sweep).steps) + 1 if sweep.halving else 0):
        found = decision(sweep, rung)
        if found:
            scores = ", ".join(f"{n} {_number(found['scores'][n])}" for n in found["names"])
            out = len(found["scores"]) - len(found["names"])
            lines.append(
                f"rung {rung}, by {found['metric']} at step {found['at_step']}: {scores}"
                + (f"; {out} out" if out else "")
            )
    return lines


def watch(folder: Path, every: float = 5.0) -> None:
    """Show the table again and again, until Ctrl-C, or nothing waits or runs.

    Args:
        folder: Of the sweep.
        every: Seconds between two looks.
    """
    with suppress(KeyboardInterrupt):
        while True:
            # a command that runs points here may have none under way for a moment
            at_work = holder(folder) is not None
            sweep = load_sweep(folder)
            print(
                "\033[2J\033[H" + "\n".join([time.strftime("%X"), *status_lines(sweep)]), flush=True
            )
            if not at_work and not any(state.state in BUSY for state in look(sweep)):
                return
            time.sleep(every)


def best(sweep: Sweep, metric: str | None, number: int) -> list[str]:
    """The best points by the last value of a metric.

    Args:
        sweep: The sweep.
        metric: Column of metrics.csv; that of the sweep by default.
        number: So many at most.

    Returns:
        Three lines a point: value and state, overrides, checkpoint.

    Raises:
        UserError: No point has the metric.
    """
    metric = metric or sweep.metric
    states = [state for state in look(sweep) if metric in state.metrics]
    if not states:
        known = sorted({name for state in look(sweep) for name in state.metrics})
        raise UserError(f"no point has {metric}; there are {', '.join(known) or 'no results yet'}")
    down = rises(metric)
    if sweep.halving and metric == sweep.metric:
        down = sweep.halving["mode"] == "max"

    # NaN last, points with the same value by name
    def key(state: PointState) -> tuple[bool, float, str]:
        value = state.metrics[metric]
        return value != value, -value if down else value, state.name

    lines = []
    for state in sorted(states, key=key)[:number]:
        varied = " ".join(override(*item) for item in sweep.points[state.name].items())
        try:
            checkpoint = str(find_checkpoint(sweep.run(state.name)))
        except UserError:
            checkpoint = "no checkpoint yet"
        value = f"{metric} {state.metrics[metric]:.6g}"
        lines += [f"{state.name}: {value} ({state.state}, step {state.status.step})"]
        lines += [f"    {varied}", f"    {checkpoint}"]
    return lines


def write_results(sweep: Sweep, path: Path) -> None:
    """A row a point: overrides, state, and the last value of each metric."""
    states = look(sweep)
    varied = list(dict.fromkeys(name for given in sweep.points.values() for name in given))
    metrics = list(dict.fromkeys(name for state in states for name in state.metrics))
    metrics = [name for name in metrics if name not in varied]  # the schedule's lr
    rows = [
        {
            "point": state.name,
            **{name: _cell(sweep.points[state.name].get(name, "")) for name in varied},
            "state": state.state,
            **{name: state.metrics.get(name, "") for name in metrics},
            "steps_per_second": state.status.steps_per_second,
            "run": sweep.run(state.name),
        }
        for state in states
    ]
    write_csv(path, rows)


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else override("", value).removeprefix("=")
