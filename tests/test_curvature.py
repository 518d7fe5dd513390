"""Hessians and other untrained derivatives by fairchem's mechanism, and energies of many atoms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from fairchem.core import FAIRChemCalculator
from fairchem.core.units.mlip_unit import load_predict_unit
from fairchem.core.units.mlip_unit.api.inference import InferenceSettings

from escaip_fairchem import EScAIP, UserError, calculator, hessian_vector_product
from helpers import SMALL, make_batch, predict, relative_error, small_model, triclinic
from test_inference import RMSD, save_checkpoint, task_config

MEAN = 0.3
REFERENCE = -1e4


def write_checkpoint(path, *, properties=("energy", "forces"), direct=False, **backbone):
    """A checkpoint of a random model; energies have a mean, and references of -1e4 eV."""
    torch.manual_seed(0)
    small = SMALL | {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    small |= {"direct_forces": direct, "smooth": True, **backbone}
    heads = {"efs": {"module": "escaip_fairchem.ConservativeHead"}}
    if direct:
        modules = {"energy": "EnergyHead", "forces": "DirectForceHead"}
        heads = {k: {"module": f"escaip_fairchem.{v}"} for k, v in modules.items()}
    backbone = {"model": "escaip_fairchem.EScAIPBackbone", **small}
    model = EScAIP(backbone=backbone, heads=heads)
    config = {"_target_": "escaip_fairchem.EScAIP", "backbone": backbone, "heads": heads}
    save_checkpoint(path, model, config)
    stored = torch.load(path, weights_only=False)
    stored.tasks_config = [task_config(name, name) for name in properties]
    energy = stored.tasks_config[0]
    energy["normalizer"]["mean"] = MEAN
    energy["element_references"]["element_references"]["_args_"] = [[REFERENCE] * 120]
    torch.save(stored, path)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("conservative") / "model.pt"
    write_checkpoint(path)
    return path


def water() -> Atoms:
    atoms = molecule("H2O")
    atoms.rattle(0.05, seed=1)
    return atoms


def test_hessian_on_request_is_the_derivative_of_the_forces(checkpoint):
    atoms = water()
    atoms.calc = calculator(checkpoint, device="cpu", dtype=torch.float64, hessian=True)
    hessian = atoms.calc.get_property("hessian", atoms)
    plain = calculator(checkpoint, device="cpu", dtype=torch.float64)
    step, columns = 1e-5, []
    for index in range(9):
        forces = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions.flat[index] += sign * step
            moved.calc = plain
            forces.append(moved.get_forces().ravel())
        columns.append((forces[1] - forces[0]) / (2 * step))
    assert relative_error(hessian, np.stack(columns, axis=1)) < 1e-7
    assert np.abs(hessian - hessian.T).max() < 1e-12 * np.abs(hessian).max()
    # H (r x axis) of a rotation is not 0 away from equilibrium, but a translation's is
    assert np.abs(hessian @ np.tile(np.eye(3), (3, 1))).max() < 1e-10 * np.abs(hessian).max()


@pytest.mark.parametrize("preset", ["paper", "v2"])
def test_hessian_vector_products_are_differences_of_forces(preset):
    """Of several structures at once, one of them an atom alone."""
    model = small_model(conservative=True, preset=preset, smooth=preset == "v2")
    structures = [water(), triclinic(), Atoms("Cu")]
    vectors = np.random.default_rng(0).normal(size=(9, 3))
    forces, ends = [], np.cumsum([len(atoms) for atoms in structures])[:-1]
    for sign in (1, -1):
        moved = [atoms.copy() for atoms in structures]
        for atoms, vector in zip(moved, np.split(vectors, ends), strict=True):
            atoms.positions += sign * 1e-5 * vector
        forces.append(predict(model, *moved)["forces"])
    expected = (forces[1] - forces[0]) / 2e-5
    got = hessian_vector_product(model, make_batch(*structures), torch.tensor(vectors)).numpy()
    assert relative_error(got, expected) < 1e-6
    assert (got[-1] == 0).all()
    alone = hessian_vector_product(model, make_batch(Atoms("Cu")), torch.ones(1, 3))
    assert (alone == 0).all()


def test_untrained_stress_and_forces_leave_the_mean_of_energies_out(tmp_path):
    """fairchem scales derivatives like the energy, its mean included."""
    model = write_checkpoint(tmp_path / "energy.pt", properties=["energy"]).double().eval()
    wanted = {f"predict_untrained_{name}": {"oc20"} for name in ("forces", "stress")}
    settings = InferenceSettings(compile=False, base_precision_dtype=torch.float64, **wanted)
    unit = load_predict_unit(tmp_path / "energy.pt", device="cpu", inference_settings=settings)
    atoms = triclinic()
    atoms.calc = FAIRChemCalculator(unit, task_name="oc20")
    model.backbone.regress_config.stress = True
    expected = predict(model, atoms)
    assert relative_error(atoms.get_forces(), RMSD * expected["forces"]) < 1e-9
    assert relative_error(atoms.get_stress(voigt=False), RMSD * expected["stress"][0]) < 1e-9
    energy = RMSD * expected["energy"][0] + MEAN + REFERENCE * len(atoms)
    assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-9)


def test_what_has_no_hessian_says_so(tmp_path, checkpoint):
    write_checkpoint(tmp_path / "direct.pt", direct=True)
    with pytest.raises(UserError, match="conservative"):
        calculator(tmp_path / "direct.pt", device="cpu", hessian=True)
    with pytest.raises(UserError, match="ConservativeHead"):
        hessian_vector_product(small_model(), make_batch(water()), torch.zeros(3, 3))
    with pytest.raises(UserError, match="one structure"):
        calculator(checkpoint, device="cpu", hessian=True).calculate_many([water(), water()])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)], ids=str
)
def test_small_differences_of_large_energies_survive(tmp_path, dtype, tolerance):
    """10,000 atoms at -1e4 eV each: 5,000 dimers out of each other's reach, one stretched."""
    path = tmp_path / "model.pt"
    write_checkpoint(path, cutoff=4.0, max_neighbors=4, neighbor_search="vesin")
    calc = calculator(path, device="cpu", dtype=dtype)
    exact = calculator(path, device="cpu", dtype=torch.float64)
    places = np.indices((50, 10, 10)).reshape(3, -1).T * 8.0
    many = Atoms("CO" * 5000, np.repeat(places, 2, axis=0))
    many.positions[1::2, 2] += 1.3
    energies, alone = [], []
    for stretch in (0.0, 1e-3):
        many.positions[1, 2] = 1.3 + stretch
        dimer = many[:2]
        many.calc, dimer.calc = calc, exact
        energies.append(many.get_potential_energy())
        alone.append(dimer.get_potential_energy())
    assert energies[0] == pytest.approx(1e4 * REFERENCE, rel=1e-3)
    difference = alone[1] - alone[0]
    assert abs(difference) > 10 * tolerance
    assert energies[1] - energies[0] == pytest.approx(difference, abs=tolerance)
