"""fairchem's own calculation runners with a model of this package."""

from __future__ import annotations

import gzip
import json

import numpy as np
import phonopy
import pytest
import torch
from ase.build import bulk
from fairchem.core.components.calculate import (
    ElasticityRunner,
    MDRPhononRunner,
    NVEMDRunner,
    RelaxationRunner,
)
from omegaconf import OmegaConf
from phonopy.structure.atoms import PhonopyAtoms

from escaip_fairchem import calculator
from simulate_helpers import save_small


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Conservative, in double precision."""
    path = save_small(tmp_path_factory.mktemp("model") / "c.pt", conservative=True)
    return calculator(path, device="cpu", dtype=torch.float64)


def copper():
    atoms = bulk("Cu")
    atoms.info["sid"] = "cu"
    return atoms


def carry_out(runner, folder) -> None:
    runner.job_config = OmegaConf.create(
        {
            "metadata": {
                "results_dir": str(folder),
                "array_job_num": 0,
                "preemption_checkpoint_dir": str(folder / "preempted"),
            },
            "scheduler": {"num_array_jobs": 1},
        }
    )
    runner.run()


def result(folder, pattern) -> dict:
    (path,) = folder.glob(pattern)
    columns = json.loads(gzip.decompress(path.read_bytes()))
    found = {name: column["0"] for name, column in columns.items()}
    assert found["errors"] == "", found["traceback"]
    return found


def test_relaxation(tmp_path, model):
    """Nothing to do: forces vanish by symmetry."""
    carry_out(RelaxationRunner(model, [copper()], steps=3, fmax=0.05), tmp_path)
    found = result(tmp_path, "relaxation_1-0.json.gz")
    atoms = copper()
    atoms.calc = model
    assert found["energy"] == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
    assert (found["opt_nsteps"], found["opt_converged"]) == (0, True)


def test_nve(tmp_path, model):
    start = [(bulk("Cu", cubic=True), 300.0)]
    carry_out(NVEMDRunner(model, start, time_step=0.5, steps=5, save_frequency=1), tmp_path)
    _, total, _, kinetic, _ = np.loadtxt(tmp_path / "thermo_1-0.log", skiprows=1).T
    assert len(total) == 6
    assert np.ptp(total) < 2e-4  # eV an atom, of four decimals
    assert kinetic.min() > 0.01


@pytest.mark.full
def test_phonons(tmp_path, model):
    cell = PhonopyAtoms(symbols=["Cu"], cell=copper().cell.array, scaled_positions=[[0, 0, 0]])
    phonopy.Phonopy(cell, supercell_matrix=2 * np.eye(3), primitive_matrix=np.eye(3)).save(
        tmp_path / "cu.yaml"
    )
    carry_out(MDRPhononRunner(model, [tmp_path / "cu.yaml"]), tmp_path)
    found = result(tmp_path, "mdr_phonon*.json.gz")
    relaxed = bulk("Cu", a=(4 * found["volume_per_atom"]) ** (1 / 3))
    relaxed.calc = model
    assert found["energy_per_atom"] == pytest.approx(relaxed.get_potential_energy(), abs=1e-4)


@pytest.mark.full
def test_elastic_constants(tmp_path, model):
    """Those of a cubic crystal, whatever the weights."""
    carry_out(ElasticityRunner(model, [copper()]), tmp_path)
    found = result(tmp_path, "elasticity_1-0.json.gz")
    c = np.array(found["elastic_tensor"])
    cubic = np.zeros((6, 6))
    cubic[:3, :3] = c[0, 1]
    cubic[range(3), range(3)] = c[0, 0]
    cubic[range(3, 6), range(3, 6)] = c[3, 3]
    np.testing.assert_allclose(c, cubic, atol=1e-3 * abs(c).max())
    assert found["bulk_modulus_vrh"] == pytest.approx((c[0, 0] + 2 * c[0, 1]) / 3, rel=1e-6)
    assert abs(c[0, 0]) > 1.0  # GPa
