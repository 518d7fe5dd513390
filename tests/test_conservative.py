"""A conservative model from a direct one, the scales of both, and rotated training structures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from scipy.spatial.transform import Rotation

from escaip_fairchem import calculator
from escaip_fairchem.data.rotation import random_rotations, rotate, rotate_all
from escaip_fairchem.describe import load_safely
from escaip_fairchem.errors import UserError
from escaip_fairchem.train.finetune.model import build_model
from escaip_fairchem.train.scales import require_one_scale, require_scale_of_start
from helpers import SMALL
from run_helpers import save_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from ase import Atoms

CONSERVATIVE = {
    "backbone": {
        "model": "escaip_fairchem.EScAIPBackbone",
        "preset": "v2",
        **SMALL,
        "direct_forces": False,
        "smooth": True,
    },
    "heads": {"efs": {"module": "escaip_fairchem.ConservativeHead"}},
}


def copper() -> Atoms:
    atoms = bulk("Cu", cubic=True) * (2, 1, 1)
    atoms.rattle(0.1, seed=3)
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + np.diag([0.1, 0.05], 1)), scale_atoms=True)
    atoms.calc = EMT()
    return atoms


def test_energy_begins_as_that_of_the_direct_model(tmp_path: Path, caplog) -> None:
    path = tmp_path / "direct" / "inference_ckpt.pt"
    save_checkpoint(path, conservative=False, stress=True, dataset="cu", smooth=True)
    with caplog.at_level("INFO"):
        model = build_model(start=str(path), **CONSERVATIVE).eval()
    assert "stay behind" in caplog.text
    assert "output_heads.stress" in caplog.text
    atoms = copper()
    data = AtomicData.from_ase(atoms, task_name="cu", r_energy=False)
    data.dataset = "cu"
    found = model(atomicdata_list_to_batch([data]))
    atoms.calc = calculator(path, device="cpu")
    rmsd, mean = (model.start_tasks[0][key] for key in ("rmsd", "mean"))
    references = sum(model.start_tasks[0]["references"].get(z, 0.0) for z in atoms.numbers)
    energy = rmsd * float(found["energy"]["energy"]) + mean + references
    assert energy == pytest.approx(atoms.get_potential_energy(), rel=1e-6)
    weights = load_safely(path).ema_state_dict
    for name, value in model.state_dict().items():
        theirs = name.replace("output_heads.efs.", "output_heads.energy.")
        assert torch.equal(value, weights[f"module.module.{theirs}"]), name


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "direct" / "inference_ckpt.pt"
    save_checkpoint(path, conservative=False, stress=False, dataset="cu")
    deeper = {**CONSERVATIVE["backbone"], "num_layers": SMALL["num_layers"] + 1}
    with pytest.raises(UserError, match="do not fit"):
        build_model(start=str(path), **{**CONSERVATIVE, "backbone": deeper})
    shallower = {**CONSERVATIVE["backbone"], "num_layers": SMALL["num_layers"] - 1}
    with pytest.raises(UserError, match="do not fit"):
        build_model(start=str(path), **{**CONSERVATIVE, "backbone": shallower})
    with pytest.raises(UserError, match="add start=RUN"):
        build_model(start=None, **CONSERVATIVE)


def task(name: str, rmsd: float, mean: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, property=name, normalizer=SimpleNamespace(rmsd=rmsd, mean=mean)
    )


def test_scales(tmp_path: Path) -> None:
    path = tmp_path / "direct" / "inference_ckpt.pt"
    save_checkpoint(path, conservative=False, stress=False, dataset="cu")
    model = build_model(start=str(path), **CONSERVATIVE)
    require_one_scale(model, [task("energy", 1.7), task("forces", 1.7)])
    with pytest.raises(UserError, match=r"1.7 \(energy\), 1.1 \(forces\); give all of them"):
        require_one_scale(model, [task("energy", 1.7), task("forces", 1.1)])
    before = model.start_tasks[0]
    require_scale_of_start([task("energy", before["rmsd"], before["mean"])], model.start_tasks)
    with pytest.raises(UserError, match=rf"normalizer.rmsd={before['rmsd']}"):
        require_scale_of_start([task("energy", 2.0, before["mean"])], model.start_tasks)


def batch(structures: list[Atoms]) -> AtomicData:
    items = []
    for atoms in structures:
        item = AtomicData.from_ase(atoms, r_energy=False, task_name="cu")
        item.forces = torch.tensor(atoms.get_forces(), dtype=torch.float32)
        stress = atoms.get_stress(voigt=False) if atoms.pbc.all() else np.zeros((3, 3))
        item.stress = torch.tensor(stress.reshape(1, 9), dtype=torch.float32)
        items.append(item)
    return atomicdata_list_to_batch(items)


def test_rotated_labels_are_those_of_rotated_structures() -> None:
    free = molecule("H2O")
    free.calc = EMT()
    structures = [copper(), free]
    matrices = Rotation.random(2, random_state=0).as_matrix()
    turned = batch(structures)
    rotate(turned, torch.tensor(matrices))
    expected = []
    for atoms, matrix in zip(structures, matrices, strict=True):
        other = atoms.copy()
        other.set_cell(atoms.cell.array @ matrix.T)
        other.positions = atoms.positions @ matrix.T
        other.calc = EMT()
        expected.append(other)
    wanted = batch(expected)
    turned.cell[1] = wanted.cell[1]  # without a cell, fairchem's own
    for name in ("pos", "cell", "forces", "stress"):
        torch.testing.assert_close(turned[name], wanted[name], atol=2e-5, rtol=1e-5)
    assert (turned.forces - batch(structures).forces).abs().max() > 0.1


def test_rotations_are_uniform_and_belong_to_their_place() -> None:
    rotations = random_rotations(20_000, np.random.default_rng(0))
    identity = torch.eye(3, dtype=torch.float64).expand_as(rotations)
    torch.testing.assert_close(rotations @ rotations.mT, identity)
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(20_000).double())
    # means of R and of products of its entries under Haar's measure
    assert rotations.mean(0).abs().max() < 0.02
    second = torch.einsum("nab,ncd->abcd", rotations, rotations) / len(rotations)
    delta = torch.eye(3, dtype=torch.float64)
    haar = torch.einsum("ac,bd->abcd", delta, delta) / 3
    assert (second - haar).abs().max() < 0.02
    start = batch([copper(), copper()])

    def turned(*place: int) -> torch.Tensor:
        both = [start.clone(), start.clone()]
        rotate_all(both, *place)
        return torch.stack([each.pos for each in both])

    first = turned(0, 5, 0)
    assert torch.equal(first, turned(0, 5, 0))
    assert not torch.allclose(first[0], first[1])
    assert not torch.allclose(first, turned(0, 6, 0))
    assert not torch.allclose(first, turned(0, 5, 1))
