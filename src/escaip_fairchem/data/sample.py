"""Samples of the shape of public data sets, made on the spot and labelled by cheap calculators.

The labels are consistent (forces are the energy's derivative), so a model can learn them, but they
are no first principles: a sample shows that training works, no more.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from escaip_fairchem.data import splits, store
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from ase import Atoms
    from ase.calculators.calculator import Calculator

    from escaip_fairchem.data.summary import Summary

DEFAULT_FRAMES = 240
FRAMES_PER_SYSTEM = 12
VAL_FRACTION = 1 / 6  # 200 train and 40 val frames by default
RELAX_STEPS = 25
TEMPERATURE = 1000.0  # K at the start of the dynamics; half of it goes into potential energy
TIME_STEP = 1.5  # fs
STEPS_PER_FRAME = 4

#: Data sets that have a sample: what it holds, and the module that makes it.
DOMAINS = {
    "oc20": ("metal slabs with adsorbates", "sample_slabs"),
    "oc22": ("oxide-like slabs with adsorbates", "sample_oxides"),
    "mptrj": ("strained alloys with stress", "sample_crystals"),
    "spice": ("molecules", "sample_molecules"),
}

#: Makes ``n`` labelled frames of system ``index``.
SystemFrames = Callable[[int, int, np.random.Generator], Iterator["Atoms"]]


@dataclass(frozen=True)
class Maker:
    """What the module of a domain offers as ``maker()``.

    Attributes:
        frames: Makes the frames of one system.
        labels: Name of the calculator.
        note: A line for the user, if there is something to know.
    """

    frames: SystemFrames
    labels: str = "ASE EMT"
    note: str = ""


def make_sample(
    domain: str,
    out: Path | None = None,
    *,
    n_frames: int = DEFAULT_FRAMES,
    seed: int = 0,
    overwrite: bool = False,
) -> tuple[Summary, str]:
    """Write the sample of a domain, with frames of each system held out for validation.

    Args:
        domain: One of `DOMAINS`.
        out: Folder to make; ``$ESCAIP_DATA/DOMAIN/sample`` by default.
        n_frames: Frames in all, five sixths of them for training.
        seed: The same seed gives bitwise the same structures and labels.
        overwrite: Whether an existing folder may be replaced.

    Returns:
        What was written, and a line about the labels, which may be empty.

    Raises:
        UserError: If ``out`` exists, or ``n_frames`` is below 2.
    """
    from tqdm import tqdm

    from escaip_fairchem.data.summary import write_dataset

    if n_frames < 2:
        raise UserError(f"--frames is {n_frames}; give at least 2")
    if out is None:
        out = store.data_root() / domain / "sample"
        where = (
            f"{domain}/sample"  # relative to the data root, so that the package can ship the file
        )
    else:
        where = str(out.resolve())
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; choose another folder or pass --overwrite")
    maker = maker_of(domain)
    systems = [str(index // FRAMES_PER_SYSTEM) for index in range(n_frames)]
    frames = sample_frames(maker, n_frames, seed)
    summary = write_dataset(
        out,
        tqdm(frames, total=n_frames, unit=" frames", disable=None),
        splits.split_within_groups(systems, VAL_FRACTION, seed),
        label=domain,
        comment=f"written by escaip sample-data {domain} --frames {n_frames} --seed {seed} "
        f"({maker.labels})",
        paths=(f"{where}/train", f"{where}/val"),
        overwrite=overwrite,
    )
    return summary, maker.note


def maker_of(domain: str) -> Maker:
    """Import what makes the frames of a domain."""
    return importlib.import_module(f"escaip_fairchem.data.{DOMAINS[domain][1]}").maker()


def sample_frames(maker: Maker, n_frames: int, seed: int) -> Iterator[Atoms]:
    """Make labelled frames, ``FRAMES_PER_SYSTEM`` of each system.

    Yields:
        ``ase.Atoms`` with ``sid``, ``fid``, and raw labels in eV, eV/A and eV/A^3.
    """
    for start in range(0, n_frames, FRAMES_PER_SYSTEM):
        system = start // FRAMES_PER_SYSTEM
        rng = np.random.default_rng([seed, system])
        count = min(FRAMES_PER_SYSTEM, n_frames - start)
        for fid, frame in enumerate(maker.frames(system, count, rng)):
            frame.info |= {"sid": f"sample{system}", "fid": fid}
            yield frame


def trajectory(
    atoms: Atoms, calculator: Calculator, n_frames: int, rng: np.random.Generator
) -> Iterator[Atoms]:
    """Relax roughly, then follow the dynamics of the free atoms, yielding labelled snapshots."""
    from ase import units
    from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
    from ase.md.verlet import VelocityVerlet
    from ase.optimize import FIRE

    atoms.calc = calculator
    FIRE(atoms, logfile=None).run(fmax=0.05, steps=RELAX_STEPS)
    MaxwellBoltzmannDistribution(atoms, temperature_K=TEMPERATURE, rng=rng)
    dynamics = VelocityVerlet(atoms, timestep=TIME_STEP * units.fs)
    for _ in range(n_frames):
        dynamics.run(STEPS_PER_FRAME)
        yield snapshot(atoms)


def snapshot(atoms: Atoms, *, stress: bool = False) -> Atoms:
    """Copy structure and labels, without velocities.

    Args:
        atoms: With a calculator.
        stress: Whether to label stress.
    """
    from ase.calculators.singlepoint import SinglePointCalculator

    labels = {
        "energy": atoms.get_potential_energy(),
        "forces": atoms.get_forces(apply_constraint=False).copy(),
    }
    if stress:
        labels["stress"] = atoms.get_stress()
    frame = atoms.copy()
    frame.arrays.pop("momenta", None)
    frame.calc = SinglePointCalculator(frame, **labels)
    return frame
