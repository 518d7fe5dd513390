"""Checks of one structure: what cannot be learned from, or was meant in other units.

The unit rules are deliberately wide. Over 6,000 DFT frames of OC20, OC22, MPtrj (its highest
stresses included), Alexandria, SPICE, OMol25 and rMD17, the median nearest-neighbour distance of
a structure is at least 0.95 A, its tightest contact at most 1.26 times the sum of the covalent
radii, and the force rms at most 68 eV/A, so none of them comes near a limit.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from escaip_fairchem.errors import UserError

MAX_NUM_ELEMENTS = 119  # atomic numbers below this: every element up to oganesson
MIN_CELL_VOLUME = 1e-3  # A^3, far below an atom, also when the lengths were meant in nm
OVERLAP = 0.1  # A, closer than any two nuclei in a physical structure
NEIGHBOR_SHELL = 6.0  # A, how far a nearest neighbour is looked for
FIRST_SHELL = 3.2  # A, where most atoms have one; a small cell has far fewer images so near
NM_MEDIAN = 0.4  # A, no bond is this short; bonds in nm are 0.07 to 0.35
BOHR_RATIO = (1.4, 2.6)  # x covalent bond length; a bond in Bohr reads 1.89 times too long
MAX_FORCE_RMS = 100.0  # eV/A, of the components in one structure
MAX_MEDIAN_FORCE_RMS = 10.0  # eV/A, median over a data set
MIN_STRESS_FRAMES = 20  # fewer may all be extreme
MAX_MEDIAN_STRESS_RMS = 1.0  # eV/A^3, 160 GPa, median over a data set
NOBLE_GASES = (2, 10, 18, 36, 54, 86)

SKIP_HINT = "if the units are right, skip this check (escaip convert --skip-unit-checks)"


def check_structure(
    numbers: np.ndarray,
    positions: np.ndarray,
    cell: np.ndarray,
    pbc: np.ndarray,
    *,
    energy: float | None = None,
    forces: np.ndarray | None = None,
    max_num_elements: int = MAX_NUM_ELEMENTS,
    check_units: bool = True,
) -> None:
    """Raise if a structure or its labels cannot be meant.

    Args:
        numbers: Atomic numbers, (N,).
        positions: Positions in A, (N, 3); they need not be wrapped.
        cell: Cell vectors as rows in A, (3, 3); ignored when no axis is periodic.
        pbc: Periodicity of each cell vector, (3,).
        energy: Energy in eV.
        forces: Forces in eV/A, (N, 3).
        max_num_elements: Size of the element table; atomic numbers must be below it.
        check_units: Also judge the units of positions and forces by their size.

    Raises:
        UserError: Naming the first defect found, in one line.
    """
    numbers, positions = np.asarray(numbers), np.asarray(positions, dtype=float)
    cell, pbc = np.asarray(cell, dtype=float), np.broadcast_to(pbc, 3)
    if len(numbers) == 0:
        raise UserError("the structure has no atoms; remove it")
    _check_elements(numbers, max_num_elements)
    _check_geometry(positions, cell, pbc)
    _check_distances(numbers, positions, cell, pbc, check_units)
    check_labels(len(numbers), energy=energy, forces=forces, check_units=check_units)


def check_labels(
    n_atoms: int,
    *,
    energy: float | None = None,
    forces: np.ndarray | None = None,
    stress: np.ndarray | None = None,
    check_units: bool = True,
) -> None:
    """Raise if labels are not finite, not of the structure's size, or in another unit.

    Args:
        n_atoms: Number of atoms, N.
        energy: Energy in eV.
        forces: Forces in eV/A, (N, 3).
        stress: Stress in eV/A^3, (6,).
        check_units: Also judge the unit of the forces by their size.

    Raises:
        UserError: Naming the first defect found, in one line.
    """
    if energy is not None and not np.isfinite(energy):
        raise UserError(f"the energy is {energy}; remove the structure")
    if stress is not None and not np.isfinite(stress).all():
        raise UserError("the stress is NaN or infinite; remove it, or the structure")
    if forces is None:
        return
    forces = np.asarray(forces)
    if forces.shape != (n_atoms, 3):
        raise UserError(f"forces have shape {forces.shape}; they must be ({n_atoms}, 3)")
    if not np.isfinite(forces).all():
        atom = int(np.flatnonzero(~np.isfinite(forces).all(axis=1))[0])
        raise UserError(f"the force on atom {atom} is NaN or infinite; remove the structure")
    rms = component_rms(forces)
    if check_units and rms > MAX_FORCE_RMS:
        raise UserError(
            f"the force rms is {rms:.4g} eV/A (> {MAX_FORCE_RMS:g}): convert the forces to "
            f"eV/A (from kcal/mol/A times 0.0433641), or remove the structure; {SKIP_HINT}"
        )


def check_scales(force_rms: np.ndarray, stress_rms: np.ndarray) -> None:
    """Judge the units of forces and stresses by the typical size of many structures.

    Args:
        force_rms: Force rms of every structure, eV/A, NaN where there are no forces.
        stress_rms: The same of stresses, eV/A^3.

    Raises:
        UserError: As for `check_force_scale` and `check_stress_scale`.
    """
    for values, check in ((force_rms, check_force_scale), (stress_rms, check_stress_scale)):
        finite = values[np.isfinite(values)]
        if len(finite):
            check(finite)


def check_force_scale(frame_rms: list[float]) -> None:
    """Raise if the typical force of a whole set suggests a smaller energy unit than eV.

    A single structure may have huge forces; half of a set does not.

    Args:
        frame_rms: Force rms of every structure, eV/A.

    Raises:
        UserError: If the median is above ``MAX_MEDIAN_FORCE_RMS``.
    """
    median = float(np.median(frame_rms))
    if median > MAX_MEDIAN_FORCE_RMS:
        raise UserError(
            f"the median force rms of the set is {median:.4g} eV/A (> {MAX_MEDIAN_FORCE_RMS:g}), "
            f"which looks like kcal/mol/A: multiply the forces by 0.0433641; {SKIP_HINT}"
        )


def check_stress_scale(frame_rms: list[float]) -> None:
    """Raise if the typical stress of a whole set suggests another unit than eV/A^3.

    Args:
        frame_rms: Stress rms of every structure that has stress, eV/A^3.

    Raises:
        UserError: If the median of at least ``MIN_STRESS_FRAMES`` structures is above
            ``MAX_MEDIAN_STRESS_RMS``.
    """
    if len(frame_rms) < MIN_STRESS_FRAMES:
        return
    median = float(np.median(frame_rms))
    if median > MAX_MEDIAN_STRESS_RMS:
        raise UserError(
            f"the median stress rms of the set is {median:.4g} eV/A^3 "
            f"(> {MAX_MEDIAN_STRESS_RMS:g}), which looks like kbar or GPa: multiply it by "
            "-0.000624151 (kbar as VASP writes it) or by 0.00624151 (GPa), so that tension is "
            f"positive; {SKIP_HINT}"
        )


def component_rms(values: np.ndarray) -> float:
    """Root mean square over the components of forces or a stress, in their unit."""
    return float(np.sqrt(np.mean(np.square(values))))


def nearest_neighbors(
    positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, shell: float = NEIGHBOR_SHELL
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest neighbour of each atom, periodic images (its own too) included.

    Time and memory grow linearly with the atoms: only images within ``shell`` of the cell exist.

    Args:
        positions: (N, 3), A.
        cell: Cell vectors as rows, (3, 3), A.
        pbc: (3,).
        shell: How far to look, A.

    Returns:
        Distances (N,), infinite where nothing is within the shell, and neighbour indices (N,),
        which then are N.
    """
    for reach in (min(FIRST_SHELL, shell), shell):
        points, owner = with_images(positions, cell, pbc, reach)
        distance, index = cKDTree(points).query(points[: len(positions)], k=2)
        # The nearest point is the atom itself, or an atom on top of it: either way the distance of
        # the second entry is right, and only the index of coincident atoms may be the atom's own.
        found = distance[:, 1] <= reach
        if found.all():
            break
    owner = np.append(owner, len(positions))
    neighbor = owner[np.where(found, index[:, 1], len(points))]
    return np.where(found, distance[:, 1], np.inf), neighbor


