"""Statistics that make labels learnable: energies of single elements, and the force scale."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

NUM_REFERENCES = 120  # length of the table; the index is the atomic number
BLOCK = 4096  # rows held before they are folded into the triangular factor
MIN_SCALE = 1e-3  # eV; energies that references explain better than this have no scale
RANK_TOLERANCE = 1e-10  # relative to the largest singular value; counts are small integers
OPEN_TOLERANCE = 1e-6  # component of a null vector below which an element is not in it


@dataclass(frozen=True)
class References:
    """Energy of each element, by least squares over compositions.

    Attributes:
        values: (120,) eV, index = atomic number, 0 for elements that do not occur.
        elements: Atomic numbers that occur, ascending.
        rank: Number of independent compositions among those that are fitted.
        rms: Root mean square of what the fit leaves, eV.
        given: Atomic numbers that occur and were not fitted but given.
        open: Atomic numbers whose energy the compositions do not fix.
    """

    values: np.ndarray
    elements: np.ndarray
    rank: int
    rms: float
    given: tuple[int, ...] = ()
    open: tuple[int, ...] = ()

    @property
    def scale(self) -> float:
        """``rms``, to divide energies by; 1 eV where the references explain all of them."""
        return self.rms if self.rms > MIN_SCALE else 1.0

    @property
    def determined(self) -> bool:
        """Whether the compositions fix every element's energy."""
        return self.rank == len(self.elements) - len(self.given)

    def describe(self) -> str:
        """Say in one line how well determined and how good the fit is."""
        text = f"{len(self.elements)} elements, residual rms {self.rms:.4g} eV"
        if self.given:
            text += f" ({_symbols(self.given)} given)"
        if self.determined:
            return text
        return (
            f"{text}; only {self.rank} independent compositions, so single elements are not "
            f"determined ({_symbols(self.open)}: the smallest solution is taken; it is exact for "
            "these compositions only)"
        )


@dataclass
class ReferenceFit:
    """Least squares of energy against composition, in float64 and constant memory.

    Rows are folded into the triangular factor of a QR decomposition, which keeps the accuracy of
    a direct solution at any number of structures (normal equations would square the condition).
    """

    _factor: np.ndarray = field(default_factory=lambda: np.zeros((0, NUM_REFERENCES + 1)))
    _rows: list[np.ndarray] = field(default_factory=list)
    _count: int = 0

    def add(self, numbers: np.ndarray, energy: float, weight: float = 1.0) -> None:
        """Add a structure.

        Args:
            numbers: Atomic numbers, (N,).
            energy: Total energy, eV.
            weight: Factor of its residual, such as 1 / N.
        """
        row = np.zeros(NUM_REFERENCES + 1)
        row[:-1] = np.bincount(numbers, minlength=NUM_REFERENCES)
        row[-1] = energy
        self._rows.append(weight * row)
        self._count += 1
        if len(self._rows) >= BLOCK:
            self._fold()

    def merge(self, other: ReferenceFit) -> None:
        """Add the structures of another fit."""
        other._fold()
        self._rows += list(other._factor)
        self._count += other._count
        if len(self._rows) >= BLOCK:
            self._fold()

    def solve(self, given: Mapping[int, float] | None = None) -> References:
        """Fit the references; the smallest solution where compositions leave them open.

        Args:
            given: Energies that are not fitted, eV by atomic number, such as those of isolated
                atoms at the level of theory of the data.
        """
        self._fold()
        counts, energy = self._factor[:, :-1], self._factor[:, -1]
        values = np.zeros(NUM_REFERENCES)
        for number, value in (given or {}).items():
            values[number] = value
        elements = np.flatnonzero(np.abs(counts).max(axis=0, initial=0.0) > 0)
        known = np.isin(elements, list(given or {}))
        fitted = elements[~known]
        fit, _, rank, _ = np.linalg.lstsq(
            counts[:, fitted], energy - counts @ values, rcond=RANK_TOLERANCE
        )
        values[fitted] = fit
        return References(
            values,
            elements,
            int(rank),
            self.rms(values),
            given=tuple(elements[known].tolist()),
            open=_open(counts[:, fitted], fitted, int(rank)),
        )

    def rms(self, values: np.ndarray) -> float:
        """Root mean square of the (weighted) residuals of any references, eV, (120,)."""
        self._fold()
        # The factor preserves lengths, so its residual is that of all structures.
        residual = self._factor[:, -1] - self._factor[:, :-1] @ values
        return float(np.sqrt(residual @ residual / self._count)) if self._count else 0.0

    def _fold(self) -> None:
        """Replace the rows held by their triangular factor."""
        if self._rows:
            self._factor = np.linalg.qr(np.vstack([self._factor, *self._rows]), mode="r")
            self._rows = []


@dataclass
class RunningRms:
    """Running root mean square of the components of forces, or of stresses."""

    _sum: float = 0.0
    _count: int = 0

    def add(self, values: np.ndarray) -> None:
        """Add an array of any shape."""
        self._sum += float(np.sum(np.square(values)))
        self._count += values.size

    def merge(self, other: RunningRms) -> None:
        """Add the values of another one."""
        self._sum += other._sum
        self._count += other._count

    @property
    def rms(self) -> float:
        """The rms in the values' unit; 1 where all are zero, because labels are divided by it."""
        return (self._sum / self._count) ** 0.5 if self._sum > 0 else 1.0


def _open(counts: np.ndarray, elements: np.ndarray, rank: int) -> tuple[int, ...]:
    """Elements whose energy may change without any structure's energy changing."""
    if rank == len(elements):
        return ()
    # Rows beyond the rank span the null space: changes of energies that no structure notices.
    null = np.linalg.svd(counts)[2][rank:]
    return tuple(elements[np.abs(null).max(axis=0) > OPEN_TOLERANCE].tolist())


def _symbols(numbers: tuple[int, ...]) -> str:
    from ase.data import chemical_symbols

    return ", ".join(chemical_symbols[number] for number in numbers)
