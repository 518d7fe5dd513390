"""Metal slabs with adsorbates, as in OC20, labelled by ASE's EMT, which is a toy for adsorbates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from escaip_fairchem.data.sample import Maker, trajectory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ase import Atoms

METALS = ("Al", "Cu", "Ag", "Au", "Ni", "Pd", "Pt")
# Symbols and heights above the binding atom, A.
ADSORBATES = {
    "H": [("H", 0.0)],
    "O": [("O", 0.0)],
    "C": [("C", 0.0)],
    "N": [("N", 0.0)],
    "CO": [("C", 0.0), ("O", 1.15)],
    "OH": [("O", 0.0), ("H", 0.97)],
    "NH": [("N", 0.0), ("H", 1.03)],
    "CH": [("C", 0.0), ("H", 1.10)],
}
FACETS = {"fcc111": (3, 3, 3), "fcc100": (3, 3, 3), "fcc211": (3, 3, 4)}
VACUUM = 8.0  # A on each side
HEIGHT = 1.7  # A, adsorbate above its surface atom at the start


def maker() -> Maker:
    """What `escaip_fairchem.data.sample` makes the sample with."""
    return Maker(frames)


def frames(index: int, n_frames: int, rng: np.random.Generator) -> Iterator[Atoms]:
    """Make labelled frames of a system: tags 0 subsurface (fixed), 1 surface, 2 adsorbate."""
    from ase.calculators.emt import EMT

    yield from trajectory(build_system(index, rng), EMT(), n_frames, rng)


def build_system(index: int, rng: np.random.Generator) -> Atoms:
    """Build a slab of a metal or a binary alloy with an adsorbate.

    Facets and adsorbates take turns.

    Args:
        index: Number of the system.
        rng: Source of metals, alloy sites and the adsorption site.

    Returns:
        Unrelaxed structure, periodic in all directions, 28 to 38 atoms.
    """
    from ase import build
    from ase.constraints import FixAtoms
    from ase.data import atomic_numbers, reference_states

    facet, size = list(FACETS.items())[index % len(FACETS)]
    host, guest = rng.choice(METALS, size=2, replace=False)
    fraction = rng.choice([0.0, 0.25, 0.5])
    lattice = {metal: reference_states[atomic_numbers[metal]]["a"] for metal in (host, guest)}
    constant = (1 - fraction) * lattice[host] + fraction * lattice[guest]
    slab = getattr(build, facet)(str(host), size, a=constant, vacuum=VACUUM)
    slab.symbols[rng.permutation(len(slab))[: round(fraction * len(slab))]] = str(guest)

    surface = np.argsort(-slab.positions[:, 2], kind="stable")[: len(slab) // size[2]]
    tags = np.zeros(len(slab), dtype=int)
    tags[surface] = 1
    slab.set_tags(tags)
    add_adsorbate(slab, index, rng.choice(surface))
    slab.set_constraint(FixAtoms(mask=slab.get_tags() == 0))
    slab.pbc = True
    slab.info = {}
    return slab


def add_adsorbate(slab: Atoms, index: int, below: int) -> None:
    """Put an adsorbate onto a slab, in place, with tag 2.

    Args:
        slab: The slab.
        index: Number of the system; adsorbates take turns.
        below: The surface atom under it.
    """
    from ase import Atoms

    adsorbate = list(ADSORBATES.values())[index % len(ADSORBATES)]
    site = slab.positions[below] + [0.0, 0.0, HEIGHT]
    slab += Atoms(
        [symbol for symbol, _ in adsorbate],
        positions=[site + [0.0, 0.0, height] for _, height in adsorbate],
        tags=2,
    )