def with_images(
    positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, shell: float
) -> tuple[np.ndarray, np.ndarray]:
    """Wrap atoms into the cell and add the images within ``shell`` of its faces.

    Returns:
        Points (M, 3), the wrapped atoms first, and the atom that each is an image of (M,).
    """
    owner = np.arange(len(positions))
    if not pbc.any():
        return positions, owner
    fractional = np.linalg.solve(cell.T, positions.T).T
    fractional[:, pbc] %= 1.0
    # Distance between opposite faces: 1 / |row of the reciprocal cell|.
    heights = 1.0 / np.linalg.norm(np.linalg.inv(cell), axis=0)
    for axis in np.flatnonzero(pbc):
        margin = shell / heights[axis]
        reach = int(np.ceil(margin))
        parts = [(fractional, owner)]
        for shift in [s for s in range(-reach, reach + 1) if s != 0]:
            moved = fractional[:, axis] + shift
            near = (moved >= -margin) & (moved <= 1.0 + margin)
            image = fractional[near].copy()
            image[:, axis] += shift
            parts.append((image, owner[near]))
        fractional = np.concatenate([points for points, _ in parts])
        owner = np.concatenate([index for _, index in parts])
    return fractional @ cell, owner


def _check_elements(numbers: np.ndarray, max_num_elements: int) -> None:
    """Raise unless every atomic number is at least 1 and below ``max_num_elements``."""
    wrong = numbers[(numbers < 1) | (numbers >= max_num_elements)]
    if len(wrong):
        raise UserError(
            f"atomic number {wrong[0]} is out of range: elements 1 to {max_num_elements - 1} are "
            "known; correct the species (or raise max_num_elements of the model)"
        )


