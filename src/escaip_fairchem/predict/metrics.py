"""Metrics as exact sums: what is added up over the parts of a data set gives those of the whole.

A sum holds, for each group of structures or atoms, the total of the model, the total of the
trivial models (element references and mean for the energy, zero for the rest) and the number of
what was counted, all in float64. Sums of several parts are added; a metric is their quotient.
Definitions are those of validation in training (`escaip_fairchem.train.evaluation`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from escaip_fairchem.train.evaluation import ENERGY_THRESHOLD, FORCE_THRESHOLD

if TYPE_CHECKING:
    from escaip_fairchem.train.parity import Parity

Sums = dict[str, np.ndarray]

#: Units by metric; none for cosines and fractions.
UNITS = {
    "energy_mae": "eV",
    "energy_per_atom_mae": "eV/atom",
    "forces_mae": "eV/A",
    "forces_cosine_similarity": "",
    "forces_magnitude_error": "eV/A",
    "efwt": "",
    "stress_mae": "eV/A^3",
}
#: What each metric is a mean over.
COUNTED = {
    "energy_mae": "structures",
    "energy_per_atom_mae": "structures",
    "forces_mae": "force components",
    "forces_cosine_similarity": "atoms",
    "forces_magnitude_error": "atoms",
    "efwt": "structures",
    "stress_mae": "stress components",
}
_SMALLEST_NORM = 1e-8  # as torch.cosine_similarity


def structure_sums(parity: Parity, group: np.ndarray, n_groups: int) -> Sums:
    """Sums of all metrics by groups of structures.

    Args:
        parity: Labels, NaN where there are none, and predictions.
        group: Of each structure, (S,).
        n_groups: G.

    Returns:
        Totals of model and trivial models and the number counted, (G, 3), by metric.
    """
    energy = np.isfinite(parity.energy)
    errors = np.stack([parity.energy_model, parity.energy_baseline]) - parity.energy
    per_atom = errors / parity.n_atoms
    structure = np.repeat(np.arange(len(parity.n_atoms)), parity.n_atoms)[parity.free]
    within, counted = _within(parity, errors, structure)
    sums = {
        "energy_mae": _grouped(np.abs(errors), group, n_groups, energy),
        "energy_per_atom_mae": _grouped(np.abs(per_atom), group, n_groups, energy),
        **force_sums(parity, group[structure], n_groups),
        "efwt": _grouped(within, group, n_groups, counted),
    }
    if len(parity.stress):
        both = np.stack([parity.stress_model - parity.stress, parity.stress]).astype(np.float64)
        known = np.isfinite(both[1]).all(1)
        sums["stress_mae"] = _grouped(np.abs(both).sum(2), group, n_groups, known, components=9)
    return sums


def force_sums(parity: Parity, group: np.ndarray, n_groups: int) -> Sums:
    """Sums of the metrics of forces by groups of free atoms.

    Args:
        parity: Labels, NaN where there are none, and predictions.
        group: Of each free atom, (F,).
        n_groups: G.

    Returns:
        As `structure_sums`; the cosine of zero forces is NaN.
    """
    label, model = parity.forces.astype(np.float64), parity.forces_model.astype(np.float64)
    known = np.isfinite(label).all(1)
    error = np.abs(np.stack([model - label, label])).sum(2)
    norms = np.linalg.norm(np.stack([model, label]), axis=2)
    cosine = (model * label).sum(1) / np.maximum(norms, _SMALLEST_NORM).prod(0)
    none = np.full(len(label), np.nan)
    magnitude = np.stack([np.abs(norms[0] - norms[1]), norms[1]])
    return {
        "forces_mae": _grouped(error, group, n_groups, known, components=3),
        "forces_cosine_similarity": _grouped(np.stack([cosine, none]), group, n_groups, known),
        "forces_magnitude_error": _grouped(magnitude, group, n_groups, known),
    }


def add(sums: Sums, more: Sums) -> Sums:
    """Sums over two parts."""
    return {name: sums.get(name, 0.0) + more.get(name, 0.0) for name in {**sums, **more}}


def means(sums: Sums, group: int = 0) -> dict[str, tuple[float, float, int]]:
    """Metrics of a group: that of the model, that of the trivial models, and the number counted.

    NaN where nothing was counted, or a prediction was not finite.
    """
    found = {}
    for name in UNITS:
        if name in sums:
            model, trivial, count = sums[name][group].tolist()
            nothing = float("nan")
            found[name] = (
                model / count if count else nothing,
                trivial / count if count else nothing,
                int(count),
            )
    return found


def _within(
    parity: Parity, energy_errors: np.ndarray, structure: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether structures are within OC20's thresholds, (2, S), and which of them count, (S,)."""
    n = len(parity.n_atoms)
    label = parity.forces.astype(np.float64)
    unlabelled = np.bincount(structure, ~np.isfinite(label).all(1), n) > 0
    counted = np.isfinite(parity.energy) & ~unlabelled & (np.bincount(structure, minlength=n) > 0)
    # written so that a NaN is not within
    off = ~(np.abs(np.stack([parity.forces_model - label, label])) < FORCE_THRESHOLD).all(2)
    all_within = np.stack([np.bincount(structure, atoms, n) == 0 for atoms in off])
    return (np.abs(energy_errors) < ENERGY_THRESHOLD) & all_within, counted


def _grouped(
    values: np.ndarray, group: np.ndarray, n_groups: int, counted: np.ndarray, components: int = 1
) -> np.ndarray:
    """Totals of the two rows of (2, M) values and the number of those counted, (G, 3)."""
    values, group = values[:, counted], group[counted]
    totals = [np.bincount(group, row, n_groups) for row in values]
    return np.stack([*totals, components * np.bincount(group, minlength=n_groups)], axis=1)
