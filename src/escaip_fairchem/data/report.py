"""What is in a data set, in words: sizes, elements, labels, neighbours, suspicious structures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from escaip_fairchem.data.fingerprint import equal_structures

if TYPE_CHECKING:
    from collections.abc import Iterator

    from escaip_fairchem.data.survey import Facts

SHOWN = 5  # suspicious structures of each kind
OUTLIER = 8.0  # robust z-score of an energy per atom above its references
TIGHT = 0.6  # of the sum of the covalent radii; bonds are near 1
LARGE_FORCE = 50.0  # eV/A
MAD_TO_SIGMA = 1.4826


@dataclass
class Inspection:
    """Facts of a set beside its element references.

    Attributes:
        facts: Facts of F structures.
        references: eV, index = atomic number, (120,).
        origin: Where the references are from, in words.
        cutoff: Within which neighbours were counted, A.
        max_neighbors: How many of them a model keeps.
    """

    facts: Facts
    references: np.ndarray
    origin: str
    cutoff: float
    max_neighbors: int

    @cached_property
    def per_atom(self) -> np.ndarray:
        """Energies per atom, eV, (F,)."""
        return np.array(self.facts.energy) / self.facts.natoms

    @cached_property
    def residual(self) -> np.ndarray:
        """Energies per atom above the references, eV, (F,)."""
        above = np.array(self.facts.energy) - np.array(self.facts.counts) @ self.references
        return above / self.facts.natoms

    @cached_property
    def outlier(self) -> np.ndarray:
        """Distance of `residual` from its median, in robust standard deviations, (F,)."""
        known = self.residual[np.isfinite(self.residual)]
        if not len(known):
            return np.full(len(self.residual), np.nan)
        median = np.median(known)
        spread = MAD_TO_SIGMA * np.median(np.abs(known - median))
        return np.abs(self.residual - median) / (spread or np.inf)

    @cached_property
    def geometry(self) -> np.ndarray:
        """Index of the first structure of the same geometry, (F,)."""
        _, compositions = np.unique(self.facts.composition, return_inverse=True)
        return equal_structures(compositions, np.array(self.facts.prints))

    def cut(self) -> tuple[float, float]:
        """Part of the atoms that have more than `max_neighbors`, and of the pairs left out."""
        histogram = self.facts.neighbors
        number = np.arange(len(histogram))
        beyond = np.maximum(0, number - self.max_neighbors) * histogram
        pairs = max(1, (number * histogram).sum())
        return histogram[self.max_neighbors + 1 :].sum() / histogram.sum(), beyond.sum() / pairs

    def lines(self) -> Iterator[str]:
        """The report, line by line."""
        yield from self._sizes()
        yield from self._elements()
        yield from self._labels()
        yield from self._neighbors()
        yield from self._suspicious()

    def _sizes(self) -> Iterator[str]:
        facts = self.facts
        parts = [f"{facts.part.count(part)} {part}" for part in dict.fromkeys(facts.part) if part]
        yield f"structures: {len(facts)}" + (f" ({', '.join(parts)})" if parts else "")
        n = facts.natoms
        yield f"atoms per structure: {_spread(n, '%d')}; {n.sum()} in all, {facts.fixed} fixed"
        kinds, numbers = np.unique(facts.periodic, return_counts=True)
        periodic = ", ".join(f"{k} {c}" for k, c in zip(kinds, numbers, strict=True))
        yield f"periodic axes: {periodic}; compositions: {len(set(facts.composition))}"

    def _elements(self) -> Iterator[str]:
        from ase.data import chemical_symbols

        counts = np.array(self.facts.counts)
        val = np.array(self.facts.part) == "val"
        yield f"{'element':<9}{'structures':>12}{'atoms':>12}{'reference, eV':>18}"
        for z in np.flatnonzero(counts.any(axis=0)).tolist():
            present = counts[:, z] > 0
            line = f"{chemical_symbols[z]:<9}{present.sum():>12}{counts[:, z].sum():>12}"
            line += f"{self.references[z]:18.6f}"
            yield line + ("  only in val" if val.any() and present[~val].sum() == 0 else "")

    def _labels(self) -> Iterator[str]:
        facts = self.facts
        labelled = np.isfinite(facts.energy)
        if not labelled.all():
            yield f"without energy or forces: {(~labelled).sum()} structures"
        if labelled.any():
            yield f"energy, eV per atom: {_spread(self.per_atom[labelled])}"
            residual = self.residual[labelled]
            yield (
                f"energy above references ({self.origin}), eV per atom: {_spread(residual)}, "
                f"rms {np.sqrt(np.mean(np.square(residual))):.4g}"
            )
            yield (
                f"force components of free atoms, eV/A: rms {facts.force_rms:.4g}, "
                + ", ".join(
                    f"{q:.2%} below {facts.force_quantile(q):.3g}" for q in (0.5, 0.99, 0.9999)
                )
                + f"; largest force {np.nanmax(facts.max_force):.4g}"
            )
        yield f"stress: in {sum(facts.stress)} of {len(facts)} structures"

    def _neighbors(self) -> Iterator[str]:
        values = np.repeat(np.arange(len(self.facts.neighbors)), self.facts.neighbors)
        atoms, pairs = self.cut()
        yield f"neighbours within {self.cutoff:g} A: {_spread(values, '%d')} per atom"
        yield (
            f"max_neighbors {self.max_neighbors}: {atoms:.1%} of the atoms have more, "
            f"{pairs:.1%} of the pairs are left out; {self.facts.neighbors[0]} atoms have none"
        )

    def _suspicious(self) -> Iterator[str]:
        facts = self.facts
        force = np.nan_to_num(facts.max_force)
        contact = -np.array(facts.contact)
        outlier = np.nan_to_num(self.outlier)
        yield f"largest forces (above {LARGE_FORCE:g} eV/A: {(force > LARGE_FORCE).sum()}):"
        yield from self._worst(force, lambda k: f"{force[k]:.4g} eV/A")
        yield f"energy outliers (above {OUTLIER:g} robust sigma: {(outlier > OUTLIER).sum()}):"
        yield from self._worst(
            outlier, lambda k: f"{outlier[k]:.1f} sigma, {self.residual[k]:+.4g} eV per atom"
        )
        yield (
            f"shortest contacts (below {TIGHT:g} of the covalent radii: "
            f"{(contact > -TIGHT).sum()}):"
        )
        yield from self._worst(
            contact,
            lambda k: f"{facts.contact_pair[k]} {facts.distance[k]:.3f} A, {facts.contact[k]:.2f}",
        )
        again = np.flatnonzero(self.geometry != np.arange(len(facts)))
        yield f"duplicate geometries: {len(again)}"
        for index in again[:SHOWN]:
            yield f"  {_place(facts, index)} is {_place(facts, self.geometry[index])}"

    def _worst(self, score: np.ndarray, words) -> Iterator[str]:
        for index in np.argsort(-score, kind="stable")[:SHOWN]:
            if np.isfinite(score[index]) and score[index] != 0:
                yield f"  {_place(self.facts, index)}: {words(index)}"


def _place(facts: Facts, index: int) -> str:
    path, frame = facts.place[index]
    return f"{path}, frame {frame} ({_formula(facts.composition[index])})"


def _formula(composition: str) -> str:
    from ase.data import chemical_symbols

    pairs = (entry.split(":") for entry in composition.split())
    return "".join(chemical_symbols[int(z)] + (n if n != "1" else "") for z, n in pairs)


def _spread(values: np.ndarray, form: str = "%.4g") -> str:
    """Smallest, median, 99 % and largest value."""
    if not len(values):
        return "none"
    numbers = [values.min(), np.median(values), np.quantile(values, 0.99), values.max()]
    low, middle, high, most = (form % number for number in numbers)
    return f"{low} to {most}, median {middle}, 99 % below {high}"
