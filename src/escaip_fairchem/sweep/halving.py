"""Who goes on: decided once for each rung, from the results on disk, and stored."""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any

from escaip_fairchem.sweep.spec import Halving
from escaip_fairchem.train.metrics import FILE_NAME, read_metrics
from escaip_fairchem.train.status import read_status

if TYPE_CHECKING:
    from pathlib import Path

    from escaip_fairchem.sweep.store import Sweep


def rungs(sweep: Sweep) -> Halving:
    """The sweep's halving."""
    given = sweep.halving
    return Halving(given["metric"], tuple(given["steps"]), given["factor"], given["mode"])


def stop_at(sweep: Sweep, rung: int) -> int | None:
    """Step at which a rung ends; None for the last one, and without halving."""
    steps = rungs(sweep).steps if sweep.halving else ()
    return steps[rung] if rung < len(steps) else None


def stop_overrides(sweep: Sweep, rung: int) -> list[str]:
    """What makes a run pause at the end of a rung."""
    stop = stop_at(sweep, rung)
    return [] if stop is None else [f"runner.stop_at_step={stop}"]


def reached(sweep: Sweep, name: str, rung: int) -> bool:
    """Whether a point has done its part of a rung."""
    status = read_status(sweep.run(name))
    stop = stop_at(sweep, rung)
    return status.state == "finished" or (
        status.state == "paused" and stop is not None and status.step >= stop
    )


def decision(sweep: Sweep, rung: int) -> dict[str, Any] | None:
    """What was decided for a rung: ``names`` in order, and ``scores`` of all; None if not yet."""
    try:
        return json.loads(_path(sweep, rung).read_text())
    except OSError:
        return None


def decide(sweep: Sweep, rung: int) -> list[str]:
    """Points of a rung, best first; decided now unless that is done already.

    Of points with the same value, the name decides. Points that failed, or whose metric is not a
    number, drop out.

    Args:
        sweep: With halving.
        rung: Counted from 0, where all points are.
    """
    if rung == 0:
        return list(sweep.points)
    stored = decision(sweep, rung)
    if stored is None:
        before = decide(sweep, rung - 1)
        scores = {name: score(sweep, name, rung - 1) for name in before}
        halving = rungs(sweep)
        size = halving.sizes(len(sweep.points))[rung]
        names = ranked(scores, halving.mode)[:size]
        _write_once(
            _path(sweep, rung),
            {"metric": halving.metric, "at_step": halving.steps[rung - 1], "names": names,
             "scores": scores},
        )  # fmt: skip
        # another task may have been faster
        stored = decision(sweep, rung)
    return stored["names"]


def ranked(scores: dict[str, float | None], mode: str) -> list[str]:
    """Names from best to worst, without those that have no number."""
    sign = -1 if mode == "max" else 1
    return sorted(
        (name for name, value in scores.items() if value is not None and math.isfinite(value)),
        key=lambda name: (sign * scores[name], name),
    )


def score(sweep: Sweep, name: str, rung: int) -> float | None:
    """The metric of a point where a rung ended; None if it did not get there."""
    if not reached(sweep, name, rung):
        return None
    stop = stop_at(sweep, rung)
    rows = read_metrics(sweep.run(name) / FILE_NAME)
    metric = rungs(sweep).metric
    values = [row[metric] for row in rows if metric in row and row["step"] <= stop]
    return values[-1] if values and math.isfinite(values[-1]) else None


def _path(sweep: Sweep, rung: int) -> Path:
    return sweep.folder / "halving" / f"rung_{rung}.json"


def _write_once(path: Path, content: dict[str, Any]) -> None:
    """Write a file unless it exists: of several writers the first one wins, on NFS too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    try:
        os.link(partial, path)
    except FileExistsError:
        pass
    finally:
        partial.unlink()
