"""A sample of OC20's shape, made on the spot: metal slabs with adsorbates, labelled by ASE's EMT.

EMT is a toy for adsorbates. The labels are consistent (forces are the energy's derivative), so a
model can learn them, but they are no chemistry: the sample shows that training works, no more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from escaip_fairchem.data import splits, store
from escaip_fairchem.data.convert import Summary, write_dataset
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ase import Atoms

DEFAULT_FRAMES = 240
FRAMES_PER_SYSTEM = 12
VAL_FRACTION = 1 / 6  # 200 train and 40 val frames by default
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
RELAX_STEPS = 25
TEMPERATURE = 1000.0  # K at the start of the dynamics; half of it goes into potential energy
TIME_STEP = 1.5  # fs
STEPS_PER_FRAME = 4


def make_oc20_sample(
    out: Path | None = None,
    *,
    n_frames: int = DEFAULT_FRAMES,
    seed: int = 0,
    overwrite: bool = False,
) -> Summary:
    """Write the sample: short EMT trajectories, with frames of each held out for validation.

    Args:
        out: Folder to make; ``$ESCAIP_DATA/oc20/sample`` by default.
        n_frames: Frames in all, five sixths of them for training.
        seed: The same seed gives bitwise the same structures and labels.
        overwrite: Whether an existing folder may be replaced.

    Returns:
        What was written.

    Raises:
        UserError: If ``out`` exists, or ``n_frames`` is below 2.
    """
    from tqdm import tqdm

    if n_frames < 2:
        raise UserError(f"--frames is {n_frames}; give at least 2")
    if out is None:
        out = store.data_root() / "oc20" / "sample"
        where = "oc20/sample"  # relative to the data root, so that the package can ship the file
    else:
        where = str(out.resolve())
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; choose another folder or pass --overwrite")
    systems = [str(index // FRAMES_PER_SYSTEM) for index in range(n_frames)]
    return write_dataset(
        out,
        tqdm(sample_frames(n_frames, seed), total=n_frames, unit=" frames", disable=None),
        splits.split_within_groups(systems, VAL_FRACTION, seed),
        label="oc20",
        comment=f"written by escaip sample-data oc20 --frames {n_frames} --seed {seed} (ASE EMT)",
        paths=(f"{where}/train", f"{where}/val"),
        overwrite=overwrite,
    )


def sample_frames(n_frames: int, seed: int) -> Iterator[Atoms]:
    """Make labelled frames, ``FRAMES_PER_SYSTEM`` of each system.

    Yields:
        ``ase.Atoms`` with tags (0 subsurface, 1 surface, 2 adsorbate), subsurface atoms fixed,
        ``sid``, ``fid``, and raw EMT labels in eV and eV/A.
    """
    for start in range(0, n_frames, FRAMES_PER_SYSTEM):
        system = start // FRAMES_PER_SYSTEM
        rng = np.random.default_rng([seed, system])
        atoms = build_system(system, rng)
        for fid, frame in enumerate(
            _trajectory(atoms, min(FRAMES_PER_SYSTEM, n_frames - start), rng)
        ):
            frame.info = {"sid": f"sample{system}", "fid": fid}
            yield frame


def build_system(index: int, rng: np.random.Generator) -> Atoms:
    """Build a slab of a metal or a binary alloy with an adsorbate.

    Facets and adsorbates take turns.

    Args:
        index: Number of the system.
        rng: Source of metals, alloy sites and the adsorption site.

    Returns:
        Unrelaxed structure, periodic in all directions, 28 to 38 atoms.
    """
    from ase import Atoms, build
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
    adsorbate = list(ADSORBATES.values())[index % len(ADSORBATES)]
    site = slab.positions[rng.choice(surface)] + [0.0, 0.0, HEIGHT]
    slab += Atoms(
        [symbol for symbol, _ in adsorbate],
        positions=[site + [0.0, 0.0, height] for _, height in adsorbate],
        tags=2,
    )
    slab.set_constraint(FixAtoms(mask=slab.get_tags() == 0))
    slab.pbc = True
    slab.info = {}
    return slab


def _trajectory(atoms: Atoms, n_frames: int, rng: np.random.Generator) -> Iterator[Atoms]:
    """Relax roughly, then follow the dynamics of the free atoms, yielding labelled snapshots."""
    from ase import units
    from ase.calculators.emt import EMT
    from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
    from ase.md.verlet import VelocityVerlet
    from ase.optimize import FIRE

    atoms.calc = EMT()
    FIRE(atoms, logfile=None).run(fmax=0.05, steps=RELAX_STEPS)
    MaxwellBoltzmannDistribution(atoms, temperature_K=TEMPERATURE, rng=rng)
    dynamics = VelocityVerlet(atoms, timestep=TIME_STEP * units.fs)
    for _ in range(n_frames):
        dynamics.run(STEPS_PER_FRAME)
        yield _snapshot(atoms)


def _snapshot(atoms: Atoms) -> Atoms:
    """Copy structure and labels, without velocities."""
    from ase.calculators.singlepoint import SinglePointCalculator

    energy, forces = atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False)
    frame = atoms.copy()
    del frame.arrays["momenta"]
    frame.calc = SinglePointCalculator(frame, energy=energy, forces=forces.copy())
    return frame
