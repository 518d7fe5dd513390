"""Oxide-like slabs with adsorbates, as in OC22, labelled by ASE's EMT.

EMT knows oxygen only roughly, so these are metal-oxygen slabs of rocksalt's shape, hardly oxides.
GFN-xTB, which treats oxides, needs half a second and more a structure and may not converge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from escaip_fairchem.data.sample import Maker, trajectory
from escaip_fairchem.data.sample_slabs import METALS, VACUUM, add_adsorbate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ase import Atoms

LAYERS = 3
OXYGEN = 8
EXPANSION = 1.18  # lattice constant of the metal with oxygen in its holes, near EMT's minimum
VACANCIES = (0.0, 0.0, 0.25, 0.5)  # part of the oxygen that is missing
CLEAN_SLABS = 4  # every fourth system has no adsorbate, as in OC22


def maker() -> Maker:
    """What `escaip_fairchem.data.sample` makes the sample with."""
    return Maker(frames)


def frames(index: int, n_frames: int, rng: np.random.Generator) -> Iterator[Atoms]:
    """Make labelled frames of a system: tags 0 subsurface, 1 surface, 2 adsorbate; none fixed."""
    from ase.calculators.emt import EMT

    yield from trajectory(build_system(index, rng), EMT(), n_frames, rng)


def build_system(index: int, rng: np.random.Generator) -> Atoms:
    """Build a rocksalt (100) slab of two metals and oxygen, with an adsorbate or without.

    Args:
        index: Number of the system; adsorbates and vacancies take turns.
        rng: Source of metals, their sites, oxygen vacancies and the adsorption site.

    Returns:
        Unrelaxed structure, periodic in all directions, ``nads`` in its ``info``.
    """
    from ase.build import bulk, surface
    from ase.data import atomic_numbers, reference_states

    host, guest = (str(metal) for metal in rng.choice(METALS, size=2, replace=False))
    constant = np.mean([reference_states[atomic_numbers[metal]]["a"] for metal in (host, guest)])
    crystal = bulk(f"{host}O", "rocksalt", a=EXPANSION * constant, cubic=True)
    slab = surface(crystal, (1, 0, 0), LAYERS, vacuum=VACUUM, periodic=True)
    metal = np.flatnonzero(slab.numbers != OXYGEN)
    slab.symbols[rng.permutation(metal)[: len(metal) // 2]] = guest
    oxygen = np.flatnonzero(slab.numbers == OXYGEN)
    missing = round(VACANCIES[index % len(VACANCIES)] * len(oxygen))
    del slab[rng.permutation(oxygen)[:missing]]

    height = slab.positions[:, 2]
    slab.set_tags(np.where(height > height.max() - 0.5, 1, 0))
    metal_on_top = np.flatnonzero((slab.get_tags() == 1) & (slab.numbers != OXYGEN))
    slab.info = {"nads": 0}
    if index % CLEAN_SLABS:
        add_adsorbate(slab, index, rng.choice(metal_on_top))
        slab.info = {"nads": 1}
    return slab
