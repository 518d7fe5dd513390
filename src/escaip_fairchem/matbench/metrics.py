"""The benchmark's discovery metrics, from a file of predictions and WBM's summary."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

import numpy as np

from escaip_fairchem.errors import UserError
from escaip_fairchem.matbench.files import read_lines, read_summary

if TYPE_CHECKING:
    from pathlib import Path

    from escaip_fairchem.matbench.files import Summary

#: Predictions that are further off DFT do not count as predictions, eV/atom.
LARGEST_ERROR = 5.0
MOST_STABLE = 10_000
#: Subsets as the benchmark's YAML names them.
SUBSETS = ("full_test_set", "unique_prototypes", "most_stable_10k")


def read_predictions(path: Path) -> dict[str, float]:
    """Formation energies by id, eV/atom; NaN where there is none.

    Raises:
        UserError: It is no such file, or names a material twice.
    """
    rows = csv.DictReader(read_lines(path))
    if not {"material_id", "e_form_per_atom"} <= set(rows.fieldnames or ()):
        raise UserError(f"{path} has no columns material_id and e_form_per_atom")
    found: dict[str, float] = {}
    for row in rows:
        if row["material_id"] in found:
            raise UserError(f"{path} names {row['material_id']} twice")
        try:
            found[row["material_id"]] = float(row["e_form_per_atom"] or "nan")
        except (ValueError, TypeError):
            raise UserError(
                f"{path}: {row['material_id']} has {row['e_form_per_atom']!r} for an energy"
            ) from None
    return found


def discovery_metrics(predictions: Path, summary: Path) -> dict[str, dict[str, float]]:
    """Metrics of each subset, as the benchmark computes them.

    Stable is what lies on or below DFT's hull; a material without a prediction counts as
    predicted unstable, and not in MAE, RMSE (eV/atom) and R2. Distances are rounded to three
    decimals first, but not those behind DAF's denominator for the two smaller subsets.

    Args:
        predictions: ``<date>-discovery.csv.gz``.
        summary: WBM's summary, as published.

    Raises:
        UserError: A file is not what it should be, or a material is not in the summary.
    """
    return metrics_of(read_predictions(predictions), read_summary(summary))


def metrics_of(found: dict[str, float], summary: Summary) -> dict[str, dict[str, float]]:
    """As `discovery_metrics`, of what was read."""
    foreign = set(found) - set(summary.ids)
    if foreign:
        raise UserError(f"{len(foreign)} materials are not in WBM, such as {min(foreign)}")
    e_form = np.array([found.get(material, np.nan) for material in summary.ids])
    e_form[np.abs(e_form - summary.e_form) > LARGEST_ERROR] = np.nan
    true = summary.e_hull.round(3)
    predicted = true + e_form.round(3) - summary.e_form.round(3)
    unique = np.flatnonzero(summary.unique)
    # numpy, too, puts NaN last
    stable = unique[np.argsort(predicted[unique], kind="stable")][:MOST_STABLE]
    chosen = dict(zip(SUBSETS, (np.arange(len(true)), unique, stable), strict=True))
    table = {name: _metrics(true[rows], predicted[rows]) for name, rows in chosen.items()}
    prevalence = float((summary.e_hull[summary.unique] <= 0).mean())
    for name in SUBSETS[1:]:
        table[name]["DAF"] = _ratio(table[name]["Precision"], prevalence)
    return table


def _metrics(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Of some materials, by their distances to the hull, eV/atom."""
    stable, called = true <= 0, predicted <= 0  # NaN is not
    tp, fp = int((stable & called).sum()), int((~stable & called).sum())
    fn, tn = int((stable & ~called).sum()), int((~stable & ~called).sum())
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    there = np.isfinite(predicted)
    errors = (predicted - true)[there]
    spread = ((true[there] - true[there].mean()) ** 2).sum() if there.any() else 0.0
    return {
        "F1": _ratio(2 * precision * recall, precision + recall),
        "DAF": _ratio(precision, _ratio(tp + fn, len(true))),
        "Precision": precision,
        "Recall": recall,
        "Accuracy": _ratio(tp + tn, len(true)),
        "TPR": recall,
        "FPR": _ratio(fp, fp + tn),
        "TNR": _ratio(tn, fp + tn),
        "FNR": _ratio(fn, tp + fn),
        "TP": tp,
        "FP": fp,
        "TN": tn,
        "FN": fn,
        "MAE": _ratio(float(np.abs(errors).sum()), len(errors)),
        "RMSE": _ratio(float((errors**2).sum()), len(errors)) ** 0.5,
        "R2": 1 - _ratio(float((errors**2).sum()), spread),
        "missing_preds": int((~there).sum()),
    }


def _ratio(above: float, below: float) -> float:
    return above / below if below else float("nan")


def text(table: dict[str, dict[str, float]]) -> str:
    """The table, a line for each metric."""
    lines = [f"{'':<14}" + "".join(f"{name:>18}" for name in table)]
    for metric in next(iter(table.values())):
        values = (of[metric] for of in table.values())
        lines.append(
            f"{metric:<14}"
            + "".join(f"{v:>18}" if isinstance(v, int) else f"{v:>18.3f}" for v in values)
        )
    return "\n".join(lines)
