"""``escaip bench equivariance`` against potentials that are equivariant, and some that are not."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

import numpy as np
import pytest
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from escaip_fairchem.cli import main
from escaip_fairchem.tables.equivariance import Turned, rotated, rotations, rows_of, turn
from helpers import gas, predict, slab, small_model, triclinic
from run_helpers import save_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ase import Atoms


def by_emt(structures: Sequence[Atoms]) -> tuple[np.ndarray, list[np.ndarray]]:
    energies, forces = [], []
    for each in structures:
        atoms = each.copy()
        atoms.set_constraint()
        atoms.calc = EMT()
        energies.append(atoms.get_potential_energy())
        forces.append(atoms.get_forces())
    return np.array(energies), forces


def by_model(**backbone):
    def of(structures: Sequence[Atoms]) -> tuple[np.ndarray, list[np.ndarray]]:
        found = predict(small_model(**backbone), *structures)
        ends = np.cumsum([len(atoms) for atoms in structures])[:-1]
        return found["energy"], np.split(found["forces"], ends)

    return of


def everything(atoms: Atoms) -> np.ndarray:
    return np.ones(len(atoms), bool)


def test_rotations_are_uniform():
    """Moments of the trace under the Haar measure of SO(3): 0, 1, 1 and 3."""
    matrices = rotations(20_000, seed=3)
    np.testing.assert_allclose(np.linalg.det(matrices), 1, atol=1e-12)
    np.testing.assert_allclose(
        matrices @ matrices.transpose(0, 2, 1), np.tile(np.eye(3), (20_000, 1, 1)), atol=1e-12
    )
    trace = np.trace(matrices, axis1=1, axis2=2)
    for power, expected in ((1, 0), (2, 1), (3, 1), (4, 3)):
        spread = (trace**power).std() / np.sqrt(len(trace))
        assert abs((trace**power).mean() - expected) < 5 * spread
    np.testing.assert_array_equal(rotations(4, 7), rotations(4, 7))
    assert not np.allclose(rotations(4, 7), rotations(4, 8))
    about = rotations(5, 1, "y")
    np.testing.assert_allclose(about @ [0, 1, 0], np.tile([0, 1, 0], (5, 1)), atol=1e-12)


@pytest.mark.parametrize("atoms", [slab(pbc=(True, True, False)), triclinic(), gas()])
def test_a_rotated_structure_has_the_same_distances(atoms):
    """Across the boundaries of the cell too, and the copy alone is changed."""
    before = atoms.get_all_distances(mic=atoms.pbc.any())
    (matrix,) = rotations(1, 5)
    turned = rotated(atoms, matrix)
    assert not np.allclose(turned.positions, atoms.positions)
    np.testing.assert_allclose(turned.get_all_distances(mic=atoms.pbc.any()), before, atol=1e-10)
    np.testing.assert_array_equal(turned.pbc, atoms.pbc)
    np.testing.assert_allclose(turned.get_volume() if atoms.cell.rank == 3 else 0,
                               atoms.get_volume() if atoms.cell.rank == 3 else 0)  # fmt: skip


def test_an_analytic_potential_passes_exactly():
    atoms = slab()
    found = turn(by_emt, atoms, rotations(8, 0), everything(atoms))
    assert np.nanmin(found.cosine) > 1 - 1e-12
    assert found.change.max() < 1e-9
    assert found.energy_change.max() < 1e-10


@pytest.mark.parametrize("atoms", [slab(pbc=(True, True, False)), triclinic(), gas()])
def test_scalar_weights_pass_exactly_and_vector_weights_do_not(atoms):
    """In float64; published weights of edges differ by axis."""
    matrices = rotations(8, 1)
    scalar = turn(by_model(force_weights="scalar"), atoms, matrices, everything(atoms))
    vector = turn(by_model(force_weights="vector"), atoms, matrices, everything(atoms))
    assert np.nanmin(scalar.cosine) > 1 - 1e-9
    assert scalar.change.max() < 1e-7 * scalar.size.max()
    assert np.nanmean(vector.cosine) < 0.99
    for found in (scalar, vector):  # the energy is invariant in both
        assert found.energy_change.max() < 1e-8


def test_numbers_by_hand():
    """Forces that stay as they are while the structure is turned by a quarter about z."""
    atoms = slab()[:3]
    fixed = np.array([[1.0, 0, 0], [0, 0, 2.0], [0, 0, 0]])
    atoms.calc = SinglePointCalculator(atoms, forces=fixed + 0.3)

    def constant(structures):
        return np.arange(len(structures), dtype=float), [fixed] * len(structures)

    quarter = np.array([[[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]])
    found = turn(constant, atoms, quarter, np.ones(3, bool))
    np.testing.assert_allclose(found.cosine, [[0, 1, np.nan]])
    np.testing.assert_allclose(found.change, [[2 / 3, 0, 0]])
    np.testing.assert_allclose(found.energy_change, [1 / 3])
    row, *by_element = rows_of("m", [found], ["a"])
    assert (row["atoms"], row["atoms_without_direction"]) == (3, 1)
    assert row["cosine"] == pytest.approx(0.5)
    assert row["force_change_mae"] == pytest.approx(2 / 9)
    assert row["force_change_relative"] == pytest.approx(2 / 3)
    assert row["force_mae"] == pytest.approx(0.3)
    assert [each["name"] for each in by_element] == ["Cu", "a"]
    only = turn(constant, atoms, quarter, np.array([False, True, False]))
    assert isinstance(only, Turned)
    np.testing.assert_allclose(only.cosine, [[1]])


def test_command(tmp_path: Path, capsys, monkeypatch):
    """Two models side by side, on the free atoms of a file."""
    monkeypatch.chdir(tmp_path)
    frames = [slab(), slab(pbc=(True, True, False))]
    frames[1].rattle(0.1, seed=4)
    write("frames.extxyz", frames)
    for kind in ("scalar", "vector"):
        path = tmp_path / kind / "checkpoints" / "final" / "inference_ckpt.pt"
        save_checkpoint(path, conservative=False, stress=False, dataset="oc20", force_weights=kind)
    command = ["bench", "equivariance", "scalar", "vector", "--data", "frames.extxyz"]
    assert main([*command, "--rotations", "3", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "cosine of forces is above 0.99" in printed
    with open("equivariance.csv", newline="") as file:
        rows = {(r["model"], r["group"], r["name"]): r for r in csv.DictReader(file)}
    assert {group for _, group, _ in rows} == {"all", "element", "structure"}
    assert rows["scalar", "all", ""]["atoms"] == str(sum(map(len, frames)))
    assert float(rows["scalar", "all", ""]["cosine_min"]) > 0.9999
    assert float(rows["vector", "all", ""]["cosine"]) < 0.999
    assert (tmp_path / "equivariance.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--rotations", "0"]) == 2
    assert "--rotations is 0" in capsys.readouterr().err
    assert main([*command, "--out", "a.txt"]) == 2
    assert "ends in .csv" in capsys.readouterr().err
