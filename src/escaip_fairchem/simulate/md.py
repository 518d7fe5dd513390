"""Molecular dynamics that goes on after a kill as if there had been none; see `run_md`."""

from __future__ import annotations

import io
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from ase.md.velocitydistribution import (
    MaxwellBoltzmannDistribution,
    Stationary,
    ZeroRotation,
)

from escaip_fairchem.display import open_display
from escaip_fairchem.errors import UserError
from escaip_fairchem.files import write_whole
from escaip_fairchem.simulate.folder import claimed
from escaip_fairchem.simulate.integrators import (
    degrees_of_freedom,
    make,
    restore,
    state_of,
    temperature_of,
)
from escaip_fairchem.simulate.md_files import Files, drift
from escaip_fairchem.simulate.structures import fingerprint

if TYPE_CHECKING:
    from pathlib import Path

    from ase import Atoms
    from ase.md.md import MolecularDynamics

    from escaip_fairchem.simulate.model import Model

STATE_NAME = "state.npz"


@dataclass(frozen=True)
class MDOptions:
    """What is simulated.

    Attributes:
        ensemble: ``nve``, ``nvt`` or ``npt``.
        temperature: K; None in NVE keeps the momenta of the structure.
        timestep: fs.
        thermostat: Of NVT: ``langevin`` or ``bussi``; NPT has Nose-Hoover chains.
        thermostat_time: Its relaxation time, fs.
        barostat: Of NPT: ``isotropic`` or ``full`` (all of the cell).
        barostat_time: Its relaxation time, fs.
        pressure: Of NPT, GPa.
        every: Steps between frames and lines of the log.
        seed: Of initial momenta and thermostat.
    """

    ensemble: str = "nve"
    temperature: float | None = None
    timestep: float = 1.0
    thermostat: str = "langevin"
    thermostat_time: float = 100.0
    barostat: str = "isotropic"
    barostat_time: float = 1000.0
    pressure: float = 0.0
    every: int = 10
    seed: int = 0


def run_md(
    model: Model,
    atoms: Atoms,
    steps: int,
    out: Path,
    options: MDOptions,
    *,
    save_seconds: float = 30.0,
) -> str:
    """Simulate up to a step, or go on to there.

    Into the folder: ``trajectory.extxyz`` (with momenta, forces, step and time), ``log.csv``, and
    ``state.npz``, from which the next start goes on bit by bit; what was written after it is cut
    off then.

    Args:
        model: What evaluates the structure.
        atoms: Where to start; not changed.
        steps: Steps from the start, those of earlier starts included.
        out: Folder of the results.
        options: What is simulated.
        save_seconds: Time between states, s.

    Returns:
        A line about the drift of the conserved energy.

    Raises:
        UserError: What the model or the structure is not fit for, or another simulation's folder.
    """
    _refuse(model, atoms, steps, options)
    settings = {**model.settings, **asdict(options), "structure_sha256": fingerprint([atoms])}
    atoms = atoms.copy()
    atoms.calc = model.calculator
    freedom = degrees_of_freedom(atoms, options)
    with claimed(out, settings):
        rng = np.random.default_rng(options.seed)
        if options.temperature is not None:  # before a saved state, too: Bussi looks at it
            _heat(atoms, options.temperature, freedom, rng)
        dynamics = make(atoms, options, freedom, rng)
        files = Files(out, options, freedom)
        _go_on(dynamics, rng, files)
        with files:
            _simulate(dynamics, rng, files, steps, options, save_seconds)
        return drift(out, len(atoms), options)


def _go_on(dynamics: MolecularDynamics, rng: np.random.Generator, files: Files) -> None:
    """Take up the saved state, if there is one, and the files as they were then."""
    path = files.folder / STATE_NAME
    if not path.is_file():
        files.cut(0, 0)
        return
    with np.load(path) as saved:
        state = dict(saved)
    lengths = state.pop("lengths")
    restore(dynamics, rng, state)
    files.cut(*map(int, lengths))


