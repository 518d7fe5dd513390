"""Data in: what is written reads back as ASE reads it, splits, references."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.io import iread, read, write

from data_helpers import labelled_atoms, stored
from escaip_fairchem.data import splits, store
from escaip_fairchem.data.convert import SplitOptions, convert
from escaip_fairchem.data.datasets import create_dataset
from escaip_fairchem.data.frames import LabelKeys
from escaip_fairchem.data.references import BLOCK, ReferenceFit
from escaip_fairchem.errors import UserError


@pytest.fixture(autouse=True)
def data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("ESCAIP_DATA", str(tmp_path / "root"))
    return tmp_path / "root"


# --- what is written -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["oc20_s2ef_adsorption_3frames", "oc22_sample", "mad_sample", "omol25_sample"],
)
def test_converted_frames_read_back_as_ase_reads_the_source(name, test_data, tmp_path):
    source = test_data / f"{name}.extxyz.gz"
    expected = read(source, ":")
    convert([source], tmp_path / "out", split=SplitOptions(val_fraction=0.3))

    found = stored(tmp_path / "out/train") + stored(tmp_path / "out/val")
    assert len(found) == len(expected)
    by_positions = {atoms.positions.tobytes(): atoms for atoms in found}
    for atoms in expected:
        other = by_positions[atoms.positions.tobytes()]
        np.testing.assert_array_equal(other.numbers, atoms.numbers)
        np.testing.assert_array_equal(other.cell.array, atoms.cell.array)
        np.testing.assert_array_equal(other.pbc, atoms.pbc)
        np.testing.assert_array_equal(other.get_tags(), atoms.get_tags())
        assert other.get_potential_energy() == atoms.get_potential_energy()
        np.testing.assert_array_equal(
            other.get_forces(apply_constraint=False), atoms.get_forces(apply_constraint=False)
        )
        fixed = [set(c.index) for c in atoms.constraints]
        assert [set(c.index) for c in other.constraints] == fixed
        for key in {"fid", "charge", "spin"} & set(atoms.info):
            assert other.info[key] == atoms.info[key]
        if "sid" in atoms.info:
            assert other.info["sid"] == str(atoms.info["sid"])


def test_stress_and_charge_reach_the_batch(test_data, tmp_path):
    from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch

    source = test_data / "mptrj_highstress_sample.extxyz.gz"
    frames = [atoms for atoms, _ in zip(iread(source), range(6), strict=False)]
    for atoms in frames:
        atoms.info["charge"] = -2.0
    write(tmp_path / "six.extxyz", frames)
    summary = convert([tmp_path / "six.extxyz"], tmp_path / "out")
    assert summary[0].n_stress == 6

    dataset = create_dataset("mptrj", "train", str(tmp_path / "out/train"), stress=True)
    batch = atomicdata_list_to_batch([dataset[index] for index in range(len(dataset))])
    expected = {
        round(atoms.get_potential_energy(), 3): atoms.get_stress(voigt=False) for atoms in frames
    }
    for energy, stress in zip(batch.energy, batch.stress, strict=True):
        np.testing.assert_allclose(
            stress.reshape(3, 3), expected[round(energy.item(), 3)], rtol=1e-6, atol=1e-7
        )
    assert batch.charge.tolist() == [-2] * len(dataset)


def test_scales_of_stress_and_of_energies_above_references(test_data, tmp_path, data_root):
    source = test_data / "mptrj_sample.extxyz.gz"
    frames = [atoms for atoms, _ in zip(iread(source), range(150), strict=False)]
    write(tmp_path / "some.extxyz", frames)
    _, group = convert([tmp_path / "some.extxyz"], tmp_path / "out")
    train = stored(tmp_path / "out/train")
    normalizer = yaml.safe_load(group.read_text())["normalizer"]
    stress = np.array([atoms.get_stress(voigt=False) for atoms in train])
    assert normalizer["stress_rmsd"] == pytest.approx(np.sqrt((stress**2).mean()), rel=1e-6)
    counts = np.array([np.bincount(atoms.numbers, minlength=120) for atoms in train], dtype=float)
    energy = np.array([atoms.get_potential_energy() for atoms in train])
    residual = energy - counts @ np.linalg.lstsq(counts, energy)[0]
    assert normalizer["energy_residual"] == pytest.approx(np.sqrt((residual**2).mean()), rel=1e-5)


def stressed(n_frames, scale, pbc=True):
    frames = labelled_atoms(n_frames)
    for atoms in frames:
        labels = {**atoms.calc.results, "stress": scale * np.arange(1.0, 7.0)}
        atoms.pbc = pbc
        atoms.calc = SinglePointCalculator(atoms, **labels)
    return frames


def test_stress_in_kbar_is_refused_and_that_of_a_molecule_left_out(tmp_path):
    write(tmp_path / "kbar.traj", stressed(20, 20.0))
    with pytest.raises(UserError, match=r"looks like kbar or GPa: multiply it by -0\.000624151"):
        convert([tmp_path / "kbar.traj"], tmp_path / "out")
    write(tmp_path / "free.traj", stressed(3, 0.01, pbc=False))
    assert convert([tmp_path / "free.traj"], tmp_path / "out")[0].n_stress == 0
    write(tmp_path / "nan.traj", stressed(3, np.nan))
    with pytest.raises(UserError, match="frame 0: the stress is NaN or infinite"):
        convert([tmp_path / "nan.traj"], tmp_path / "nan")


def test_a_structure_without_stress_is_left_out_and_none_at_all_is_an_error(tmp_path):
    frames = stressed(4, 0.01)
    del frames[1].calc.results["stress"]
    write(tmp_path / "three.traj", frames)
    convert([tmp_path / "three.traj"], tmp_path / "three", split=SplitOptions(val_fraction=0.25))
    folders = [str(tmp_path / "three" / split) for split in ("train", "val")]
    dataset = create_dataset("cu", "all", folders, stress=True)
    finite = [bool(dataset[index].stress.isfinite().all()) for index in range(4)]
    assert sorted(finite) == [False, True, True, True]

    write(tmp_path / "none.traj", labelled_atoms(4))
    convert([tmp_path / "none.traj"], tmp_path / "none")
    with pytest.raises(UserError, match=r"no stress in 3 structures; .*training=direct"):
        create_dataset("cu", "train", str(tmp_path / "none/train"), stress=True)


@pytest.mark.parametrize("name", ["frames.traj", "frames.db", "frames.extxyz.gz", "frames.aselmdb"])
def test_every_format_gives_the_same_labels(name, tmp_path):
    frames = labelled_atoms(4)
    if name.endswith(("db", "aselmdb")):
        with connect(tmp_path / name) as database:
            for atoms in frames:
                database.write(atoms, index=atoms.info["index"])
    else:
        write(tmp_path / name, frames)
    convert([tmp_path / name], tmp_path / "out")

    found = stored(tmp_path / "out/train") + stored(tmp_path / "out/val")
    for atoms in found:
        source = frames[np.argmin([np.abs(f.positions - atoms.positions).max() for f in frames])]
        np.testing.assert_allclose(atoms.positions, source.positions, atol=1e-7)
        np.testing.assert_allclose(
            atoms.get_forces(apply_constraint=False),
            source.get_forces(apply_constraint=False),
            atol=1e-7,
        )
        assert atoms.calc.results["forces"][0].any(), "the force on a fixed atom is kept"
        assert set(atoms.constraints[0].index) == {0}
    assert len(found) == 4


def test_labels_under_other_names(tmp_path):
    frames = labelled_atoms(3)
    expected = [atoms.calc.results["forces"] for atoms in frames]
    for atoms in frames:
        atoms.info["REF_energy"] = atoms.get_potential_energy()
        atoms.info["REF_stress"] = np.arange(9.0).reshape(3, 3)
        atoms.arrays["REF_forces"] = atoms.calc.results["forces"]
        atoms.calc = None
    write(tmp_path / "in.extxyz", frames)
    with pytest.raises(UserError, match=r"frame 0: no energy; .* --energy-key .*REF_energy"):
        convert([tmp_path / "in.extxyz"], tmp_path / "out")
    keys = LabelKeys("REF_energy", "REF_forces", "REF_stress")
    convert([tmp_path / "in.extxyz"], tmp_path / "out", keys=keys)
    for atoms in stored(tmp_path / "out/train"):
        forces = expected[atoms.info["index"]]
        np.testing.assert_allclose(atoms.calc.results["forces"], forces, atol=1e-7)
        # Voigt order xx yy zz yz xz xy of the symmetric part
        np.testing.assert_allclose(atoms.calc.results["stress"], [0, 4, 8, 6, 4, 2])


def test_metadata_counts_follow_the_rows_over_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "FRAMES_PER_SHARD", 3)
    frames = [molecule(name) for name in ("H2", "H2O", "CH4", "NH3", "CO2", "N2", "C2H6")]
    writer = store.SplitWriter(tmp_path / "split")
    for atoms in frames:
        atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.zeros((len(atoms), 3)))
        writer.add(atoms)
    writer.close()
    assert [f.name for f in sorted((tmp_path / "split").iterdir())] == [
        "data.0000.aselmdb",
        "data.0001.aselmdb",
        "data.0002.aselmdb",
        "metadata.npz",
    ]
    natoms = np.load(tmp_path / "split/metadata.npz")["natoms"]
    assert natoms.tolist() == [len(atoms) for atoms in frames]
    assert natoms.tolist() == [len(atoms) for atoms in stored(tmp_path / "split")]


# --- all or nothing ------------------------------------------------------------------------


def make_folder(target, file, overwrite=False, fault=False):
    """Make a folder that holds one file, with a fault at the end if wanted."""
    with store.new_folder(target, overwrite) as partial:
        (partial / file).write_text("x")
        assert not fault or 1 / 0


def test_a_fault_leaves_what_was_there(tmp_path):
    target = tmp_path / "set"
    with pytest.raises(ZeroDivisionError):
        make_folder(target, "half", fault=True)
    assert list(tmp_path.iterdir()) == []
    make_folder(target, "first")
    with pytest.raises(UserError, match="pass --overwrite"):
        make_folder(target, "second")
    with pytest.raises(ZeroDivisionError):
        make_folder(target, "second", overwrite=True, fault=True)
    assert [path.name for path in target.iterdir()] == ["first"]
    make_folder(target, "second", overwrite=True)
    assert [path.name for path in target.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_replacement_puts_the_old_folder_back(tmp_path):
    target = tmp_path / "set"
    make_folder(target, "first")
    with pytest.raises(FileNotFoundError), store.new_folder(target, overwrite=True) as partial:
        partial.rmdir()  # so that renaming it fails
    assert [path.name for path in target.iterdir()] == ["first"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_bad_last_frame_leaves_nothing(tmp_path):
    frames = labelled_atoms(5)
    frames[4].positions[1] = np.nan
    results = frames[4].calc.results  # labels of the structure as it now is
    frames[4].calc = SinglePointCalculator(frames[4], **results)
    write(tmp_path / "in.traj", frames)
    with pytest.raises(UserError, match=r"in\.traj, frame 4: the position of atom 1 is NaN"):
        convert([tmp_path / "in.traj"], tmp_path / "out", strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in.traj"]


# --- splits --------------------------------------------------------------------------------

GROUPS = [str(index) for index in range(20) for _ in range(index % 5 + 1)]


@pytest.mark.parametrize("seed", range(5))
def test_whole_groups_go_to_one_side(seed):
    mask = splits.split_by_group(GROUPS, 0.2, seed)
    train = {g for g, held_out in zip(GROUPS, mask, strict=True) if not held_out}
    val = {g for g, held_out in zip(GROUPS, mask, strict=True) if held_out}
    assert not train & val
    assert abs(mask.mean() - 0.2) <= 5 / len(GROUPS)


def test_one_large_and_one_small_group():
    mask = splits.split_by_group(["a"] * 9 + ["b"] * 4, 0.1, seed=3)
    assert mask.tolist() == [False] * 9 + [True] * 4


@pytest.mark.parametrize("seed", range(5))
def test_frames_are_held_out_inside_every_group(seed):
    mask = splits.split_within_groups(GROUPS, 0.2, seed)
    for group in set(GROUPS):
        side = mask[[g == group for g in GROUPS]]
        assert not side.all()
        assert side.any() == (len(side) > 1)


def test_splits_depend_on_the_seed_alone():
    masks = [splits.split_random(50, 0.2, seed) for seed in (1, 1, 2)]
    assert [mask.sum() for mask in masks] == [10, 10, 10]
    assert (masks[0] == masks[1]).all()
    assert (masks[0] != masks[2]).any()


@pytest.mark.parametrize("options", [{}, {"by": "sid"}, {"within": "sid"}])
def test_converted_splits_are_disjoint_and_complete(options, tmp_path):
    frames = labelled_atoms(12, sid=[7, 7, 7, 8, 8, 8, 9, 9, 9, 10, 10, 10])
    write(tmp_path / "in.traj", frames)
    convert([tmp_path / "in.traj"], tmp_path / "out", split=SplitOptions(0.25, **options))
    sides = [stored(tmp_path / "out" / side) for side in ("train", "val")]
    train, val = ({atoms.info["index"] for atoms in side} for side in sides)
    assert len(val) == (4 if "within" in options else 3)
    assert train | val == set(range(12))
    assert not train & val
    train, val = ({atoms.info["sid"] for atoms in side} for side in sides)
    if "by" in options:
        assert not train & val
    if "within" in options:
        assert train == val == {"7", "8", "9", "10"}


# --- references ----------------------------------------------------------------------------


def test_references_recover_known_energies():
    rng = np.random.default_rng(0)
    energies = {1: -13.6, 6: -1029.5, 8: -2041.98, 79: -5e5}
    fit = ReferenceFit()
    for _ in range(BLOCK + 10):  # more than one block is folded
        numbers = rng.choice(list(energies), size=rng.integers(1, 60))
        fit.add(numbers, sum(energies[z] for z in numbers))
    references = fit.solve()
    assert references.determined
    assert references.elements.tolist() == [1, 6, 8, 79]
    for z, energy in energies.items():
        assert references.values[z] == pytest.approx(energy, abs=1e-8)
    assert np.count_nonzero(references.values) == 4


@pytest.mark.parametrize("n_frames, noise", [(30, 0.5), (3, 0.5), (50, 0.0)])
def test_references_equal_numpy_also_where_undetermined(n_frames, noise):
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 9, (n_frames, 5))
    counts[:, 4] = counts[:, 0] + 2 * counts[:, 1]  # a composition that adds nothing new
    energy = counts @ np.array([-1.0, -20.0, 3.0, 50.0, 7.0]) + noise * rng.normal(size=n_frames)
    elements = np.array([1, 6, 7, 8, 16])
    fit = ReferenceFit()
    for row, label in zip(counts, energy, strict=True):
        fit.add(np.repeat(elements, row), label)
    references = fit.solve()
    expected, _, rank, _ = np.linalg.lstsq(counts.astype(float), energy)
    np.testing.assert_allclose(references.values[elements], expected, rtol=1e-9, atol=1e-9)
    assert references.rank == rank < 5
    assert "not determined" in references.describe()
    rms = np.sqrt(np.mean((energy - counts @ expected) ** 2))
    assert references.rms == pytest.approx(rms, abs=1e-9)


def test_group_file_holds_floats_and_equals_a_refit(tmp_path, data_root):
    frames = labelled_atoms(10)
    write(tmp_path / "in.traj", frames)
    _, group = convert([tmp_path / "in.traj"], tmp_path / "cu", label="oc20")
    assert group == data_root / "configs/dataset/cu.yaml"
    assert group.read_text().startswith("# @package _global_\n")
    content = yaml.safe_load(group.read_text())
    assert content["dataset"] == {
        "name": "oc20",
        "train": str(tmp_path / "cu/train"),
        "val": str(tmp_path / "cu/val"),
    }
    energies = content["element_refs"]["energy"]
    train = stored(tmp_path / "cu/train")
    assert len(energies) == 120
    assert all(isinstance(value, float) for value in [*energies, content["normalizer"]["rmsd"]])
    mean = np.mean([atoms.get_potential_energy() / len(atoms) for atoms in train])
    assert energies[29] == pytest.approx(mean, abs=1e-9)
    free = np.concatenate([atoms.calc.results["forces"][1:] for atoms in train])
    assert content["normalizer"]["rmsd"] == pytest.approx(np.sqrt((free**2).mean()), abs=1e-9)
