"""What a conversion remembers of each frame, and what follows from it for the set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from escaip_fairchem.data.checks import component_rms
from escaip_fairchem.data.frames import free_atoms
from escaip_fairchem.data.references import NUM_REFERENCES, ReferenceFit, References

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ase import Atoms

NATOMS_EDGES = (1, 2, 5, 10, 20, 50, 100, 150, 200, 250, 300, 400, 500, 1000, 10**4, 10**9)
FORCE_EDGES = (0, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1e9)  # eV/A


class Facts(NamedTuple):
    """Numbers of a frame; NaN where it has no such label.

    Attributes:
        natoms: Atoms.
        energy: eV.
        mean_force: Mean length of the forces on free atoms, eV/A.
        force_rms: Of the components on all atoms, eV/A.
        force_sum: Squares of the components on free atoms, (eV/A)^2.
        force_count: Their number.
        stress_rms: Of the six components, eV/A^3.
        stress_sum: Squares of the nine components, (eV/A^3)^2.
    """

    natoms: int
    energy: float = np.nan
    mean_force: float = np.nan
    force_rms: float = np.nan
    force_sum: float = 0.0
    force_count: int = 0
    stress_rms: float = np.nan
    stress_sum: float = np.nan


def measure(atoms: Atoms) -> Facts:
    """Take the facts of a frame, with or without labels."""
    if atoms.calc is None:
        return Facts(len(atoms))
    results = atoms.calc.results
    free = results["forces"][free_atoms(atoms)]
    stress = results.get("stress")
    return Facts(
        len(atoms),
        results["energy"],
        mean_force(free),
        component_rms(results["forces"]),
        float(np.sum(np.square(free))),
        free.size,
        np.nan if stress is None else component_rms(stress),
        np.nan if stress is None else float(np.square(stress) @ [1, 1, 1, 2, 2, 2]),
    )


def mean_force(free_forces: np.ndarray) -> float:
    """Mean length of the forces on free atoms, (M, 3), in their unit."""
    return float(np.linalg.norm(free_forces, axis=1).mean()) if len(free_forces) else 0.0


def columns(facts: Sequence[Facts], numbers: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of the facts of M frames, and of their compositions.

    Args:
        facts: Of each frame.
        numbers: Atomic numbers of each frame.

    Returns:
        The fields of `Facts`, (M,) each, ``elements`` (E,), and ``counts`` of their atoms (M, E).
    """
    values = zip(*facts, strict=True) if facts else [()] * len(Facts._fields)
    table = {name: np.array(column) for name, column in zip(Facts._fields, values, strict=True)}
    counts = np.zeros((len(facts), NUM_REFERENCES), dtype=np.int32)
    for row, of_frame in enumerate(numbers):
        counts[row] = np.bincount(of_frame, minlength=NUM_REFERENCES)
    elements = np.flatnonzero(counts.any(axis=0))
    return {**table, "elements": elements, "counts": counts[:, elements]}


@dataclass
class Statistics:
    """Facts of one side of a set, summed up in the order of its frames."""

    n_frames: int = 0
    n_stress: int = 0
    natoms: np.ndarray = field(default_factory=lambda: np.zeros(len(NATOMS_EDGES) - 1, dtype=int))
    forces: np.ndarray = field(default_factory=lambda: np.zeros(len(FORCE_EDGES) - 1, dtype=int))
    atoms_of: np.ndarray = field(default_factory=lambda: np.zeros(NUM_REFERENCES, dtype=int))
    frames_of: np.ndarray = field(default_factory=lambda: np.zeros(NUM_REFERENCES, dtype=int))
    energy: tuple[float, float] = (np.inf, -np.inf)
    energy_per_atom: tuple[float, float] = (np.inf, -np.inf)
    _fit: ReferenceFit = field(default_factory=ReferenceFit)
    _squares: np.ndarray = field(default_factory=lambda: np.zeros(2))  # of forces, of stress
    _n_forces: int = 0

    def add(self, table: dict[str, np.ndarray], chosen: np.ndarray) -> None:
        """Add the chosen frames, (M,) bool, of what `columns` gives."""
        elements, natoms = table["elements"], table["natoms"][chosen]
        self.n_frames += len(natoms)
        self.natoms += np.histogram(natoms, NATOMS_EDGES)[0]
        self.atoms_of[elements] += table["counts"][chosen].sum(axis=0)
        self.frames_of[elements] += (table["counts"][chosen] > 0).sum(axis=0)
        labelled = chosen & np.isfinite(table["energy"])
        if not labelled.any():
            return
        energy, stress = table["energy"][labelled], table["stress_sum"][labelled]
        self.forces += np.histogram(table["force_rms"][labelled], FORCE_EDGES)[0]
        self.energy = _widen(self.energy, energy)
        self.energy_per_atom = _widen(self.energy_per_atom, energy / table["natoms"][labelled])
        for row, value in zip(table["counts"][labelled], energy, strict=True):
            self._fit.add(np.repeat(elements, row), value)
        self.n_stress += int(np.isfinite(stress).sum())
        self._squares += table["force_sum"][labelled].sum(), np.nansum(stress)
        self._n_forces += int(table["force_count"][labelled].sum())

    def references(self) -> References:
        """Energies of the elements."""
        return self._fit.solve()

    @property
    def elements(self) -> set[int]:
        """Atomic numbers that occur."""
        return set(np.flatnonzero(self.atoms_of).tolist())

    @property
    def force_rms(self) -> float:
        """Of the components on free atoms, eV/A; 1 where all are zero: labels are divided by it."""
        return _rms(self._squares[0], self._n_forces)

    @property
    def stress_rms(self) -> float | None:
        """Of the nine components, eV/A^3, if there is stress."""
        return _rms(self._squares[1], 9 * self.n_stress) if self.n_stress else None


def _rms(squares: float, count: int) -> float:
    """Root of a mean square; 1 where it is zero."""
    return float((squares / count) ** 0.5) if squares > 0 else 1.0


def _widen(bounds: tuple[float, float], values: np.ndarray) -> tuple[float, float]:
    """Bounds that hold the values too."""
    return min(bounds[0], float(values.min())), max(bounds[1], float(values.max()))