def _simulate(
    dynamics: MolecularDynamics,
    rng: np.random.Generator,
    files: Files,
    steps: int,
    options: MDOptions,
    save_seconds: float,
) -> None:
    atoms = dynamics.atoms
    first = dynamics.nsteps
    display = open_display("md", steps, first)
    start = saved = time.monotonic()

    def save() -> None:
        content = io.BytesIO()
        np.savez(content, **state_of(dynamics, rng), lengths=np.array(files.lengths()))
        write_whole(files.folder / STATE_NAME, content.getvalue())

    if not first:
        files.add(dynamics)
        save()
    while dynamics.nsteps < steps:
        dynamics.step()
        dynamics.nsteps += 1
        if not np.isfinite(atoms.positions).all():
            raise UserError(
                f"positions are not finite after step {dynamics.nsteps}: the model has lost the "
                "structure; take a shorter --timestep, or train on such structures"
            )
        if dynamics.nsteps % options.every == 0:
            files.add(dynamics)
        if time.monotonic() - saved >= save_seconds:
            save()
            saved = time.monotonic()
        if display.due():
            done = dynamics.nsteps - first
            rate = done / (time.monotonic() - start)
            display.show(
                dynamics.nsteps,
                f"{rate:.3g} steps/s, {rate * options.timestep * 86.4:.3g} ps/day, "
                f"{temperature_of(atoms, files.freedom):.0f} K",
            )
    save()
    display.close()


def _heat(atoms: Atoms, temperature: float, freedom: int, rng: np.random.Generator) -> None:
    """Momenta of exactly a temperature; a free structure neither moves nor turns as a whole."""
    MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=rng)
    if not atoms.constraints and len(atoms) > 1:
        Stationary(atoms)
        if not atoms.pbc.any():
            ZeroRotation(atoms)
    present = temperature_of(atoms, freedom)
    if present > 0:
        atoms.set_momenta(atoms.get_momenta() * (temperature / present) ** 0.5)


def _refuse(model: Model, atoms: Atoms, steps: int, options: MDOptions) -> None:
    """What must not be simulated; what is doubtful gets a line."""
    if steps < 0 or options.timestep <= 0 or options.every < 1:
        raise UserError("--timestep and --every must be positive, --steps not negative")
    if options.seed < 0:
        raise UserError(f"--seed is {options.seed}; it must not be negative")
    if not atoms.get_number_of_degrees_of_freedom():
        raise UserError("all atoms are fixed, so nothing can move; remove the constraint")
    if options.thermostat_time <= 0 or options.barostat_time <= 0:
        raise UserError("--thermostat-time and --barostat-time must be positive")
    if options.temperature is None:
        if options.ensemble != "nve":
            raise UserError(f"{options.ensemble} needs --temperature")
        if not atoms.get_momenta().any():
            raise UserError("the structure has no momenta; give --temperature")
    elif options.temperature < 0 or (options.temperature == 0 and options.ensemble != "nve"):
        raise UserError("--temperature must be positive")
    if options.ensemble == "npt":
        _refuse_npt(model, atoms)
    if options.ensemble == "nve":
        model.warn_if_direct("energy is not conserved in NVE; use nvt, or a conservative model")


def _refuse_npt(model: Model, atoms: Atoms) -> None:
    if not model.has_stress:
        raise UserError(f"npt needs stress, and {model.name} predicts none; use nvt")
    if not atoms.pbc.all():
        raise UserError("npt needs a structure that is periodic along all axes; use nvt")
    if atoms.constraints:
        raise UserError("npt does not go with constraints (FixAtoms); remove them, or use nvt")
    model.warn_if_direct("its direct stress need not belong to its energy, either")


def steps_of(steps: int | None, ps: float | None, timestep: float) -> int:
    """Number of steps of ``--steps`` or ``--ps``.

    Raises:
        UserError: Neither or both are given, or the time step is not positive.
    """
    if (steps is None) == (ps is None):
        raise UserError("give --steps or --ps, one of them")
    if not timestep > 0:
        raise UserError(f"--timestep is {timestep:g}; it must be positive")
    return steps if steps is not None else round(ps * 1000 / timestep)
