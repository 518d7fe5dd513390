"""The embedded sample, and how fairchem loads a data set."""

from __future__ import annotations

import pickle
import sys
from functools import cache, partial
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
from escaip_fairchem.data import sample, sample_molecules
from escaip_fairchem.data.datasets import create_dataset
from escaip_fairchem.data.sample_slabs import METALS
from escaip_fairchem.errors import UserError


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def folder_of(data_root):
    """Folder of the default sample of a domain, as `escaip sample-data` writes it, made once."""

    @cache
    def make(domain):
        folder = data_root / domain / "sample"
        sample.make_sample(domain, folder)
        return folder

    return make


@pytest.fixture(scope="module")
def sample_folder(folder_of):
    return folder_of("oc20")


def frames_of(folder):
    return stored(folder / "train"), stored(folder / "val")


@pytest.mark.parametrize("domain", sample.DOMAINS)
def test_packaged_numbers_are_those_of_the_default_sample(domain, folder_of):
    packaged = Path(configs.__file__).parent / domain / "dataset/sample.yaml"
    content = yaml.safe_load(packaged.read_text())
    assert content["dataset"]["train"] == f"{domain}/sample/train"
    assert content["dataset"]["name"] == domain
    train, val = frames_of(folder_of(domain))
    assert (len(train), len(val)) == (200, 40)
    counts = np.array([np.bincount(atoms.numbers, minlength=120) for atoms in train], dtype=float)
    energy = np.array([atoms.get_potential_energy() for atoms in train])
    expected, _, _, _ = np.linalg.lstsq(counts, energy)
    np.testing.assert_allclose(content["element_refs"]["energy"], expected, atol=1e-6)
    normalizer = content["normalizer"]
    residual = np.sqrt(np.mean((energy - counts @ expected) ** 2))
    assert normalizer["energy_residual"] == pytest.approx(residual, abs=1e-6)
    fixed = [{i for c in atoms.constraints for i in c.index} for atoms in train]
    free = np.concatenate(
        [
            np.delete(atoms.calc.results["forces"], list(which), axis=0)
            for atoms, which in zip(train, fixed, strict=True)
        ]
    )
    assert normalizer["rmsd"] == pytest.approx(np.sqrt((free**2).mean()), abs=1e-6)
    if domain == "mptrj":
        stress = np.array([atoms.get_stress(voigt=False) for atoms in train])
        assert normalizer["stress_rmsd"] == pytest.approx(np.sqrt((stress**2).mean()), abs=1e-6)
    else:
        assert "stress_rmsd" not in normalizer


@pytest.mark.parametrize("domain", sample.DOMAINS)
def test_every_system_is_on_both_sides_and_nothing_explodes(domain, folder_of):
    train, val = frames_of(folder_of(domain))
    assert {a.info["sid"] for a in train} == {a.info["sid"] for a in val}
    ids = [(a.info["sid"], a.info["fid"]) for a in train + val]
    assert len(set(ids)) == 240
    for atoms in train + val:
        norms = np.linalg.norm(atoms.calc.results["forces"], axis=1)
        assert 0.05 < norms.max() < 50
        distances = atoms.get_all_distances(mic=bool(atoms.pbc.any()))
        assert distances[~np.eye(len(atoms), dtype=bool)].min() > 0.7


def test_sample_has_the_shape_of_oc20(sample_folder):
    train, val = frames_of(sample_folder)
    for atoms in train + val:
        tags = atoms.get_tags()
        assert 20 <= len(atoms) <= 40
        assert set(tags) == {0, 1, 2}
        assert atoms.pbc.all()
        np.testing.assert_array_equal(
            np.flatnonzero(tags == 0), np.sort(atoms.constraints[0].index)
        )
        assert set(atoms.symbols[tags == 2]) <= set("HCNO")
        assert set(atoms.symbols[tags < 2]) <= set(METALS)
        assert np.linalg.norm(atoms.calc.results["forces"][tags > 0], axis=1).max() > 0.1


def test_sample_has_the_shape_of_oc22(folder_of):
    train, val = frames_of(folder_of("oc22"))
    for atoms in train + val:
        tags = atoms.get_tags()
        assert atoms.pbc.all()
        assert not atoms.constraints
        assert (2 in tags) == (atoms.info["nads"] == 1)
        slab = set(atoms.symbols[tags < 2])
        assert "O" in slab
        assert slab - {"O"} <= set(METALS)
        assert {0, 1} <= set(tags)
    assert {a.info["nads"] for a in train} == {0, 1}


