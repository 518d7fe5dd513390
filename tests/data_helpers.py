"""Structures with labels, and what fairchem reads back."""

from __future__ import annotations

import gzip
import io
from typing import TYPE_CHECKING

import numpy as np
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io import read
from fairchem.core.datasets.ase_datasets import AseDBDataset

if TYPE_CHECKING:
    from pathlib import Path

    from ase import Atoms


def read_sample(path: Path, index: str = ":") -> list[Atoms]:
    """Frames of an ``.extxyz.gz``, unpacked once, which ASE does once per frame."""
    return read(io.StringIO(gzip.decompress(path.read_bytes()).decode()), index, format="extxyz")


def stored(folder: Path) -> list[Atoms]:
    """Frames of a split, read by fairchem."""
    dataset = AseDBDataset({"src": str(folder)})
    return [dataset.get_atoms(index) for index in range(len(dataset))]


def labelled_atoms(n_frames: int, **info) -> list[Atoms]:
    """Distorted copper supercells with EMT labels, the first atom fixed."""
    rng = np.random.default_rng(0)
    frames = []
    for index in range(n_frames):
        atoms = bulk("Cu", cubic=True).repeat((1, 1, 2))
        atoms.rattle(0.1, rng=rng)
        atoms.set_constraint(FixAtoms([0]))
        atoms.calc = EMT()
        energy, forces = atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        atoms.info = {"index": index, **{key: value[index] for key, value in info.items()}}
        frames.append(atoms)
    return frames
