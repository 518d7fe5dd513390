"""Tables that compare runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from escaip_fairchem.describe import rises
from escaip_fairchem.report.differences import differences
from escaip_fairchem.report.run import finite
from escaip_fairchem.report.table import Cell, Note, Row, Table, without_empty_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from escaip_fairchem.report.run import Run

_UNIT = "runner.train_eval_unit"
_DATA = "runner.train_dataloader.dataset.src"
_VAL = "runner.eval_dataloader.dataset.src"


def overview(runs: Sequence[Run]) -> Table:
    """How each run stands, and what it is."""
    rows = []
    for place, run in enumerate(runs):
        status = run.status
        steps = run.said("steps")
        total = status.total_steps
        steps = Cell(
            status.step or run.last("step") if steps is None else steps,
            [] if total is None else [("of ", total, "")],
        )
        state = Cell(
            "unknown" if run.state == "absent" else run.state,
            [(run.reason, None, "")] if run.reason else [],
            state=True,
        )
        epochs = run.said("epochs")
        cells = [
            run.name, state, steps, (status.epoch or None) if epochs is None else epochs,
            run.last("samples"), run.last("wall_time_s"), run.said("parameters"),
            Cell(_model(run), wide=True), Cell((run.config or {}).get(_DATA), wide=True),
        ]  # fmt: skip
        rows.append(Row(cells, place))
    columns = ["run", "state", "steps", "epochs", "samples", "time, s", "parameters", "model"]
    note = "time: training, validation and checkpoints together; samples: structures seen"
    return without_empty_columns(Table([*columns, "data"], rows, note=note))


def _model(run: Run) -> str | None:
    """The model in a few words."""
    if run.config is None:
        return None
    known = {
        key: run.config.get(f"{_UNIT}.model.backbone.{key}")
        for key in ("preset", "model", "hidden_size", "num_layers")
    }
    name = known["preset"] or (known["model"] or "").rpartition(".")[2]
    size = f"hidden {known['hidden_size']}, {known['num_layers']} layers"
    return (f"{name}, {size}" if known["hidden_size"] else name) or None


def differing(runs: Sequence[Run]) -> Table | None:
    """Keys in which configurations differ; None if there are not two to compare."""
    # the longer side goes down
    if sum(run.config is not None for run in runs) < 2:
        return None
    found = differences([run.config for run in runs])
    note = (
        "From canonical_config.yaml, where everything is resolved; a dash is a key that is not "
        "there, grey a value like that of the first run. Left out: names, folders, "
        "time stamps, job metadata."
    )
    cells = {key: [_setting(value, values[0]) for value in values] for key, values in found.items()}
    if len(runs) <= max(6, len(found)):
        rows = [Row([key, *values]) for key, values in cells.items()]
        return Table(
            ["key", *(run.name for run in runs)], rows, [None, *range(len(runs))], note=note
        )
    rows = [
        Row([run.name, *(values[place] for values in cells.values())], place)
        for place, run in enumerate(runs)
    ]
    return Table(["run", *found], rows, note=note)


def _setting(value: str | None, first: str | None) -> Cell:
    return Cell(value, wide=True, soft=value == first)


def final_metrics(runs: Sequence[Run]) -> Table:
    """Last value of each metric, with the best one and that of the trivial model."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    columns, baselines = ["run"], {}
    for name in names:
        values = [run.metrics[name] for run in runs if name in run.metrics]
        unit = next((value["unit"] for value in values if value["unit"]), "")
        columns.append(f"{name}, {unit}" if unit else name)
        baselines[name] = {value.get("baseline") for value in values} - {None}
    common = all(len(values) <= 1 for values in baselines.values())
    rows = []
    for place, run in enumerate(runs):
        cells = [_metric(run, name, common=common) for name in names]
        rows.append(Row([run.name, *cells], place))
    comparable = common and len({(run.config or {}).get(_VAL) for run in runs if run.metrics}) == 1
    for column, name in enumerate(names, start=1):
        # losses depend on settings
        if comparable and not name.endswith("loss"):
            _mark_best([row.cells[column] for row in rows], rising=rises(name))
    if common and any(baselines.values()):
        trivial = [next(iter(baselines[name]), None) for name in names]
        rows.append(Row(["baseline", *trivial]))
    note = (
        "Last values; below them the best one and its step, and the last as a part of the "
        "baseline: element references for the energy, zero for forces and stress. Bold: the best "
        "of these runs, where all have the same validation set. Runs without summary.json: from "
        "metrics.csv."
    )
    return without_empty_columns(Table(columns, rows, note=note))


def _metric(run: Run, name: str, *, common: bool) -> Any:
    metric = run.metrics.get(name)
    if metric is None:
        return None
    last, baseline = metric.get("last"), metric.get("baseline")
    notes: list[Note] = []
    if metric.get("best") is not None and metric["best"] != last:
        notes.append(("best ", metric["best"], f" at {metric['best_step']}"))
    if finite(last) and finite(baseline) and baseline:
        notes.append(("", last / baseline, " of baseline"))
        if not common:
            notes.append(("baseline ", baseline, ""))
    return Cell("nan" if last is None else last, notes)


def _mark_best(cells: list[Cell], *, rising: bool) -> None:
    known = [cell for cell in cells if finite(cell.value)]
    values = {cell.value for cell in known}
    if len(values) > 1:
        best = (max if rising else min)(values)
        for cell in known:
            cell.best = cell.value == best


def speed(runs: Sequence[Run]) -> Table:
    """Speed and memory."""
    keys = ("steps_per_s", "atoms_per_s", "peak_memory_GiB", "device", "ranks")
    rows = []
    for place, run in enumerate(runs):
        cells = {key: run.said(key) for key in keys}
        if cells["steps_per_s"] is None:
            cells["steps_per_s"] = run.status.steps_per_second
        if cells["peak_memory_GiB"] is None and str(cells["device"]).startswith("cpu"):
            cells["peak_memory_GiB"] = "not measured on a CPU"
        rows.append(Row([run.name, *cells.values()], place))
    columns = ["run", "steps/s", "atoms/s", "peak memory, GiB", "device", "ranks"]
    note = (
        "Training alone, the loading of batches included, without validation and checkpoints. "
        "Of a run without summary.json: over its last steps."
    )
    return without_empty_columns(Table(columns, rows, note=note))


def origin(runs: Sequence[Run]) -> Table:
    """What computed each run, and where it is."""
    packages = list(dict.fromkeys(name for run in runs for name in run.versions()))
    rows = []
    for place, run in enumerate(runs):
        inside = run.checkpoint
        if inside is not None and inside.is_relative_to(run.folder):
            inside = inside.relative_to(run.folder)
        cells = [
            Cell(str(run.folder), wide=True),
            Cell(None if inside is None else str(inside), wide=True),
            *(Cell(run.versions().get(name), wide=name == "git_commit") for name in packages),
        ]
        rows.append(Row([run.name, *cells], place))
    titles = [name.replace("_", " ") for name in packages]
    return Table(["run", "folder", "checkpoint", *titles], rows)