def test_stress_of_the_alloys_is_the_slope_of_the_energy(folder_of):
    """In ASE's sign, by finite differences of EMT's energy, which does not use its stress."""
    frames = frames_of(folder_of("mptrj"))[1][::9]
    step = 1e-5
    for atoms in frames:
        assert atoms.pbc.all()
        slopes = np.zeros((3, 3))
        for a, b in [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]:
            energies = []
            for sign in (1, -1):
                strain = np.eye(3)
                strain[a, b] += sign * step / 2
                strain[b, a] += sign * step / 2
                bent = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
                bent.set_cell(atoms.cell.array @ strain, scale_atoms=True)
                bent.calc = EMT()
                energies.append(bent.get_potential_energy())
            slopes[a, b] = slopes[b, a] = (energies[0] - energies[1]) / (2 * step)
        np.testing.assert_allclose(
            atoms.get_stress(voigt=False), slopes / atoms.get_volume(), atol=1e-6
        )
    # Off equilibrium in both directions, with shear
    stress = np.array([atoms.calc.results["stress"] for atoms in frames_of(folder_of("mptrj"))[0]])
    assert stress[:, :3].mean(1).min() < -0.02
    assert stress[:, :3].mean(1).max() > 0.02
    assert np.abs(stress[:, 3:]).max() > 0.02


def test_molecules_are_labelled_by_gfn2_xtb(folder_of):
    tblite = pytest.importorskip("tblite.interface")
    from ase.units import Bohr, Hartree

    for atoms in frames_of(folder_of("spice"))[1][::6]:
        assert not atoms.pbc.any()
        assert (atoms.info["charge"], atoms.info["spin"]) == (0, 1)
        xtb = tblite.Calculator("GFN2-xTB", atoms.numbers, atoms.positions / Bohr)
        xtb.set("verbosity", 0)
        result = xtb.singlepoint()
        assert atoms.get_potential_energy() == pytest.approx(
            result.get("energy") * Hartree, abs=1e-5
        )
        np.testing.assert_allclose(
            atoms.calc.results["forces"], -result.get("gradient") * Hartree / Bohr, atol=1e-3
        )


def test_molecules_without_tblite_fit_the_same_references(monkeypatch):
    monkeypatch.setitem(sys.modules, "tblite", None)
    monkeypatch.setitem(sys.modules, "tblite.ase", None)
    maker = sample_molecules.maker()
    assert maker.labels == "ASE EMT"
    assert "escaip-fairchem[xtb]" in maker.note
    packaged = yaml.safe_load(
        (Path(configs.__file__).parent / "spice/dataset/sample.yaml").read_text()
    )
    references = np.array(packaged["element_refs"]["energy"])
    for atoms in sample.sample_frames(maker, 48, 0):
        above = atoms.get_potential_energy() - references[atoms.numbers].sum()
        assert abs(above) < 0.5 * len(atoms)
        fresh = Atoms(atoms.numbers, atoms.positions, calculator=EMT())
        np.testing.assert_allclose(atoms.calc.results["forces"], fresh.get_forces(), atol=1e-8)


def test_sample_labels_are_emt_of_the_stored_structure(sample_folder):
    for atoms in stored(sample_folder / "val")[::8]:
        fresh = Atoms(
            atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, calculator=EMT()
        )
        assert atoms.get_potential_energy() == pytest.approx(fresh.get_potential_energy(), abs=1e-8)
        np.testing.assert_allclose(atoms.calc.results["forces"], fresh.get_forces(), atol=1e-8)


@pytest.mark.parametrize("domain", sample.DOMAINS)
def test_sample_is_deterministic_by_seed(domain):
    def content(seed):
        return [
            (a.positions.tobytes(), a.calc.results["forces"].tobytes(), a.get_potential_energy())
            for a in sample.sample_frames(sample.maker_of(domain), 14, seed)
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


@pytest.mark.parametrize(
    "name, path, command",
    [
        ("oc20", "oc20/sample/train", "escaip sample-data oc20"),
        ("spice", "spice/sample/val", "escaip sample-data spice"),
        ("mine", "mine/train", "escaip convert IN {root}/mine"),
        ("mine", "other/val", "escaip convert IN {root}/other --label mine"),
        (
            "oc20",
            "oc20_2m/train",
            "escaip convert s2ef_train_2M {root}/oc20_2m --val s2ef_val_id --label oc20 "
            "--name oc20_2m_fitted",
        ),
        (
            "mptrj",
            "mptrj/train",
            "escaip convert MPtrj_2022.9_full.json {root}/mptrj --split-by sid --val-fraction 0.05",
        ),
        (
            "oc22",
            "oc22_total/val",
            "escaip convert s2ef-total/train {root}/oc22_total --val s2ef-total/val_id "
            "--label oc22",
        ),
    ],
)
def test_missing_data_is_named_with_the_command_that_makes_it(
    name, path, command, tmp_path, monkeypatch
):
    root = tmp_path / "root"
    monkeypatch.setenv("ESCAIP_DATA", str(root))
    with pytest.raises(UserError) as caught:
        create_dataset(name, "train", path)
    assert str(root / path) in str(caught.value)
    command = command.format(root=root)
    assert f"does not exist; make it with `{command}` (" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_data_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no \.aselmdb file; .*escaip convert IN OUT"):
        create_dataset("mine", "val", [str(tmp_path / "empty")])


def test_unknown_dataset_option_names_the_nearest(sample_folder):
    with pytest.raises(UserError, match="'max_atom'; did you mean max_atoms"):
        create_dataset("oc20", "val", str(sample_folder / "val"), max_atom=5)
    assert len(create_dataset("oc20", "val", str(sample_folder / "val"), first_n=7)) == 7
