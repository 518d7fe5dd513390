"""Compare predictions with labels: metrics.json, a table, figures of each split."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fairchem.core.common import distutils
from fairchem.core.components.reducer import Reducer

from escaip_fairchem.describe import describe_task, find_checkpoint, load_safely
from escaip_fairchem.errors import UserError
from escaip_fairchem.files import write_whole
from escaip_fairchem.predict.metrics import COUNTED, UNITS, means
from escaip_fairchem.predict.parts import Plan, missing
from escaip_fairchem.predict.references import energy_references
from escaip_fairchem.predict.runner import PredictRunner
from escaip_fairchem.predict.split_errors import errors_of
from escaip_fairchem.predict.table import metrics_table
from escaip_fairchem.train.summary import versions

if TYPE_CHECKING:
    from escaip_fairchem.predict.metrics import Sums

METRICS_NAME = "metrics.json"


class EvaluateReducer(Reducer):
    """Evaluates what `PredictRunner` has predicted, each structure once, in float64.

    Writes into ``job.run_dir/job.timestamp_id``: ``metrics.json``, and in a folder for each split
    ``parity.png``, ``errors.png``, ``errors_by_element.png`` and ``errors_by_element.csv``. The
    metrics are also printed.

    Args:
        free_atoms_only: Evaluate forces on free atoms, as OC20 does; else on all.
        milli: Print meV in place of eV; the file has eV.
    """

    def __init__(self, *, free_atoms_only: bool = True, milli: bool = False) -> None:
        self.free_atoms_only = free_atoms_only
        self.milli = milli

    @property
    def runner_type(self) -> type[PredictRunner]:
        """The runner whose results are reduced."""
        return PredictRunner

    def reduce(self) -> None:
        """Evaluate, write and print; on one rank.

        Raises:
            UserError: If predictions are missing, or a split has no labels.
        """
        if distutils.is_master():
            evaluate(
                Path(self.job_config.metadata.results_dir),
                free_atoms_only=self.free_atoms_only,
                milli=self.milli,
            )

    def save_state(self, _location: str, _is_preemption: bool = False) -> bool:
        """Nothing to do."""
        return True

    def load_state(self, _location: str | None) -> None:
        """Nothing to do."""


def evaluate(
    folder: str | Path, *, free_atoms_only: bool = True, milli: bool = False
) -> dict[str, Any]:
    """Evaluate a folder of predictions, and print the metrics.

    Args:
        folder: With plan.json; metrics.json and the figures go into the folder above it.
        free_atoms_only: Evaluate forces on free atoms; else on all.
        milli: Print meV in place of eV.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: If predictions are missing, or a split has no labels.
    """
    folder = Path(folder)
    plan = Plan.read(folder)
    absent = missing(folder)
    if absent:
        raise UserError(
            f"{len(absent)} of {len(plan.parts())} parts are missing in {folder}, the first is "
            f"part {absent[0][1]} of {absent[0][0]}; the same command again goes on"
        )
    checkpoint = load_safely(find_checkpoint(Path(plan.checkpoint)))
    tasks = [describe_task(task) for task in checkpoint.tasks_config]
    trivial = energy_references(tasks, plan.task)
    splits = {}
    for name in plan.splits:
        errors = errors_of(folder, plan, name, trivial, free_atoms_only=free_atoms_only)
        errors.draw(folder.parent / name)
        splits[name] = {
            "counts": errors.counts,
            "metrics": metrics_of(errors.sums),
            **{kind: grouped(*groups) for kind, groups in errors.groups().items()},
            "by_element": [asdict(row) for row in errors.elements.rows()],
        }
    result = {
        "checkpoint": plan.checkpoint,
        "checkpoint_sha256": plan.checkpoint_sha256,
        "forces_on": "free atoms" if free_atoms_only else "all atoms",
        "baseline": "element references and mean of the checkpoint for the energy, zero for forces "
        "and stress",
        "settings": plan.settings,
        "splits": splits,
        **({"average": average(splits)} if len(splits) > 1 else {}),
        **versions(),
    }
    path = folder.parent / METRICS_NAME
    write_whole(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(metrics_table(result, milli=milli), f"written: {path}", sep="\n", flush=True)
    return result


def metrics_of(sums: Sums, group: int = 0) -> dict[str, dict[str, Any]]:
    """Metrics with units, baselines and what they are means over.

    Args:
        sums: As `escaip_fairchem.predict.metrics` adds them up.
        group: Of which group.

    Returns:
        By metric: value and baseline (None for NaN), unit, number, and of what.
    """
    return {
        name: {
            "value": _or_none(value),
            "baseline": _or_none(baseline),
            "unit": UNITS[name],
            "count": count,
            "of": COUNTED[name],
        }
        for name, (value, baseline, count) in means(sums, group).items()
        if count
    }


def grouped(sums: Sums, names: list[str]) -> dict[str, dict[str, Any]]:
    """Metrics of each group in which anything was counted."""
    found = {name: metrics_of(sums, group) for group, name in enumerate(names)}
    return {name: metrics for name, metrics in found.items() if metrics}


def average(splits: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Mean of the metrics over splits, each of the same weight, of those that all splits have."""
    every = [split["metrics"] for split in splits.values()]
    common = [name for name in every[0] if all(name in metrics for metrics in every)]

    def mean(name: str, key: str) -> float | None:
        values = [metrics[name][key] for metrics in every]
        return None if None in values else float(np.mean(values))

    return {
        name: {
            "value": mean(name, "value"),
            "baseline": mean(name, "baseline"),
            "unit": UNITS[name],
            "of": "splits",
            "count": len(every),
        }
        for name in common
    }


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
