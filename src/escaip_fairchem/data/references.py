"""Statistics that make labels learnable: energies of single elements, and the force scale."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

NUM_REFERENCES = 120  # length of the table; the index is the atomic number
BLOCK = 4096  # rows held before they are folded into the triangular factor
MIN_SCALE = 1e-3  # eV; energies that references explain better than this have no scale
RANK_TOLERANCE = 1e-10  # relative to the largest singular value; counts are small integers


@dataclass(frozen=True)
class References:
    """Energy of each element, by least squares over compositions.

    Attributes:
        values: (120,) eV, index = atomic number, 0 for elements that do not occur.
        elements: Atomic numbers that occur, ascending.
        rank: Number of independent compositions among them.
        rms: Root mean square of what the fit leaves, eV.
    """

    values: np.ndarray
    elements: np.ndarray
    rank: int
    rms: float

    @property
    def scale(self) -> float:
        """``rms``, to divide energies by; 1 eV where the references explain all of them."""
        return self.rms if self.rms > MIN_SCALE else 1.0

    @property
    def determined(self) -> bool:
        """Whether the compositions fix every element's energy."""
        return self.rank == len(self.elements)

    def describe(self) -> str:
        """Say in one line how well determined and how good the fit is."""
        text = f"{len(self.elements)} elements, residual rms {self.rms:.4g} eV"
        if self.determined:
            return text
        return (
            f"{text}; only {self.rank} independent compositions, so single elements are not "
            "determined (the smallest solution is taken; it is exact for these compositions only)"
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

    def add(self, numbers: np.ndarray, energy: float) -> None:
        """Add a structure.

        Args:
            numbers: Atomic numbers, (N,).
            energy: Total energy, eV.
        """
        row = np.zeros(NUM_REFERENCES + 1)
        row[:-1] = np.bincount(numbers, minlength=NUM_REFERENCES)
        row[-1] = energy
        self._rows.append(row)
        self._count += 1
        if len(self._rows) >= BLOCK:
            self._fold()

    def solve(self) -> References:
        """Fit the references; the smallest solution where compositions leave them open."""
        self._fold()
        counts, energy = self._factor[:, :-1], self._factor[:, -1]
        elements = np.flatnonzero(np.abs(counts).max(axis=0) > 0)
        fit, _, rank, _ = np.linalg.lstsq(counts[:, elements], energy, rcond=RANK_TOLERANCE)
        values = np.zeros(NUM_REFERENCES)
        values[elements] = fit
        # The factor preserves lengths, so its residual is that of all structures.
        residual = energy - counts[:, elements] @ fit
        return References(
            values, elements, int(rank), float(np.sqrt(residual @ residual / self._count))
        )

    def _fold(self) -> None:
        """Replace the rows held by their triangular factor."""
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

    @property
    def rms(self) -> float:
        """The rms in the values' unit; 1 where all are zero, because labels are divided by it."""
        return (self._sum / self._count) ** 0.5 if self._sum > 0 else 1.0
