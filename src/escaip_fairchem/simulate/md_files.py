"""What a simulation writes as it goes: a trajectory, and a table of energies."""

from __future__ import annotations

import csv
import os
from typing import TYPE_CHECKING, Self

import ase.io
import numpy as np
from ase import units
from ase.calculators.singlepoint import SinglePointCalculator

from escaip_fairchem.errors import UserError
from escaip_fairchem.simulate.integrators import conserved, temperature_of

if TYPE_CHECKING:
    from pathlib import Path

    from ase.md.md import MolecularDynamics

    from escaip_fairchem.simulate.md import MDOptions

TRAJECTORY_NAME = "trajectory.extxyz"
LOG_NAME = "log.csv"
COLUMNS = (
    "step",
    "time_ps",
    "potential_eV",
    "kinetic_eV",
    "total_eV",
    "conserved_eV",
    "temperature_K",
    "pressure_GPa",
    "volume_A3",
)


class Files:
    """The files of a simulation, only ever added to, so that they can be cut at a saved state.

    Args:
        folder: Where they are.
        options: What is simulated.
        freedom: Degrees of freedom that share the temperature.
    """

    def __init__(self, folder: Path, options: MDOptions, freedom: int) -> None:
        self.folder, self.freedom = folder, freedom
        self._timestep = options.timestep
        self._with_cell = options.ensemble == "npt"
        self._paths = (folder / TRAJECTORY_NAME, folder / LOG_NAME)

    def cut(self, *lengths: int) -> None:
        """Give the files the lengths of a saved state, in bytes.

        Raises:
            UserError: A file is shorter: what the state goes on from is not all there.
        """
        for path, length in zip(self._paths, lengths, strict=True):
            path.touch()
            if path.stat().st_size < length:
                raise UserError(
                    f"{path} has lost what it had when state.npz was saved; put it back, or start "
                    "in another folder (--out)"
                )
            os.truncate(path, length)

    def __enter__(self) -> Self:
        """Open them."""
        self._trajectory, self._log = (path.open("a", newline="") for path in self._paths)
        if not self._log.tell():
            csv.writer(self._log, lineterminator="\n").writerow(COLUMNS)
        return self

    def __exit__(self, *_: object) -> None:
        """Close them."""
        self._trajectory.close()
        self._log.close()

    def add(self, dynamics: MolecularDynamics) -> None:
        """Write the present step into both."""
        atoms, step = dynamics.atoms, dynamics.nsteps
        energy, kinetic = atoms.get_potential_energy(), atoms.get_kinetic_energy()
        time = round(step * self._timestep / 1000, 9)
        frame = atoms.copy()
        frame.info = {"step": step, "time_ps": time}
        frame.calc = SinglePointCalculator(
            frame, energy=energy, forces=atoms.get_forces(apply_constraint=False)
        )
        ase.io.write(self._trajectory, frame, format="extxyz")
        kept = conserved(dynamics)
        row = [step, time, energy, kinetic, energy + kinetic, "" if kept is None else kept]
        row.append(temperature_of(atoms, self.freedom))
        if self._with_cell:
            stress = atoms.get_stress(voigt=False, include_ideal_gas=True)
            row += [-np.trace(stress) / 3 / units.GPa, atoms.get_volume()]
        else:
            row += ["", ""]
        # repr of a float is exact
        csv.writer(self._log, lineterminator="\n").writerow(
            [repr(float(v)) if isinstance(v, float) else v for v in row]
        )

    def lengths(self) -> tuple[int, int]:
        """Bytes of both files, which are on the disk afterwards."""
        for file in (self._trajectory, self._log):
            file.flush()
            os.fsync(file.fileno())
        return self._trajectory.tell(), self._log.tell()


def drift(folder: Path, natoms: int, options: MDOptions) -> str:
    """A line about the conserved energy of a log: slope of a straight line, and what is left.

    Args:
        folder: Of the simulation.
        natoms: Atoms in it.
        options: What was simulated.
    """
    with (folder / LOG_NAME).open(newline="") as file:
        rows = list(csv.DictReader(file))
    if options.ensemble == "nvt" and options.thermostat == "langevin":
        return "energy drift: a Langevin thermostat conserves nothing to measure it by"
    if len(rows) < 3:
        return "energy drift: too few lines in log.csv to tell"
    times = np.array([float(row["time_ps"]) for row in rows])
    energies = 1000 * np.array([float(row["conserved_eV"]) for row in rows]) / natoms
    slope, start = np.polyfit(times, energies, 1)
    rest = np.std(energies - (slope * times + start))
    return (
        f"energy drift: {slope:.3g} meV/atom/ps over {times[-1]:g} ps, "
        f"{rest:.3g} meV/atom around it"
    )
