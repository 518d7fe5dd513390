"""What came out: a table of the trainings, their curves, and the baselines beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.bench.accuracy.options import MODELS
from escaip_fairchem.bench.report import environment
from escaip_fairchem.files import write_csv, write_whole
from escaip_fairchem.sweep.states import look
from escaip_fairchem.train.budget import CURVE_NAME
from escaip_fairchem.train.metrics import read_metrics
from escaip_fairchem.train.summary import SUMMARY_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from escaip_fairchem.sweep.store import Sweep

#: Columns of the curves that have trivial models to compare with.
ERRORS = {"val_energy_mae": "energy MAE, eV", "val_forces_mae": "force MAE, eV/A"}
COSINE = "val_forces_cosine_similarity"
SPENT = ("step", "samples", "seconds")
#: What the curves are drawn against.
AXES = {"seconds": "training time, s", "samples": "structures seen"}


@dataclass
class Outcome:
    """A training as it lies in its folder.

    Attributes:
        name: Of the folder.
        model: Key of `MODELS`.
        seed: Of weights and order of batches.
        state: As in status.json.
        reason: Why it did not finish.
        curve: Rows of its evaluations, each at a part of the budget.
        summary: Content of summary.json.
    """

    name: str
    model: str
    seed: int
    state: str
    reason: str | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Of the model."""
        return MODELS[self.model].title

    @property
    def baselines(self) -> dict[str, float]:
        """Errors of the trivial models: element references for energies, zero for forces."""
        metrics = self.summary.get("metrics", {})
        return {name: metrics[name]["baseline"] for name in ERRORS if name in metrics}

    def at(self, axis: str, place: float) -> dict[str, float] | None:
        """A row of the curve where the training had used so much, between two evaluations.

        Args:
            axis: Key of `AXES`.
            place: On it; None is returned before the first evaluation and behind the last.
        """
        places = [row[axis] for row in self.curve]
        if not places or not places[0] <= place <= places[-1]:
            return None
        return {
            name: float(np.interp(place, places, [row[name] for row in self.curve]))
            for name in (*SPENT, *ERRORS, COSINE)
        }


def collect(sweep: Sweep) -> list[Outcome]:
    """The trainings of a folder, in the order of `MODELS`, then by seed."""
    found = []
    for state in look(sweep):
        run, about = sweep.run(state.name), sweep.points[state.name]
        summary = run / SUMMARY_NAME
        found.append(
            Outcome(
                **about,
                name=state.name,
                state=state.state,
                reason=state.reason,
                curve=read_metrics(run / CURVE_NAME),
                summary=json.loads(summary.read_text()) if summary.is_file() else {},
            )
        )
    return sorted(found, key=lambda outcome: (list(MODELS).index(outcome.model), outcome.seed))


def write_tables(found: Sequence[Outcome], folder: Path) -> list[Path]:
    """Write trainings.csv, curves.csv and tables.md.

    Args:
        found: The trainings.
        folder: Where.

    Returns:
        The files.
    """
    where = environment("cpu")
    files = [folder / name for name in ("trainings.csv", "curves.csv", "tables.md")]
    write_csv(files[0], [_row(outcome, where) for outcome in found])
    curves = [(outcome, row) for outcome in found for row in outcome.curve]
    write_csv(files[1], ({"model": o.model, "seed": o.seed, **row} for o, row in curves))
    write_whole(files[2], tables(found) + "\n")
    return files


def _row(outcome: Outcome, where: dict[str, str]) -> dict[str, Any]:
    last, summary = (outcome.curve or [{}])[-1], outcome.summary
    # a GPU's name; of a CPU only how many threads of it
    device, versions = summary.get("device") or "", summary.get("versions", {})
    row = {
        "date": where["date"],
        "hardware": where["hardware"] if device.startswith("cpu") else device,
        "device": device,
        "torch": versions.get("torch"),
        "fairchem_core": versions.get("fairchem_core"),
        "version": versions.get("escaip_fairchem"),
        "commit": versions.get("git_commit"),
        "model": outcome.model,
        "seed": outcome.seed,
        "state": outcome.state,
        "reason": outcome.reason,
        "parameters": summary.get("parameters"),
        "epochs": summary.get("epochs"),
        **{name: last.get(name) for name in (*SPENT, *ERRORS, COSINE)},
    }
    return row | {f"{name}_baseline": value for name, value in outcome.baselines.items()}


def tables(found: Sequence[Outcome]) -> str:
    """Markdown: how each model ended; and all of them where the first of them ends.

    Of several seeds there are the mean and, in brackets, the smallest and largest value.
    """
    ended = [outcome for outcome in found if outcome.state == "finished"]
    lines = _table(found, "At the end", lambda outcome: (outcome.curve or [None])[-1])
    for axis, label in AXES.items():
        ends = [outcome.curve[-1][axis] for outcome in ended]
        if ends and max(ends) > 1.1 * min(ends):
            first = min(ends)
            name = f"At {label} {first:,.0f}, where the first ends; the others are under way"
            lines += ["", *_table(ended, name, lambda o, a=axis, p=first: o.at(a, p))]
    return "\n".join(lines)


def _table(found: Sequence[Outcome], name: str, row_of: Any) -> list[str]:
    lines = [
        f"{name}:",
        "",
        f"| model | parameters | steps | structures | seconds | {' | '.join(ERRORS.values())} "
        "| force cosine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(outcome.model for outcome in found):
        group = [outcome for outcome in found if outcome.model == model]
        good = [outcome for outcome in group if outcome.state == "finished"]
        lines += [
            f"| {outcome.title} | {outcome.name}: {outcome.state}: {outcome.reason} "
            + "| " * 6
            + "|"
            for outcome in group
            if outcome not in good
        ]
        if good:
            lines.append(_line(good, [row_of(outcome) for outcome in good]))
    baselines = next((outcome.baselines for outcome in found if outcome.baselines), {})
    trivial = " | ".join(f"{baselines.get(key, float('nan')):.4g}" for key in ERRORS)
    return [*lines, f"| element references, zero forces | | | | | {trivial} | |"]


def _line(group: list[Outcome], rows: list[dict[str, float] | None]) -> str:
    cells = [group[0].title, f"{group[0].summary['parameters']:,}"]
    known = [row for row in rows if row is not None]
    if not known:
        return f"| {' | '.join([*cells, 'not evaluated yet'])} {'| ' * 5}|"
    cells += [f"{mean(row[key] for row in known):,.0f}" for key in SPENT]
    for key in (*ERRORS, COSINE):
        values = [row[key] for row in known]
        baseline = group[0].baselines.get(key)
        text = f"{mean(values):.4g}"
        if len(values) > 1:
            text += f" ({min(values):.4g} to {max(values):.4g})"
        cells.append(text + (f", {mean(values) / baseline:.2f} of baseline" if baseline else ""))
    return f"| {' | '.join(cells)} |"
