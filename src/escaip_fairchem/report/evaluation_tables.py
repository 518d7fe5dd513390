"""Tables of evaluations, and of errors by element."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from escaip_fairchem.describe import rises
from escaip_fairchem.report.run import finite, is_number
from escaip_fairchem.report.table import Cell, Row, Table, without_empty_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from escaip_fairchem.report.evaluation import Evaluation
    from escaip_fairchem.report.run import Run

_COUNTS = ("structures", "atoms", "free_atoms", "not_finite")
# Titles, and the columns of the model, of the trivial model, and of how many were counted.
_BY_ELEMENT = {
    "force MAE by element, eV/A": ("force_mae_eV_per_A", "force_zero_eV_per_A", "free_atoms"),
    "energy MAE by element, eV/atom": (
        "energy_mae_eV_per_atom", "energy_reference_eV_per_atom", "structures",
    ),
}  # fmt: skip


def evaluated(evaluations: Sequence[Evaluation]) -> Table:
    """Metrics of each split."""
    splits = [(found, split) for found in evaluations for split in found.splits]
    entries = [
        (f"{found.name}: {split.name}", split.counts, split.metrics) for found, split in splits
    ]
    bases = {str(found.content.get("baseline")) for found in evaluations if found.content}
    on = {
        f"{found.name} on {found.content['forces_on']}"
        for found in evaluations
        if "forces_on" in found.content
    }
    note = f"Below each value, that of the trivial model ({'; '.join(sorted(bases))}). "
    return _metrics_table("evaluation: split", entries, note + f"Forces: {', '.join(sorted(on))}.")


def subsets(evaluations: Sequence[Evaluation]) -> Table | None:
    """Metrics of each subset; None without any."""
    entries = [
        (f"{found.name}: {split.name}: {name or '(none)'}", {}, metrics)
        for found in evaluations
        for split in found.splits
        for name, metrics in sorted(split.subsets.items())
    ]
    if not entries:
        return None
    table = _metrics_table("evaluation: split: subset", entries, "")
    table.title = "By subset"
    return table


def _metrics_table(title: str, entries: list[tuple[str, dict, dict]], note: str) -> Table:
    names = list(dict.fromkeys(name for _, _, metrics in entries for name in metrics))
    columns = [title, *(name.replace("_", " ") for name in _COUNTS)]
    for name in names:
        unit = next((str(m[name].get("unit") or "") for _, _, m in entries if name in m), "")
        columns.append(f"{name}, {unit}" if unit else name)
    rows = []
    for label, counts, metrics in entries:
        given = [counts.get(name) for name in _COUNTS]
        cells = [count if is_number(count) else None for count in given]
        for name in names:
            metric = metrics.get(name)
            if metric is None:
                cells.append(None)
                continue
            value, baseline = metric.get("value"), metric.get("baseline")
            known = baseline is not None and not rises(name)
            notes = [("baseline ", baseline, "")] if known else []
            cells.append(Cell("nan" if value is None else value, notes))
        rows.append(Row([label, *cells]))
    return without_empty_columns(Table(columns, rows, note=note))


def by_element(runs: Sequence[Run], evaluations: Sequence[Evaluation]) -> list[Table]:
    """Errors of each element; a table holds those that are over the same structures."""
    sources = [(run.name, place, run.elements) for place, run in enumerate(runs) if run.elements]
    sources += [
        (f"{found.name}: {split.name}", None, split.elements)
        for found in evaluations
        for split in found.splits
        if split.elements
    ]
    tables = []
    for title, (model, trivial, count) in _BY_ELEMENT.items():
        alike: dict[Any, list[Any]] = defaultdict(list)
        for source in sources:
            alike[_data(source[2], trivial, count)].append(source)
        tables += [_elements(title, group, model, trivial, count) for group in alike.values()]
    return tables


def _data(rows: list[dict[str, Any]], trivial: str, count: str) -> Any:
    """What tells data apart: its elements, their numbers, the errors of the trivial model."""
    return tuple(
        (
            row["element"],
            row[count] if finite(row.get(count)) else None,
            f"{row[trivial]:.6g}" if finite(row.get(trivial)) else None,
        )
        for row in rows
    )


def _elements(title: str, sources: list[Any], model: str, trivial: str, count: str) -> Table:
    rows = []
    for place, first in enumerate(sources[0][2]):
        values = [row[place].get(model) for _, _, row in sources]
        cells = [value if is_number(value) else None for value in values]
        known = [first.get(key) for key in (count, trivial)]
        rows.append(Row([first["element"], *(v if is_number(v) else None for v in known), *cells]))
    columns = ["element", count.replace("_", " "), "baseline", *(name for name, _, _ in sources)]
    return Table(columns, rows, [None, None, None, *(place for _, place, _ in sources)], title)
