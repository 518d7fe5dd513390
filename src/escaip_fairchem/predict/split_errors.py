"""Errors of one split, added up part by part, and the figures of them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from escaip_fairchem.errors import UserError
from escaip_fairchem.predict.data import join
from escaip_fairchem.predict.metrics import add, force_sums, means, structure_sums
from escaip_fairchem.predict.parts import read_split, select
from escaip_fairchem.train.by_element import ElementSums, write_by_element
from escaip_fairchem.train.parity import Parity
from escaip_fairchem.train.plot import draw_by_element, draw_groups, draw_parity

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from escaip_fairchem.predict.data import Arrays
    from escaip_fairchem.predict.metrics import Sums
    from escaip_fairchem.predict.parts import Plan
    from escaip_fairchem.predict.references import Trivial

#: Ends of the bins of labelled force, eV/A, and of the number of atoms; an end is in its bin.
FORCE_EDGES = (0.01, 0.03, 0.1, 0.3, 1, 3, 10)
ATOM_EDGES = (5, 10, 20, 50, 100, 200)
FIGURE_STRUCTURES = 1000  # in the parity figure at most, evenly spaced


class SplitErrors:
    """Adds up the errors of a split.

    Args:
        trivial: Energies before anything is learnt.
        free_atoms_only: Evaluate forces on free atoms; else on all.
        shown_every: One structure of so many is kept for the figure.
    """

    def __init__(self, trivial: Trivial, *, free_atoms_only: bool, shown_every: int = 1) -> None:
        self._trivial, self._free_atoms_only = trivial, free_atoms_only
        self._shown_every = shown_every
        self._shown: list[Arrays] = []
        self._subsets: dict[str, Sums] = {}
        self.elements = ElementSums()
        self.sums: Sums = {}
        self.by_atoms: Sums = {}
        self.by_force: Sums = {}
        self.counts = {"structures": 0, "atoms": 0, "free_atoms": 0, "not_finite": 0}

    def add(self, part: Arrays) -> None:
        """Add the arrays of a part."""
        parity = self.parity(part)
        n = len(parity.n_atoms)
        self.sums = add(self.sums, structure_sums(parity, np.zeros(n, int), 1))
        sizes = np.searchsorted(ATOM_EDGES, parity.n_atoms)
        self.by_atoms = add(self.by_atoms, structure_sums(parity, sizes, len(ATOM_EDGES) + 1))
        sizes = np.searchsorted(FORCE_EDGES, np.linalg.norm(parity.forces, axis=1))
        self.by_force = add(self.by_force, force_sums(parity, sizes, len(FORCE_EDGES) + 1))
        self.elements.add(parity)
        for name in np.unique(part.get("subset", [])):
            of_subset = self.parity(select(part, part["subset"] == name))
            sums = structure_sums(of_subset, np.zeros(len(of_subset.n_atoms), int), 1)
            self._subsets[str(name)] = add(self._subsets.get(str(name), {}), sums)
        predicted = _finite(part, "")
        self.counts["structures"] += n
        self.counts["atoms"] += len(part["numbers"])
        self.counts["free_atoms"] += int((~part["fixed"]).sum())
        self.counts["not_finite"] += int((~predicted).sum())
        if {"energy_label", "forces_label"} <= part.keys():
            shown = predicted & _finite(part, "_label") & (part["row"] % self._shown_every == 0)
            if shown.any():
                self._shown.append(select(part, shown))

    def parity(self, part: Arrays) -> Parity:
        """Labels and predictions of a part."""
        natoms, numbers = part["natoms"], part["numbers"]
        n, n_all = len(natoms), len(numbers)
        evaluated = ~part["fixed"] if self._free_atoms_only else np.ones(n_all, bool)
        references, mean = self._trivial
        structure = np.repeat(np.arange(n), natoms)
        none = np.zeros((0, 9))
        return Parity(
            n_atoms=natoms,
            energy=part.get("energy_label", np.full(n, np.nan)),
            energy_model=part["energy"],
            energy_baseline=np.bincount(structure, references[numbers], n) + mean,
            numbers=numbers,
            free=evaluated,
            forces=part.get("forces_label", np.full((n_all, 3), np.nan))[evaluated],
            forces_model=part["forces"][evaluated],
            stress=part.get("stress_label", np.full((n, 9), np.nan)) if "stress" in part else none,
            stress_model=part.get("stress", none),
        )

    def groups(self) -> dict[str, tuple[Sums, list[str]]]:
        """Sums by subset, where there are any, by the number of atoms and by the size of forces."""
        found = {
            "by_atoms": (self.by_atoms, _names(ATOM_EDGES)),
            "by_force": (self.by_force, _names(FORCE_EDGES)),
        }
        if self._subsets:
            every = list(self._subsets.values())
            stacked = {name: np.concatenate([sums[name] for sums in every]) for name in every[0]}
            found = {"by_subset": (stacked, list(self._subsets)), **found}
        return found

    def draw(self, folder: Path) -> None:
        """Write the figures, and the table by element.

        Args:
            folder: Where to.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self._shown:
            draw_parity(self.parity(join(self._shown)), folder / "parity.png")
        rows = self.elements.rows()
        write_by_element(rows, folder / "errors_by_element.csv")
        draw_by_element(rows, folder / "errors_by_element.png")
        panels = {
            "force MAE, eV/A": ("labelled force, eV/A", "forces_mae", "by_force"),
            "energy MAE, eV/atom": ("atoms of a structure", "energy_per_atom_mae", "by_atoms"),
        }
        groups = self.groups()
        bars = {}
        for title, (xlabel, metric, kind) in panels.items():
            sums, names = groups[kind]
            found = {name: means(sums, index)[metric] for index, name in enumerate(names)}
            bars[title] = xlabel, {name: values for name, values in found.items() if values[2]}
        draw_groups({title: bar for title, bar in bars.items() if bar[1]}, folder / "errors.png")


def errors_of(
    folder: Path, plan: Plan, split: str, trivial: Trivial, *, free_atoms_only: bool
) -> SplitErrors:
    """Errors of a whole split.

    Args:
        folder: With the plan and its parts.
        plan: The plan.
        split: Name of the split.
        trivial: Energies before anything is learnt.
        free_atoms_only: Evaluate forces on free atoms; else on all.

    Raises:
        UserError: If a part is missing, or nothing has a label.
    """
    every = -(-plan.splits[split].rows // FIGURE_STRUCTURES)
    errors = SplitErrors(trivial, free_atoms_only=free_atoms_only, shown_every=every)
    for part in read_split(folder, split):
        errors.add(part)
    if not any(count for _, _, count in means(errors.sums).values()):
        raise UserError(
            f"split {split}, {', '.join(plan.splits[split].sources)}, has no labels to compare "
            f"with; its predictions are in {folder / split}"
        )
    return errors


def _finite(part: Arrays, suffix: str) -> np.ndarray:
    """Structures whose energy and forces, predicted or labelled, are all finite, (n,) bool."""
    n = len(part["natoms"])
    structure = np.repeat(np.arange(n), part["natoms"])
    bad = np.bincount(structure, ~np.isfinite(part[f"forces{suffix}"]).all(1), n) > 0
    return np.isfinite(part[f"energy{suffix}"]) & ~bad


def _names(ends: Sequence[float]) -> list[str]:
    """Names of the bins between ends."""
    return [
        f"up to {ends[0]:g}",
        *(f"{low:g} to {high:g}" for low, high in pairwise(ends)),
        f"above {ends[-1]:g}",
    ]
