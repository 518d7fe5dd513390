"""Metrics as text."""

from __future__ import annotations

from typing import Any

_TITLES = {
    "energy_mae": "energy MAE",
    "energy_per_atom_mae": "energy MAE",
    "forces_mae": "force MAE",
    "forces_cosine_similarity": "force cosine",
    "forces_magnitude_error": "force size MAE",
    "efwt": "EFwT",
    "stress_mae": "stress MAE",
}
_NO_BASELINE = "forces_cosine_similarity"


def metrics_table(result: dict[str, Any], *, milli: bool) -> str:
    """Lines of metrics, a column each for splits and subsets, under each the trivial model's.

    Args:
        result: Content of metrics.json.
        milli: Give meV in place of eV.
    """
    lines = [f"checkpoint: {result['checkpoint']}; forces on {result['forces_on']}"]
    splits = result["splits"]
    columns = {name: (split["metrics"], split["counts"]) for name, split in splits.items()}
    if "average" in result:
        columns["average"] = result["average"], None
    lines += _table(columns, milli=milli)
    for name, split in splits.items():
        if "by_subset" in split:
            lines += ["", f"subsets of {name}", *_subsets(split["by_subset"], milli=milli)]
    lines.append(f"baseline: {result['baseline']}")
    return "\n".join(lines)


def _table(columns: dict[str, tuple[dict, dict | None]], *, milli: bool) -> list[str]:
    """One line a metric and its baseline, one column a split."""
    width = max(12, *(len(name) + 2 for name in columns))
    lines = [f"{'':<26}" + "".join(f"{name:>{width}}" for name in columns)]
    for key in ("structures", "atoms", "free_atoms", "not_finite"):
        counts = [counts and counts[key] for _, counts in columns.values()]
        if key == "not_finite" and not any(counts):
            continue
        cells = (f"{'' if count is None else format(count, ','):>{width}}" for count in counts)
        lines.append(f"{key.replace('_', ' '):<26}" + "".join(cells))
    names = dict.fromkeys(name for metrics, _ in columns.values() for name in metrics)
    for name in names:
        for key, title in (("value", _title(name, columns, milli)), ("baseline", "  baseline")):
            if key == "baseline" and name == _NO_BASELINE:
                continue
            cells = (_number(metrics.get(name), key, milli) for metrics, _ in columns.values())
            lines.append(f"{title:<26}" + "".join(f"{cell:>{width}}" for cell in cells))
    return lines


def _subsets(subsets: dict[str, dict], *, milli: bool) -> list[str]:
    """One line a subset: structures, energy per atom and forces, each with the baseline."""
    shown = ("energy_per_atom_mae", "forces_mae")
    width = max(map(len, subsets)) + 2
    unit = "meV" if milli else "eV"
    heads = (f"energy, {unit}/atom", "baseline", f"force, {unit}/A", "baseline")
    lines = [f"{'':<{width}}{'structures':>12}" + "".join(f"{head:>18}" for head in heads)]
    for name, metrics in sorted(subsets.items()):
        cells = [
            _number(metrics.get(m), key, milli) for m in shown for key in ("value", "baseline")
        ]
        count = metrics.get("energy_mae", {"count": 0})["count"]
        line = f"{name or '(none)':<{width}}{count:>12,}" + "".join(f"{cell:>18}" for cell in cells)
        lines.append(line)
    return lines


def _title(name: str, columns: dict[str, tuple[dict, Any]], milli: bool) -> str:
    unit = next(metrics[name]["unit"] for metrics, _ in columns.values() if name in metrics)
    unit = f"m{unit}" if unit and milli else unit
    return f"{_TITLES[name]}, {unit}" if unit else _TITLES[name]


def _number(metric: dict[str, Any] | None, key: str, milli: bool) -> str:
    if metric is None:
        return ""
    if metric[key] is None:
        return "nan"
    return f"{metric[key] * (1000 if milli and metric['unit'] else 1):.5g}"
