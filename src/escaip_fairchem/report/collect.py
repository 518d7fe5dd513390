"""Everything that a report is about, read from folders."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from escaip_fairchem.describe import rises
from escaip_fairchem.errors import UserError
from escaip_fairchem.report.evaluation import Evaluation, read_evaluation
from escaip_fairchem.report.find import Source, find, short_names
from escaip_fairchem.report.run import Run, finite, read_run
from escaip_fairchem.sweep.states import look
from escaip_fairchem.sweep.store import Sweep, load_sweep

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass
class Collection:
    """What a report is about.

    Attributes:
        runs: In the order of the report.
        evaluations: The same.
        sweeps: A line for each.
        problems: Files and folders that are damaged, but for those that runs and evaluations name.
    """

    runs: list[Run] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    sweeps: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def collect(folders: Sequence[Path]) -> Collection:
    """Read all that is in folders.

    Args:
        folders: Of runs, sweeps, evaluations, or folders of these.

    Raises:
        UserError: A folder does not exist, or there is nothing in any.
    """
    found = Collection()
    sources: list[tuple[Source, Sweep | None]] = []
    for source in find(folders, found.problems):
        if source.kind == "sweep":
            sources += _points(source.folder, found.problems)
        else:
            sources.append((source, None))
    # a point may be named beside its sweep
    unique = {source.folder: (source, sweep) for source, sweep in sources}
    names = short_names(unique)
    sweeps: dict[Path, tuple[Sweep, list[Run]]] = {}
    for source, sweep in unique.values():
        name = names[source.folder]
        if source.kind == "evaluation":
            found.evaluations.append(read_evaluation(source.folder, name))
            continue
        run = read_run(source.folder, name)
        found.runs.append(run)
        if sweep is not None:
            sweeps.setdefault(sweep.folder, (sweep, []))[1].append(run)
    for sweep, runs in sweeps.values():
        found.sweeps.append(_sweep(sweep, runs, found.problems))
    _best_first(found, sweeps)
    return found


def _points(folder: Path, problems: list[str]) -> list[tuple[Source, Sweep | None]]:
    """The runs of a sweep; those in its folder if it cannot be read."""
    try:
        sweep = load_sweep(folder)
        return [(Source("run", sweep.run(name)), sweep) for name in sweep.points]
    except (UserError, ValueError, TypeError, AttributeError):
        problems.append(f"{folder / 'sweep.json'} is damaged; the runs in its folder are shown")
    runs = sorted(path for path in (folder / "points").glob("*") if path.is_dir())
    return [(Source("run", path), None) for path in runs]


def _sweep(sweep: Sweep, runs: list[Run], problems: list[str]) -> str:
    """A line about a sweep; its runs get the states that it knows."""
    try:
        states = {sweep.run(state.name): state for state in look(sweep)}
    except (UserError, ValueError, AttributeError) as error:
        why = str(error) if isinstance(error, UserError) else "a file of a point is damaged"
        problems.append(f"{sweep.folder}: {why}; states are those of status.json")
        states = {}
    for run in runs:
        if state := states.get(run.folder):
            run.state, run.reason = state.state, state.reason
    counts = Counter(run.state for run in runs)
    stand = ", ".join(f"{number} {state}" for state, number in counts.most_common())
    return f"Sweep {sweep.folder.name}: {len(runs)} points, {stand}; by {sweep.metric}, best first"


def _best_first(found: Collection, sweeps: dict[Path, tuple[Sweep, list[Run]]]) -> None:
    """Order the points of each sweep among themselves."""
    for sweep, runs in sweeps.values():
        sign = -1 if rises(sweep.metric) else 1

        def key(run: Run, metric: str = sweep.metric, sign: int = sign) -> tuple[bool, float]:
            value = run.last(metric)
            return (False, sign * value) if finite(value) else (True, 0.0)

        places = sorted(found.runs.index(run) for run in runs)
        for place, run in zip(places, sorted(runs, key=key), strict=True):
            found.runs[place] = run
