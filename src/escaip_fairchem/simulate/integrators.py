"""ASE's integrators for the three ensembles, and all of their state."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import units
from ase.md.bussi import Bussi
from ase.md.langevin import Langevin
from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT
from ase.md.verlet import VelocityVerlet

if TYPE_CHECKING:
    from ase import Atoms
    from ase.md.md import MolecularDynamics

    from escaip_fairchem.simulate.md import MDOptions

#: Objects inside of an integrator that have a state of their own.
_PARTS = ("_thermostat", "_barostat")


def degrees_of_freedom(atoms: Atoms, options: MDOptions) -> int:
    """How many degrees of freedom share the temperature.

    A structure that nothing holds starts without moving or, if it is not periodic, turning as a
    whole. Forces do not change that (those of direct models do, a little), so these degrees of
    freedom stay cold, and the others would have their energy if they were counted. Only Langevin's
    thermostat moves the whole, too.

    Args:
        atoms: Where it starts.
        options: What is simulated.
    """
    number = atoms.get_number_of_degrees_of_freedom()
    langevin = options.ensemble == "nvt" and options.thermostat == "langevin"
    if langevin or atoms.constraints or len(atoms) == 1:
        return number
    number -= 3
    if not atoms.pbc.any():
        moments = atoms.get_moments_of_inertia()
        number -= int((moments > 1e-6 * moments.max()).sum())  # one less if it is linear
    return number


def temperature_of(atoms: Atoms, freedom: int) -> float:
    """Temperature, K, of so many degrees of freedom."""
    return 2 * atoms.get_kinetic_energy() / (freedom * units.kB)


def make(
    atoms: Atoms, options: MDOptions, freedom: int, rng: np.random.Generator
) -> MolecularDynamics:
    """The integrator of an ensemble.

    Args:
        atoms: With momenta and a calculator.
        options: The ensemble and its numbers.
        freedom: From `degrees_of_freedom`.
        rng: What a stochastic thermostat draws from.
    """
    step = options.timestep * units.fs
    if options.ensemble == "nve":
        return VelocityVerlet(atoms, step)
    relaxation = options.thermostat_time * units.fs
    if options.ensemble == "npt":
        barostat = IsotropicMTKNPT if options.barostat == "isotropic" else MTKNPT
        dynamics = barostat(
            atoms,
            step,
            temperature_K=options.temperature,
            pressure_au=options.pressure * units.GPa,
            tdamp=relaxation,
            pdamp=options.barostat_time * units.fs,
        )
        # ASE counts all of them, in these two places
        dynamics._num_atoms_global = dynamics._thermostat._num_atoms_global = freedom / 3
        return dynamics
    if options.thermostat == "bussi":
        dynamics = Bussi(atoms, step, options.temperature, relaxation, rng=rng)
        dynamics.ndof = freedom
        dynamics.target_kinetic_energy = freedom * dynamics.temp / 2
        return dynamics
    return Langevin(
        atoms,
        step,
        temperature_K=options.temperature,
        friction=1 / relaxation,
        fixcm=False,
        rng=rng,
    )


def conserved(dynamics: MolecularDynamics) -> float | None:
    """The energy that exact dynamics would conserve, eV; None with a Langevin thermostat."""
    if isinstance(dynamics, Langevin):
        return None
    if hasattr(dynamics, "get_conserved_energy"):
        return dynamics.get_conserved_energy()
    # what Bussi's thermostat has put in
    return dynamics.atoms.get_total_energy() - getattr(dynamics, "transferred_energy", 0.0)


def state_of(dynamics: MolecularDynamics, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """All that the next step depends on, as arrays for ``numpy.savez``."""
    atoms = dynamics.atoms
    state = {
        "positions": atoms.positions.copy(),
        "momenta": atoms.get_momenta(),
        "cell": atoms.cell.array.copy(),
        "rng": np.array(json.dumps(rng.bit_generator.state)),
    }
    plain: dict[str, Any] = {}
    for part, owner in _owners(dynamics).items():
        for name, value in vars(owner).items():
            # numbers of Python and of NumPy are rounded differently in powers, so kinds are kept
            if type(value) in (int, float):
                plain[f"{part}.{name}"] = value
            elif isinstance(value, np.ndarray | np.generic):
                state[f"{part}.{name}"] = np.asarray(value)
    return state | {"plain": np.array(json.dumps(plain))}


def restore(
    dynamics: MolecularDynamics, rng: np.random.Generator, state: dict[str, np.ndarray]
) -> None:
    """Take up what `state_of` gave, bit by bit."""
    atoms = dynamics.atoms
    atoms.set_cell(state["cell"])
    atoms.positions[:] = state["positions"]
    atoms.set_momenta(state["momenta"], apply_constraint=False)
    rng.bit_generator.state = json.loads(str(state["rng"]))
    owners = _owners(dynamics)
    for key, value in state.items():
        part, _, name = key.partition(".")
        if name:
            setattr(owners[part], name, value.copy() if value.ndim else value[()])
    for key, value in json.loads(str(state["plain"])).items():
        part, _, name = key.partition(".")
        setattr(owners[part], name, value)


def _owners(dynamics: MolecularDynamics) -> dict[str, Any]:
    parts = {name: getattr(dynamics, name) for name in _PARTS if hasattr(dynamics, name)}
    return {"dynamics": dynamics, **parts}
