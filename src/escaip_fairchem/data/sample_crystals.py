"""Strained, rattled alloys with stress, as in MPtrj, labelled by ASE's EMT."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from escaip_fairchem.data.sample import Maker, snapshot
from escaip_fairchem.data.sample_slabs import METALS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ase import Atoms

# Repetitions of the cubic cell of 4 atoms (fcc) or of 2 (bcc).
LATTICES = {"fcc": (1, 1, 2), "bcc": (2, 1, 2)}
BCC_TO_FCC = 0.5 ** (1 / 3)  # ratio of the lattice constants at equal volume per atom
STRAIN = 0.03  # standard deviation of the components of a frame's strain
RATTLE = 0.12  # A, standard deviation of displacements, times a number up to 1


def maker() -> Maker:
    """What `escaip_fairchem.data.sample` makes the sample with."""
    return Maker(frames)


def frames(index: int, n_frames: int, rng: np.random.Generator) -> Iterator[Atoms]:
    """Make labelled frames of an alloy, each with its own strain and displacements.

    Stress has ASE's sign: positive under tension.
    """
    from ase.calculators.emt import EMT

    alloy = build_system(index, rng)
    alloy.calc = EMT()
    cell, places = alloy.cell.array.copy(), alloy.get_scaled_positions()
    for _ in range(n_frames):
        strain = rng.normal(scale=STRAIN, size=(3, 3))
        alloy.set_cell(cell @ (np.eye(3) + (strain + strain.T) / 2))
        alloy.set_scaled_positions(places)
        alloy.positions += rng.normal(scale=RATTLE * rng.random(), size=alloy.positions.shape)
        yield snapshot(alloy, stress=True)


def build_system(index: int, rng: np.random.Generator) -> Atoms:
    """Build a disordered alloy of up to three metals, 8 atoms, at a volume between theirs.

    Args:
        index: Number of the system; lattices take turns.
        rng: Source of metals, sites and how far the volume is from the mean.

    Returns:
        Structure on lattice sites, periodic in all directions.
    """
    from ase.build import bulk
    from ase.data import atomic_numbers, reference_states

    lattice, repetitions = list(LATTICES.items())[index % len(LATTICES)]
    symbols = rng.choice(METALS, size=3, replace=False)[: rng.integers(1, 4)]
    occupied = rng.choice(symbols, size=8)
    constants = [reference_states[atomic_numbers[symbol]]["a"] for symbol in occupied]
    constant = np.mean(constants) * (BCC_TO_FCC if lattice == "bcc" else 1.0)
    alloy = bulk("Cu", lattice, a=constant, cubic=True).repeat(repetitions)
    alloy.symbols = occupied
    return alloy
