"""Which units a molecule's trajectory is in, judged by physics."""

from __future__ import annotations

import numpy as np

from escaip_fairchem.errors import UserError

ENERGY_UNITS = ("kcal", "kj", "ev", "hartree")
# Energy of all electrons over the Thomas-Fermi estimate: 0.65 for hydrogen, 0.76 for C, N and O.
THOMAS_FERMI = 0.7687  # hartree, times Z^(7/3)
ALL_ELECTRON_RANGE = (0.5, 1.0)
# dE over -F.dx: 0.85 to 1.09 on DFT samples of ten molecules where the two correlate so well, which
# frames far apart do not. The closest units, A and Bohr, differ by 1.89.
SLOPE_RANGE = (0.65, 1.5)
MIN_CORRELATION = 0.9
CLOSEST_PAIRS = 20


def in_ev(unit: str) -> float:
    """One of `ENERGY_UNITS` in eV; kcal and kj are per mol."""
    from ase import units

    factors = {"kcal": units.kcal / units.mol, "kj": units.kJ / units.mol}
    return {**factors, "ev": 1.0, "hartree": units.Hartree}[unit]


def check_units(
    unit: str,
    said: tuple[str, str | None],
    numbers: np.ndarray,
    positions: np.ndarray,
    energies: np.ndarray,
    forces: np.ndarray,
) -> None:
    """Compare units with what a file says, the size of its energies and the work of its forces.

    Args:
        unit: Unit of energies, and of forces per A; one of `ENERGY_UNITS`.
        said: Units of length and energy that the file names; the latter may be None.
        numbers: Atomic numbers, (N,).
        positions: (M, N, 3).
        energies: (M,).
        forces: (M, N, 3).

    Raises:
        UserError: If they do not fit, naming the unit that would.
    """
    length, energy = said[0].lower(), (said[1] or unit).lower().removesuffix("/mol")
    if length not in ("ang", "angstrom", "a"):
        raise UserError(f"positions are in {said[0]}; convert them to A")
    if energy in ENERGY_UNITS and energy != unit:
        raise UserError(f"the file says {said[1]}, not {unit}; pass --set units={energy}")
    fitting = unit_of_total_energy(numbers, float(np.median(energies)))
    if fitting not in (None, unit):
        raise UserError(
            f"{energies[0]:.8g} is the total energy of this molecule in {fitting}, not in {unit}; "
            f"pass --set units={fitting}"
        )
    slope, correlation = work_slope(positions, energies, forces)
    low, high = SLOPE_RANGE
    if abs(correlation) > MIN_CORRELATION and not low < slope < high:
        raise UserError(
            f"energies change by {slope:.3g} times the work of the forces along the trajectory; "
            "energies and forces are in different units, or of opposite sign"
        )


def unit_of_total_energy(numbers: np.ndarray, energy: float) -> str | None:
    """The unit in which a number is about the energy of all electrons, if there is one.

    Args:
        numbers: Atomic numbers, (N,).
        energy: Total energy; one relative to others fits no unit.
    """
    estimate = -THOMAS_FERMI * np.sum(numbers ** (7 / 3)) * in_ev("hartree")
    low, high = ALL_ELECTRON_RANGE
    fitting = (unit for unit in ENERGY_UNITS if low < energy * in_ev(unit) / estimate < high)
    return next(fitting, None)


def work_slope(
    positions: np.ndarray, energies: np.ndarray, forces: np.ndarray
) -> tuple[float, float]:
    """How energies change per work of the forces, over the closest pairs of frames.

    The work along a straight line is taken from the mean of the forces at its ends, which is exact
    for a quadratic potential.

    Args:
        positions: (M, N, 3).
        energies: (M,).
        forces: (M, N, 3).

    Returns:
        Least-squares slope of dE over -F.dx, 1 if the units fit together, and the correlation of
        the two, 0 if there is nothing to tell.
    """
    flat = positions.reshape(len(positions), -1)
    distances = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    first = np.argsort(distances.min(axis=1))[:CLOSEST_PAIRS]
    second = distances.argmin(axis=1)[first]
    mean_force = (forces[first] + forces[second]) / 2
    work = -np.einsum("mij,mij->m", mean_force, positions[second] - positions[first])
    change = energies[second] - energies[first]
    if not (work.any() and change.any()):
        return 1.0, 0.0
    product = work @ change
    return product / (work @ work), product / np.sqrt((work @ work) * (change @ change))
