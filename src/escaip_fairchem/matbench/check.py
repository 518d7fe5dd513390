"""Check the benchmark's two files before they are uploaded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.data import atomic_numbers
from ase.formula import Formula

from escaip_fairchem.errors import UserError
from escaip_fairchem.matbench.files import read_lines, read_summary
from escaip_fairchem.matbench.metrics import LARGEST_ERROR, metrics_of, read_predictions, text
from escaip_fairchem.submission.report import Report

if TYPE_CHECKING:
    from pathlib import Path

    from escaip_fairchem.matbench.files import Summary

KINDS = {"discovery": "discovery.csv.gz", "geo_opt": "geo-opt.jsonl.gz"}
_KEYS = {"material_id", "structure", "energy", "converged", "n_steps"}
_SHOWN = 3


@dataclass
class _GeoOpt:
    """What is kept of the relaxed structures.

    Attributes:
        formulas: Number of atoms of each element, by id.
        converged: How many are.
        bad: Ids by what is wrong with them.
    """

    formulas: dict[str, dict[str, int]] = field(default_factory=dict)
    converged: int = 0
    bad: dict[str, list[str]] = field(default_factory=dict)

    def note(self, what: str, material: str) -> None:
        self.bad.setdefault(what, []).append(material)


def find_artifact(folder: Path, kind: str) -> Path:
    """The file of a kind in a folder, named as the benchmark wants it.

    Args:
        folder: Where to look.
        kind: ``discovery`` or ``geo_opt``.

    Raises:
        UserError: There is none, or more than one.
    """
    name = KINDS[kind]
    named = re.compile(r"\d{4}-\d\d-\d\d-" + re.escape(name))
    found = [path for path in sorted(folder.glob(f"*{name}")) if named.fullmatch(path.name)]
    if len(found) != 1:
        raise UserError(f"{folder} has {len(found)} files named <yyyy-mm-dd>-{name}; one is wanted")
    return found[0]


def check(folder: Path, summary: Path | None = None) -> Report:
    """Check both files: names, ids, numbers, structures, and that they belong together.

    Args:
        folder: Where they are.
        summary: WBM's summary, for the ids and compositions of the benchmark and the metrics.

    Raises:
        UserError: A file is missing, or cannot be read.
    """
    report = Report()
    known = read_summary(summary) if summary else None
    found = read_predictions(find_artifact(folder, "discovery"))
    ends = _read_ends(find_artifact(folder, "geo_opt"))
    energies = np.array(list(found.values()))
    there = np.isfinite(energies)
    report.table.append(
        f"{len(found)} materials, {int((~there).sum())} without a prediction, "
        f"{ends.converged} of {len(ends.formulas)} relaxations converged"
    )
    if np.isinf(energies).any():
        _problem(report, "infinite", [m for m, e in found.items() if np.isinf(e)])
    if not there.any():
        report.problems.append("no material has a prediction")
    elif there.sum() > 1 and np.ptp(energies[there]) == 0:
        report.problems.append("all formation energies are equal")
    for what, materials in ends.bad.items():
        _problem(report, what, materials)
    predicted = {m for m, e in found.items() if np.isfinite(e)}
    _problem(report, "predicted, without a relaxed structure", predicted - set(ends.formulas))
    _problem(report, "relaxed, without a prediction", set(ends.formulas) - predicted)
    if ends.formulas and ends.converged < 0.5 * len(ends.formulas):
        report.remarks.append("less than half of the relaxations converged")
    if known is not None:
        _check_known(report, found, ends, known)
    return report


def _check_known(report: Report, found: dict[str, float], ends: _GeoOpt, known: Summary) -> None:
    ids = set(known.ids)
    _problem(report, "not in WBM", set(found) - ids)
    _problem(report, "of WBM, but not in the file", ids - set(found))
    formulas = dict(zip(known.ids, known.formulas, strict=True))
    _problem(
        report,
        "relaxed with another composition than WBM's",
        [m for m, counts in ends.formulas.items() if m in ids and counts != _count(formulas[m])],
    )
    if set(found) - ids:
        return
    e_form = dict(zip(known.ids, known.e_form, strict=True))
    absurd = [m for m, e in found.items() if abs(e - e_form[m]) > LARGEST_ERROR]
    if absurd:
        report.remarks.append(
            f"{len(absurd)} formation energies are more than {LARGEST_ERROR:g} eV/atom off DFT, "
            f"which the benchmark takes as missing: {_some(absurd)}"
        )
    report.table.append(text(metrics_of(found, known)))


def _read_ends(path: Path) -> _GeoOpt:
    ends = _GeoOpt()
    for number, line in enumerate(read_lines(path), 1):
        try:
            row = json.loads(line)
            material = row["material_id"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: line {number} is no JSON object with material_id") from None
        if material in ends.formulas:
            ends.note("relaxed twice", material)
        if set(row) != _KEYS:
            ends.note(f"with other keys than {', '.join(sorted(_KEYS))}", material)
        ends.formulas[material] = _check_structure(ends, material, row.get("structure"))
        energy, steps = row.get("energy"), row.get("n_steps")
        if not isinstance(energy, int | float) or not np.isfinite(energy):
            ends.note("with an energy that is no number", material)
        if not isinstance(row.get("converged"), bool) or not isinstance(steps, int) or steps < 0:
            ends.note("without converged (true or false) or n_steps", material)
        ends.converged += row.get("converged") is True
    return ends


def _check_structure(ends: _GeoOpt, material: str, structure: Any) -> dict[str, int]:
    """Look at pymatgen's description of a crystal; returns the number of each element."""
    counts: dict[str, int] = {}
    try:
        cell = np.array(structure["lattice"]["matrix"], float)
        places = np.array([site["xyz"] for site in structure["sites"]], float)
        for site in structure["sites"]:
            (species,) = site["species"]
            counts[species["element"]] = counts.get(species["element"], 0) + 1
    except (KeyError, TypeError, ValueError):
        ends.note("whose structure is none of pymatgen's, or disordered", material)
        return counts
    if cell.shape != (3, 3) or places.shape != (len(structure["sites"]), 3) or not len(places):
        ends.note("whose cell or positions have a wrong shape", material)
    elif not np.isfinite(cell).all() or not np.isfinite(places).all():
        ends.note("with a position or cell that is no number", material)
    elif abs(np.linalg.det(cell)) < 1:  # A^3; less than any atom takes
        ends.note("whose cell has no volume", material)
    if not set(counts) <= set(atomic_numbers):
        ends.note("with an unknown element", material)
    return counts


def _count(formula: str) -> dict[str, int]:
    return Formula(formula.replace(" ", "")).count()


def _problem(report: Report, what: str, materials: Any) -> None:
    if materials:
        report.problems.append(f"{len(materials)} materials {what}: {_some(materials)}")


def _some(materials: Any) -> str:
    shown = sorted(materials)[:_SHOWN]
    return ", ".join(shown) + (" ..." if len(materials) > _SHOWN else "")