def _check_geometry(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> None:
    """Raise on positions that are not finite, or a periodic structure without a cell."""
    if not np.isfinite(positions).all():
        atom = int(np.flatnonzero(~np.isfinite(positions).all(axis=1))[0])
        raise UserError(f"the position of atom {atom} is NaN or infinite; remove the structure")
    if not pbc.any():
        return
    if not np.isfinite(cell).all():
        raise UserError("a cell vector is NaN or infinite; correct the cell")
    volume = abs(np.linalg.det(cell))
    if volume < MIN_CELL_VOLUME:
        raise UserError(
            f"pbc is {_flags(pbc)} but the cell volume is {volume:.3g} A^3: set the three cell "
            "vectors, or pbc to False"
        )


def _check_distances(
    numbers: np.ndarray, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, units: bool
) -> None:
    """Raise on overlapping atoms, or on distances of another unit."""
    distance, neighbor = nearest_neighbors(positions, cell, pbc)
    median = float(np.median(distance))
    if units and OVERLAP / 2 < median < NM_MEDIAN:
        raise UserError(
            f"the median nearest-neighbour distance is {median:.3g} A (< {NM_MEDIAN:g}): positions "
            f"look like nm; multiply positions and cell by 10; {SKIP_HINT}"
        )
    first = int(np.argmin(distance))
    if distance[first] < OVERLAP:
        raise UserError(
            f"atom {first} and another atom or periodic image are {distance[first]:.3g} A apart "
            f"(< {OVERLAP:g}): remove the duplicate, or correct positions and cell"
        )
    if units:
        _check_bohr(numbers, distance, neighbor, bool(pbc.any()))


def _check_bohr(
    numbers: np.ndarray, distance: np.ndarray, neighbor: np.ndarray, periodic: bool
) -> None:
    """Raise if nothing in the structure is bonded, and all would be if distances were in Bohr.

    A pair of atoms may be pulled apart, and noble gases do not bond, so these are not judged.
    """
    from ase.data import chemical_symbols, covalent_radii

    n_atoms = len(numbers)
    if (n_atoms < 3 and not periodic) or np.isin(numbers, NOBLE_GASES).any():
        return
    bonded = neighbor < n_atoms
    if not bonded.any():
        return
    pairs = np.stack([numbers[bonded], numbers[neighbor[bonded]]])
    ratio = distance[bonded] / covalent_radii[pairs].sum(axis=0)
    tightest = int(np.argmin(ratio))
    low, high = BOHR_RATIO
    if low < ratio[tightest] < high:
        symbols = "-".join(chemical_symbols[z] for z in pairs[:, tightest])
        raise UserError(
            f"the tightest contact ({symbols}, {distance[bonded][tightest]:.3g} A) is "
            f"{ratio[tightest]:.2f} times its covalent bond length (> {low:g}): positions look "
            f"like Bohr; multiply positions and cell by 0.529177; {SKIP_HINT}"
        )


def _flags(pbc: np.ndarray) -> str:
    """Write periodicity as T and F, such as TTF."""
    return "".join("FT"[int(flag)] for flag in pbc)
