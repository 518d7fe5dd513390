"""Bad structures, each with the one line that the user gets."""

from __future__ import annotations

import time

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.neighborlist import neighbor_list

from escaip_fairchem.data.checks import check_structure, nearest_neighbors
from escaip_fairchem.data.frames import read_frames
from escaip_fairchem.errors import UserError


def check(atoms: Atoms, **labels) -> None:
    check_structure(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, **labels)


def scaled(atoms: Atoms, factor: float) -> Atoms:
    """The structure as it reads when lengths are in another unit."""
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell * factor)
    atoms.positions *= factor
    return atoms


def moved(atoms: Atoms, position) -> Atoms:
    """The structure with its last atom elsewhere."""
    atoms = atoms.copy()
    atoms.positions[-1] = position
    return atoms


WATER = molecule("H2O")
COPPER = bulk("Cu", cubic=True)
FORCES = np.ones((3, 3))
BAD_STRUCTURES = {
    "empty": (Atoms(), {}, "no atoms; remove it"),
    "nan position": (moved(WATER, [np.nan, 0, 0]), {}, "position of atom 2 is NaN or infinite"),
    "inf position": (moved(COPPER, [0, np.inf, 0]), {}, "position of atom 3 is NaN or infinite"),
    "overlap": (moved(WATER, WATER.positions[0] + 0.02), {}, "0.0346 A apart .*remove the dupl"),
    "coincident": (moved(COPPER, COPPER.positions[0]), {}, " 0 A apart"),
    "overlap over the face": (
        moved(COPPER, COPPER.positions[0] - COPPER.cell[1] + 0.03),
        {},
        "atom 0 and another atom or periodic image are 0.052 A",
    ),
    "dummy element": (Atoms("XH"), {}, "atomic number 0 is out of range: elements 1 to 118"),
    "element beyond the table": (
        Atoms("Au"),
        {"max_num_elements": 79},
        "atomic number 79 is out of range: elements 1 to 78",
    ),
    "no cell": (Atoms("Cu", pbc=True), {}, "pbc is TTT but the cell volume is 0 A"),
    "flat cell": (
        Atoms("Cu", cell=[3, 3, 0], pbc=[True, True, False]),
        {},
        "pbc is TTF but the cell volume is 0 A",
    ),
    "nan cell": (
        Atoms("Cu", cell=[3, 3, np.nan], pbc=True),
        {},
        "a cell vector is NaN or infinite",
    ),
    "nan energy": (WATER, {"energy": np.nan}, "the energy is nan; remove"),
    "inf force": (WATER, {"forces": FORCES * [1, 1, np.inf]}, "force on atom 0 is NaN or inf"),
    "force shape": (WATER, {"forces": FORCES[:2]}, r"shape \(2, 3\); they must be \(3, 3\)"),
    "forces too large": (WATER, {"forces": FORCES * 150}, r"force rms is 150 eV/A .*0.0433641"),
    "molecule in nm": (scaled(WATER, 0.1), {}, "0.0969 A .*look like nm; multiply .* by 10"),
    "crystal in nm": (scaled(COPPER, 0.1), {}, "0.255 A .*look like nm"),
    "molecule in Bohr": (scaled(WATER, 1.8897), {}, r"\(O-H, 1.83 A\) is 1.89 times .*0.529177"),
    "crystal in Bohr": (scaled(COPPER, 1.8897), {}, r"\(Cu-Cu, 4.82 A\) is 1.83 times"),
}


@pytest.mark.parametrize("name", BAD_STRUCTURES)
def test_bad_structure_is_one_line_that_says_what_to_change(name):
    atoms, labels, message = BAD_STRUCTURES[name]
    with pytest.raises(UserError, match=message) as caught:
        check(atoms, **labels)
    assert "\n" not in str(caught.value)


def test_unusual_but_sound_structures_pass():
    check(Atoms("He"))
    check(Atoms("Ar4", positions=np.eye(4, 3) * 3.8))
    check(Atoms("H2", positions=[[0, 0, 0], [0, 0, 1.5]]))  # being pulled apart
    check(Atoms("O", cell=[10, 10, 10], pbc=True))  # an atom in a box
    check(Atoms("Cu", cell=[2.5, 2.5, 2.5], pbc=True), energy=-3.0, forces=np.zeros((1, 3)))
    check(scaled(WATER, 1.8897), check_units=False)
    far = WATER.copy()
    far.positions += 1e4
    check(far)


@pytest.mark.parametrize("name", ["mptrj_highstress", "mattersim_tp", "alexandria", "omol25"])
def test_no_false_alarm_on_extreme_dft_frames(name, test_data):
    n_frames = 0
    for frame in read_frames([test_data / f"{name}_sample.extxyz.gz"]):
        results = frame.atoms.calc.results
        check(frame.atoms, energy=results["energy"], forces=results["forces"])
        n_frames += 1
    assert n_frames >= 19


def test_check_grows_linearly():
    def seconds(repeat):
        atoms = bulk("Cu", cubic=True).repeat(repeat)
        atoms.rattle(0.05)
        start = time.perf_counter()
        check(atoms)
        return time.perf_counter() - start

    seconds(3)
    small, large = min(seconds(8) for _ in range(3)), seconds(17)  # 2,048 and 19,652 atoms
    assert large < 40 * small  # a quadratic method takes 92 times as long


@pytest.mark.parametrize("pbc", [(1, 1, 1), (1, 0, 1), (0, 0, 0)])
def test_nearest_neighbors_equal_ase(pbc):
    rng = np.random.default_rng(2)
    cell = np.array([[3.0, 0, 0], [2.5, 2.0, 0], [-1.0, 1.5, 4.0]])  # skewed, flat, shell over it
    atoms = Atoms("C5", rng.normal(scale=6, size=(5, 3)), cell=cell, pbc=pbc)
    index, distance = neighbor_list("id", atoms, 6.0)
    expected = np.full(5, np.inf)
    np.minimum.at(expected, index, distance)
    found, neighbor = nearest_neighbors(atoms.positions, cell, atoms.pbc)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert ((neighbor == 5) == np.isinf(expected)).all()
