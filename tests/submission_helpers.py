"""Test sets in the published layout, and files for leaderboards written from them by hand."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
from ase.build import add_adsorbate, fcc111
from ase.constraints import FixAtoms
from ase.io import write

from escaip_fairchem.data.convert import convert

if TYPE_CHECKING:
    from pathlib import Path

    from ase import Atoms

OC20_SPLITS = ("id", "ood_ads", "ood_cat", "ood_both")
FRAMES = 3  # of each system


def slabs(split: int, systems: int, frames: int = FRAMES) -> list[Atoms]:
    """Slabs of several sizes without labels, some atoms held in place, several frames a system."""
    rng = np.random.default_rng(split)
    found = []
    for system in range(systems):
        layers = 2 + (system + split) % 2
        slab = fcc111(("Cu", "Pt", "Ni")[system % 3], (2, 2, layers), vacuum=6.0)
        add_adsorbate(slab, ("O", "H", "N")[system // 2 % 3], 1.5, "fcc")
        slab.pbc = True
        slab.set_constraint(FixAtoms(mask=slab.get_tags() > 1))
        for frame in range(frames):
            atoms = slab.copy()
            atoms.rattle(0.05, rng=rng)
            # names in no order, of several lengths, as in the published sets
            atoms.info = {"sid": f"random{(system * 7919 + split) % 1000 + 97}", "fid": 10 * frame}
            found.append(atoms)
    return found


def make_test_set(folder: Path, splits: dict[str, list[Atoms]]) -> Path:
    """Folders ``test_SPLIT`` of ASE-LMDB files, as published."""
    for split, frames in splits.items():
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / "frames.extxyz"
        write(source, frames)
        convert([str(source)], folder / "out", unlabelled=True)
        shutil.move(folder / "out" / "test", folder / f"test_{split}")
        shutil.rmtree(folder / "out")
        source.unlink()
    return folder
