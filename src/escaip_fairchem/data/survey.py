"""What is known of each structure of a set: sizes, labels, neighbours, contacts, fingerprints."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial import cKDTree

from escaip_fairchem.data.checks import nearest_neighbors, with_images
from escaip_fairchem.data.fingerprint import composition_key, fingerprint
from escaip_fairchem.data.frames import free_atoms
from escaip_fairchem.data.plan import make_plan
from escaip_fairchem.data.references import NUM_REFERENCES, ReferenceFit
from escaip_fairchem.data.sources import frames_of, over_parts
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from escaip_fairchem.data.formats.base import Part
    from escaip_fairchem.data.frames import Frame
    from escaip_fairchem.data.plan import Reading

#: Edges of the histogram of force components, eV/A, 1 % apart.
FORCE_EDGES = np.concatenate([[0.0], np.geomspace(1e-6, 1e4, 2315)])
MOST_NEIGHBORS = 4000


@dataclass
class Facts:
    """Facts of F structures, in the order they were read.

    Attributes:
        place: File and position in it of each structure, (F,).
        part: ``train``, ``val`` or empty, (F,).
        counts: Atoms of each element, (F, 120).
        composition: (F,), as text.
        energy: eV, NaN without label, (F,).
        max_force: Largest force on a free atom, eV/A, NaN without label, (F,).
        contact: Shortest distance over the sum of the covalent radii, infinite without any, (F,).
        distance: That distance, A, (F,).
        contact_pair: Its elements, such as ``H-O``, (F,).
        periodic: Periodic axes as text, such as ``TTF``, (F,).
        stress: Whether there is one, (F,).
        prints: Fingerprints, (F, P).
        neighbors: Histogram over atoms of their number of neighbours within the cutoff.
        force_histogram: Histogram of force components of free atoms by FORCE_EDGES.
        force_square: Sum of their squares, (eV/A)^2.
        fixed: Number of fixed atoms.
    """

    place: list[tuple[str, int]] = field(default_factory=list)
    part: list[str] = field(default_factory=list)
    counts: list[np.ndarray] = field(default_factory=list)
    composition: list[str] = field(default_factory=list)
    energy: list[float] = field(default_factory=list)
    max_force: list[float] = field(default_factory=list)
    contact: list[float] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)
    contact_pair: list[str] = field(default_factory=list)
    periodic: list[str] = field(default_factory=list)
    stress: list[bool] = field(default_factory=list)
    prints: list[np.ndarray] = field(default_factory=list)
    neighbors: np.ndarray = field(default_factory=lambda: np.zeros(MOST_NEIGHBORS + 1, dtype=int))
    force_histogram: np.ndarray = field(
        default_factory=lambda: np.zeros(len(FORCE_EDGES) - 1, dtype=int)
    )
    force_square: float = 0.0
    fixed: int = 0

    def __len__(self) -> int:
        """Number of structures."""
        return len(self.place)

    @property
    def natoms(self) -> np.ndarray:
        """Atoms of each structure, (F,)."""
        return np.array(self.counts).sum(axis=1)

    @property
    def element_atoms(self) -> np.ndarray:
        """Atoms of each element, (120,)."""
        return np.array(self.counts).sum(axis=0)

    def merge(self, other: Facts) -> None:
        """Add the structures of another one."""
        for name, value in vars(other).items():
            if isinstance(value, list):
                getattr(self, name).extend(value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def fit(self) -> ReferenceFit:
        """The energies against compositions, of the structures that have one."""
        fit = ReferenceFit()
        for counts, energy in zip(self.counts, self.energy, strict=True):
            if np.isfinite(energy):
                fit.add(np.repeat(np.arange(NUM_REFERENCES), counts), energy)
        return fit

    def force_quantile(self, part: float) -> float:
        """Size that this part of the force components stays below, to 1 %, eV/A."""
        cumulative = np.cumsum(self.force_histogram)
        return float(FORCE_EDGES[1 + np.searchsorted(cumulative, part * cumulative[-1])])

    @property
    def force_rms(self) -> float:
        """Root mean square of the force components of free atoms, eV/A."""
        return float(np.sqrt(self.force_square / max(1, self.force_histogram.sum())))


def gather(
    parts: dict[str, Sequence[str | Path]],
    *,
    cutoff: float,
    use_pbc: bool = True,
    format_name: str | None = None,
    options: dict[str, Any] | None = None,
    sample: int = 0,
    workers: int = 1,
) -> Facts:
    """Look at the structures of a set.

    Args:
        parts: Whatever `escaip convert` reads, by the name of the part.
        cutoff: Within which neighbours are counted, A.
        use_pbc: False takes every structure for a molecule, for neighbours only.
        format_name: Name of the format; found by a look at the inputs by default.
        options: Options of the format, such as where labels are.
        sample: Look at about so many, evenly spaced; 0 looks at all.
        workers: Processes.

    Raises:
        UserError: If there are no structures.
    """
    total = Facts()
    jobs: list[tuple[Any, ...]] = []
    for name, inputs in parts.items():
        plan = make_plan(inputs, format_name=format_name, options=options, labelled=False)
        jobs += [(name, plan.reading, part) for part in plan.parts]
    shares = _shares([part for _, _, part in jobs], sample)
    jobs = [(*job, share, cutoff, use_pbc) for job, share in zip(jobs, shares, strict=True)]
    for facts in over_parts(_of_part, jobs, workers):
        total.merge(facts)
    if not len(total):
        raise UserError("no structures in what was given")
    return total


def _shares(parts: list[Part], sample: int) -> list[int]:
    """How many structures to look at in each part, in proportion to its size; 0 for all."""
    if not sample:
        return [0] * len(parts)
    sizes = [
        part.stop - part.start if part.stop else sum(p.stat().st_size for p in part.paths)
        for part in parts
    ]
    return [max(1, math.ceil(sample * size / sum(sizes))) for size in sizes]


def _of_part(
    name: str, reading: Reading, part: Part, sample: int, cutoff: float, use_pbc: bool
) -> Facts:
    facts = Facts()
    for frame in frames_of(reading, part, sample):
        add_structure(facts, name, frame, cutoff, use_pbc)
    return facts


def add_structure(facts: Facts, part: str, frame: Frame, cutoff: float, use_pbc: bool) -> None:
    """Add the facts of one structure; arguments as for `gather`."""
    from ase.data import chemical_symbols, covalent_radii
    from ase.geometry import complete_cell

    atoms = frame.atoms
    numbers, positions, pbc = atoms.numbers, atoms.positions, atoms.pbc
    cell = complete_cell(atoms.cell.array) if pbc.any() else np.eye(3)
    facts.place.append((str(frame.path), frame.index))
    facts.part.append(part)
    facts.counts.append(np.bincount(numbers, minlength=NUM_REFERENCES).astype(np.uint16))
    facts.composition.append(composition_key(numbers))
    facts.periodic.append("".join("FT"[int(axis)] for axis in pbc))
    free = free_atoms(atoms)
    facts.fixed += int((~free).sum())
    results = atoms.calc.results if atoms.calc is not None else {}
    facts.energy.append(results.get("energy", np.nan))
    facts.stress.append("stress" in results)
    forces = results["forces"][free] if "forces" in results else np.zeros((0, 3))
    facts.max_force.append(float(np.linalg.norm(forces, axis=1).max()) if len(forces) else np.nan)
    facts.force_square += float(np.square(forces).sum())
    facts.force_histogram += np.histogram(np.abs(forces), FORCE_EDGES)[0]

    counts = neighbor_counts(positions, cell, pbc & use_pbc, cutoff)
    facts.neighbors += np.bincount(np.minimum(counts, MOST_NEIGHBORS), minlength=MOST_NEIGHBORS + 1)
    distance, other = nearest_neighbors(positions, cell, pbc)
    radii = covalent_radii[numbers]
    ratio = distance / (radii + np.append(radii, 1.0)[other])
    tightest = int(np.argmin(ratio))
    found = np.isfinite(ratio[tightest])
    pair = (
        sorted(chemical_symbols[numbers[k]] for k in (tightest, other[tightest])) if found else []
    )
    facts.contact.append(float(ratio[tightest]))
    facts.distance.append(float(distance[tightest]))
    facts.contact_pair.append("-".join(pair))
    facts.prints.append(fingerprint(numbers, positions, cell, pbc))


def neighbor_counts(
    positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float
) -> np.ndarray:
    """Number of neighbours of each atom, periodic images (its own too) included, (N,).

    Args:
        positions: A, (N, 3).
        cell: Cell vectors as rows, A, (3, 3).
        pbc: (3,).
        cutoff: A.
    """
    points, _ = with_images(positions, cell, pbc, cutoff)
    tree = cKDTree(points)
    return tree.query_ball_point(points[: len(positions)], cutoff, return_length=True) - 1
