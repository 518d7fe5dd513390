"""One model on several data sets: forces first, energies after a shift of each element.

Energies of different DFT settings, and total beside adsorption energies, have different zeros.
What a model can be asked for there is what the composition does not already tell: a shift of each
element is fitted to label minus prediction, and the error is that of structures which the fit has
not seen. The same fit without the model, to the labels alone, is the baseline.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fairchem.core.common import distutils

from escaip_fairchem.errors import UserError
from escaip_fairchem.predict.data import join
from escaip_fairchem.predict.evaluate import EvaluateReducer
from escaip_fairchem.predict.metrics import means
from escaip_fairchem.predict.parts import Plan, missing, read_split
from escaip_fairchem.predict.split_errors import errors_of
from escaip_fairchem.tables import writing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from escaip_fairchem.predict.data import Arrays

FOLDS = 5
_NOTHING = np.zeros(256), 0.0  # no references: energies come after shifts
TABLE_NAME = "domains.csv"
WHAT = (
    "forces are compared as they are; energies after a shift of each element, fitted without the "
    f"structures that are evaluated ({FOLDS} folds), since zeros of DFT settings differ; none "
    "where there are not more structures than elements"
)


class DomainsReducer(EvaluateReducer):
    """Evaluates as `EvaluateReducer`, and puts the data sets into one table, ``domains.csv``."""

    def reduce(self) -> None:
        """Evaluate, write and print; on one rank.

        Raises:
            UserError: If predictions are missing, or a split has no labels.
        """
        super().reduce()
        if distutils.is_master():
            folder = Path(self.job_config.metadata.results_dir)
            run(folder, folder.parent / TABLE_NAME, free_atoms_only=self.free_atoms_only)


def run(folder: Path, out: Path, *, free_atoms_only: bool = True) -> list[dict[str, Any]]:
    """Make the table of predictions that are there.

    Args:
        folder: Of predictions, or the folder above.
        out: The table.
        free_atoms_only: Evaluate forces on free atoms; else on all.

    Returns:
        A row for each data set.

    Raises:
        UserError: No predictions, or some are missing.
    """
    writing.require_writable(out)
    folder = folder / "results" if (folder / "results").is_dir() else folder
    plan = Plan.read(folder)
    if missing(folder):
        raise UserError(f"parts are missing in {folder}; give the same command again")
    rows = []
    for name in plan.splits:
        errors = errors_of(folder, plan, name, _NOTHING, free_atoms_only=free_atoms_only)
        forces = forces_of(means(errors.sums))
        counts = {
            "structures": errors.counts["structures"],
            "elements": len(errors.elements.rows()),
        }
        energies = energies_of(join(list(read_split(folder, name))))
        rows.append({"data": name, "checkpoint": plan.checkpoint, **counts, **forces, **energies})
    writing.write_rows(rows, out)
    print(writing.text_table(rows, [c for c in rows[0] if c != "checkpoint"]))
    print(WHAT, f"written: {out}, {draw(rows, out)}", sep="\n")
    return rows


def forces_of(found: Mapping[str, tuple[float, float, int]]) -> dict[str, float | None]:
    """Errors of forces beside those of zero forces, and their quotient.

    Args:
        found: Metrics with those of the trivial model, as `escaip_fairchem.predict.metrics.means`.
    """
    model, zero, _ = found["forces_mae"]
    return {
        "force_mae": model,
        "force_mae_of_zero": zero,
        "force_mae_relative": model / zero if zero else None,
        "force_cosine": found["forces_cosine_similarity"][0],
    }


def energies_of(part: Arrays) -> dict[str, float | None]:
    """Errors of energies per atom after shifts of the elements, and those of shifts alone.

    Args:
        part: Predictions and labels, as `escaip_fairchem.predict.parts` holds them.

    Returns:
        None where there are too few structures to fit shifts to.
    """
    natoms = part["natoms"]
    label = part.get("energy_label", np.full(len(natoms), np.nan))
    elements, where = np.unique(part["numbers"], return_inverse=True)
    counts = np.zeros((len(natoms), len(elements)))
    np.add.at(counts, (np.repeat(np.arange(len(natoms)), natoms), where), 1)
    known = np.isfinite(label)
    counts, natoms, label, energy = (
        counts[known],
        natoms[known],
        label[known],
        part["energy"][known],
    )
    return {
        "energy_per_atom_mae_shifted": held_out_error(counts, label - energy, natoms),
        "energy_per_atom_mae_of_shifts_alone": held_out_error(counts, label, natoms),
    }


def held_out_error(counts: np.ndarray, energy: np.ndarray, natoms: np.ndarray) -> float | None:
    """Mean absolute error per atom of a linear fit to compositions, on structures it has not seen.

    Args:
        counts: Atoms of each element, (S, Z).
        energy: What is fitted, (S,).
        natoms: Atoms, (S,).

    Returns:
        None if a fit would not have more structures than elements. Structures with an element that
        is in no other fold are left out.
    """
    n = len(energy)
    fold = np.random.default_rng(0).permutation(n) % FOLDS
    errors = []
    for held in range(FOLDS):
        rest = fold != held
        if rest.all():
            continue
        if rest.sum() <= counts.shape[1]:
            return None
        # per atom, so that large structures do not rule the fit; least norm where elements only
        # come together
        scaled = counts / natoms[:, None]
        shifts, *_ = np.linalg.lstsq(scaled[rest], energy[rest] / natoms[rest], rcond=1e-10)
        seen = counts[rest].any(0)
        known = ~(counts[:, ~seen] > 0).any(1) & ~rest
        errors.append(np.abs(energy[known] / natoms[known] - scaled[known] @ shifts))
    every = np.concatenate(errors) if errors else np.zeros(0)
    return float(every.mean()) if len(every) else None


def draw(rows: list[dict[str, Any]], out: Path) -> Path:
    """Errors beside those of the trivial models, and cosines."""
    made, panels = writing.figure(3, width=3.6)
    places = np.arange(len(rows))
    pairs = {
        "force MAE, eV/A": ("force_mae", "force_mae_of_zero", "zero forces"),
        "energy MAE after shifts, eV/atom": (
            "energy_per_atom_mae_shifted", "energy_per_atom_mae_of_shifts_alone", "shifts alone",
        ),
    }  # fmt: skip
    for axes, (title, (model, trivial, label)) in zip(panels, pairs.items(), strict=False):
        axes.bar(places - 0.2, [row[model] or 0 for row in rows], 0.4, label="model")
        axes.bar(places + 0.2, [row[trivial] or 0 for row in rows], 0.4, label=label, color="0.7")
        axes.set(title=title)
        axes.legend(fontsize="x-small")
    panels[2].bar(places, [row["force_cosine"] for row in rows])
    panels[2].set(title="force cosine")
    for axes in panels:
        axes.set_xticks(places, [row["data"] for row in rows])
    return writing.finish(made, out, WHAT)
