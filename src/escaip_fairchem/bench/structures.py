"""Structures to measure on, made by ASE from a seed: no data file is needed.

They have the sizes and densities of OC20 (slabs with an adsorbate, 60 to 89 atoms), of SPICE
(molecules in contact, 22 to 50 atoms) and of MPtrj (bulk crystals, 8 to 144 atoms).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, hcp0001, molecule

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: Standard deviation of the displacements, Angstrom: no two neighbours are exactly equally far.
RATTLE = 0.08
MOLECULE_RATTLE = 0.04

_FCC = ("Al", "Ni", "Cu", "Rh", "Pd", "Ag", "Ir", "Pt", "Au")
_HCP = ("Ti", "Co", "Zn", "Zr", "Ru", "Re")
_SLABS = ((4, 4, 4), (3, 5, 4), (4, 5, 4), (4, 4, 5))
_ADSORBATES = ("CO", "OH", "H2O", "CH3", "NH3", "CH3OH", "C2H4", "CH3CHO")
_MOLECULES = ("CH3CH2OH", "C6H6", "CH3CONH2", "CH3COOH", "C4H4NH", "C5H5N", "H2O", "CH3SCH3")
_CRYSTALS = (
    ("NaCl", "rocksalt", 5.64),
    ("MgO", "rocksalt", 4.21),
    ("TiN", "rocksalt", 4.24),
    ("GaAs", "zincblende", 5.65),
    ("ZnS", "zincblende", 5.41),
    ("CaF2", "fluorite", 5.46),
    ("Si", "diamond", 5.43),
)
_REPEATS = ((1, 1, 1), (1, 1, 2), (1, 1, 3), (1, 2, 2), (1, 2, 3), (2, 2, 2), (2, 2, 3))


def slab(seed: int) -> Atoms:
    """A four- or five-layer slab with dopants and an adsorbate, periodic along all axes."""
    random = np.random.default_rng(seed)
    close_packed = random.random() < 0.7
    build, elements = (fcc111, _FCC) if close_packed else (hcp0001, _HCP)
    element = str(random.choice(elements))
    size = _SLABS[random.integers(len(_SLABS))]
    atoms = build(element, size, vacuum=8.0, periodic=True)
    dopants = random.random(len(atoms)) < random.uniform(0.0, 0.2)
    atoms.symbols[dopants] = str(random.choice(elements))
    adsorbate = molecule(str(random.choice(_ADSORBATES)))
    depth = adsorbate.positions[0, 2] - adsorbate.positions[:, 2].min()
    site = tuple(random.integers(0, 3, 2))
    add_adsorbate(atoms, adsorbate, 2.0 + depth, "ontop", offset=site)
    return _rattled(atoms, seed)


def molecules(seed: int) -> Atoms:
    """Small molecules in contact, without a cell."""
    random = np.random.default_rng(seed)
    target = random.integers(22, 40)
    atoms = Atoms()
    while len(atoms) < target:
        added = molecule(str(random.choice(_MOLECULES)))
        added.rotate(360 * random.random(), random.normal(size=3), center="COM")
        added.positions -= added.positions.mean(0)
        direction = random.normal(size=3)
        direction /= np.linalg.norm(direction)
        while len(atoms) and _closest(atoms, added) < 2.2:
            added.positions += 0.2 * direction
        atoms += added
        atoms.positions -= atoms.positions.mean(0)
    return _rattled(atoms, seed, MOLECULE_RATTLE)


def crystal(seed: int) -> Atoms:
    """A cubic crystal with some sites substituted, strained, 8 to 144 atoms."""
    random = np.random.default_rng(seed)
    name, kind, constant = _CRYSTALS[random.integers(len(_CRYSTALS))]
    repeats = random.permutation(_REPEATS[random.integers(len(_REPEATS))])
    atoms = bulk(name, kind, constant, cubic=True).repeat(tuple(int(r) for r in repeats))
    atoms.symbols[random.random(len(atoms)) < 0.05] = "Fe"
    strain = np.eye(3) + random.uniform(-0.03, 0.03, (3, 3))
    atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
    return _rattled(atoms, seed)


def solid(atoms: int, seed: int = 0, *, rattle: bool = True) -> Atoms:
    """A doped fcc crystal of about `atoms` atoms, for sizes that no other domain has."""
    if atoms < 4:
        raise UserError(f"{atoms} atoms: the smallest crystal here has 4")
    edge = max(1, round((atoms / 4) ** (1 / 3)))
    length = max(1, round(atoms / (4 * edge * edge)))
    crystal_ = bulk("Cu", cubic=True).repeat((edge, edge, length))
    random = np.random.default_rng(seed)
    crystal_.symbols[random.random(len(crystal_)) < 0.1] = "Au"
    return _rattled(crystal_, seed) if rattle else crystal_


#: Name on the command line -> maker of one structure from a seed.
DOMAINS: dict[str, Callable[[int], Atoms]] = {
    "slabs": slab,
    "molecules": molecules,
    "crystals": crystal,
}


def batch_by_systems(domain: str, systems: int, seed: int = 0) -> list[Atoms]:
    """`systems` structures of a domain; each seed gives others."""
    return [DOMAINS[domain](1000 * seed + index) for index in range(systems)]


def batch_by_atoms(domain: str, atoms: int, seed: int = 0) -> list[Atoms]:
    """Structures of a domain, at least one, whose atoms add up to about `atoms`."""
    batch = [DOMAINS[domain](1000 * seed)]
    while True:
        following = DOMAINS[domain](1000 * seed + len(batch))
        total = sum(map(len, batch))
        if total + len(following) / 2 > atoms:
            return batch
        batch.append(following)


def from_file(path: Path, index: str) -> list[Atoms]:
    """Structures of a file that ASE reads.

    Args:
        path: The file.
        index: Which of them, as in ``ase.io.read``: ``0``, ``:8``, ``::100``.

    Returns:
        The structures.

    Raises:
        UserError: The file is missing or not readable, or nothing is selected.
    """
    from ase.io import read

    if not path.is_file():
        raise UserError(f"no structures at {path}")
    try:
        found = read(path, index)
    except Exception as error:  # ASE's readers raise anything
        raise UserError(f"ASE cannot read {index} of {path}: {error}") from error
    found = [found] if isinstance(found, Atoms) else found
    if not found:
        raise UserError(f"{path} has no structure at {index}")
    return found


def _closest(first: Atoms, second: Atoms) -> float:
    difference = first.positions[:, None] - second.positions[None]
    return float(np.linalg.norm(difference, axis=-1).min())


def _rattled(atoms: Atoms, seed: int, by: float = RATTLE) -> Atoms:
    atoms.rattle(by, seed=seed)
    return atoms
