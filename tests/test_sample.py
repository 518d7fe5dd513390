"""The embedded sample, and how fairchem loads a data set."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.calculators.emt import EMT
from fairchem.core.components.common.dataloader_builder import get_dataloader
from fairchem.core.datasets.samplers.max_atom_distributed_sampler import (
    MaxAtomDistributedBatchSampler,
)
from fairchem.core.modules.loss import DDPMTLoss, MAELoss
from fairchem.core.modules.normalization.normalizer import Normalizer
from fairchem.core.units.mlip_unit.mlip_unit import OutputSpec, Task, mt_collater_adapter

from data_helpers import stored
from escaip_fairchem import configs
from escaip_fairchem.data import sample
from escaip_fairchem.data.datasets import create_dataset
from escaip_fairchem.errors import UserError


@pytest.fixture(scope="module")
def sample_folder(tmp_path_factory):
    """The default sample, as `escaip sample-data oc20` writes it."""
    folder = tmp_path_factory.mktemp("data") / "oc20" / "sample"
    sample.make_oc20_sample(folder)
    return folder


def test_packaged_references_are_those_of_the_default_sample(sample_folder):
    packaged = Path(configs.__file__).parent / "oc20/dataset/sample.yaml"
    content = yaml.safe_load(packaged.read_text())
    assert content["dataset"]["train"] == "oc20/sample/train"
    train = stored(sample_folder / "train")
    counts = np.array([np.bincount(atoms.numbers, minlength=120) for atoms in train], dtype=float)
    energy = [atoms.get_potential_energy() for atoms in train]
    expected, _, _, _ = np.linalg.lstsq(counts, energy)
    np.testing.assert_allclose(content["element_refs"]["energy"], expected, atol=1e-6)
    free = np.concatenate([atoms.calc.results["forces"][atoms.get_tags() > 0] for atoms in train])
    assert content["normalizer"]["rmsd"] == pytest.approx(np.sqrt((free**2).mean()), abs=1e-6)


def test_sample_has_the_shape_of_oc20(sample_folder):
    train, val = stored(sample_folder / "train"), stored(sample_folder / "val")
    assert (len(train), len(val)) == (200, 40)
    assert {a.info["sid"] for a in train} == {a.info["sid"] for a in val}
    ids = [(a.info["sid"], a.info["fid"]) for a in train + val]
    assert len(set(ids)) == 240
    for atoms in train + val:
        tags = atoms.get_tags()
        assert 20 <= len(atoms) <= 40
        assert set(tags) == {0, 1, 2}
        assert atoms.pbc.all()
        np.testing.assert_array_equal(
            np.flatnonzero(tags == 0), np.sort(atoms.constraints[0].index)
        )
        assert set(atoms.symbols[tags == 2]) <= set("HCNO")
        assert set(atoms.symbols[tags < 2]) <= set(sample.METALS)
        norms = np.linalg.norm(atoms.calc.results["forces"], axis=1)
        assert norms.max() < 50
        assert norms[tags > 0].max() > 0.1


def test_sample_labels_are_emt_of_the_stored_structure(sample_folder):
    for atoms in stored(sample_folder / "val")[::8]:
        fresh = Atoms(
            atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, calculator=EMT()
        )
        assert atoms.get_potential_energy() == pytest.approx(fresh.get_potential_energy(), abs=1e-8)
        np.testing.assert_allclose(atoms.calc.results["forces"], fresh.get_forces(), atol=1e-8)


def test_sample_is_deterministic_by_seed():
    def content(seed):
        return [
            (a.positions.tobytes(), a.calc.results["forces"].tobytes(), a.get_potential_energy())
            for a in sample.sample_frames(14, seed)
        ]

    first = content(0)
    assert first == content(0)
    assert first != content(1)


def task(name, level, dim):
    """A task as the recipes have it."""
    return Task(
        name=name,
        level=level,
        property=name,
        loss_fn=DDPMTLoss(MAELoss()),
        out_spec=OutputSpec(dim, "float32"),
        normalizer=Normalizer(0.0, 1.0),
        datasets=["oc20"],
    )


def test_data_loader_takes_it_also_from_spawned_workers(sample_folder):
    dataset = create_dataset("oc20", "val", [str(sample_folder / "val")])
    assert dataset.dataset_names == ["oc20.val"]
    loader = get_dataloader(
        dataset,
        partial(MaxAtomDistributedBatchSampler, max_atoms=200, shuffle=False, seed=0),
        mt_collater_adapter([task("energy", "system", [1]), task("forces", "atom", [3])]),
        num_workers=0,
    )
    batches = list(loader)
    assert sum(len(batch.natoms) for batch in batches) == 40
    energies = sorted(e for batch in batches for e in batch.energy.tolist())
    expected = sorted(atoms.get_potential_energy() for atoms in stored(sample_folder / "val"))
    np.testing.assert_allclose(energies, expected, atol=1e-5)
    assert all(batch.forces.shape == batch.pos.shape for batch in batches)
    assert batches[0].sid[0].startswith("sample")
    # A spawned worker receives the data set by pickle, which an open LMDB does not survive.
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(copy[3].forces, dataset[3].forces)


def test_missing_data_is_named_with_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ESCAIP_DATA", str(tmp_path / "root"))
    with pytest.raises(UserError) as caught:
        create_dataset("oc20", "train", "oc20/sample/train")
    assert str(tmp_path / "root/oc20/sample/train") in str(caught.value)
    assert "does not exist; make it with `escaip sample-data oc20`" in str(caught.value)
    assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no \.aselmdb file; .*escaip convert IN OUT"):
        create_dataset("mine", "val", [str(tmp_path / "empty")])


def test_unknown_dataset_option_names_the_nearest(sample_folder):
    with pytest.raises(UserError, match="'max_atom'; did you mean max_atoms"):
        create_dataset("oc20", "val", str(sample_folder / "val"), max_atom=5)
    assert len(create_dataset("oc20", "val", str(sample_folder / "val"), first_n=7)) == 7
