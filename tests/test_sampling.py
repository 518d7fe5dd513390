"""Frames drawn by the size of their forces."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from data_helpers import labelled_atoms
from escaip_fairchem.data.datasets import create_dataset
from escaip_fairchem.data.sampling import ForceWeightedBatchSampler
from escaip_fairchem.data.store import SplitWriter
from escaip_fairchem.errors import UserError

# of the free atoms; what acts on the fixed one does not count
MEAN_FORCES = np.array([0.1, 0.2, 0.4, 0.8, 1.6, 3.2])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Frames of known mean force, in a folder as `escaip convert` writes it."""
    rng = np.random.default_rng(0)
    writer = SplitWriter(tmp_path_factory.mktemp("data") / "train")
    for atoms, mean in zip(labelled_atoms(len(MEAN_FORCES)), MEAN_FORCES, strict=True):
        forces = rng.normal(size=(len(atoms), 3))
        forces *= mean / np.linalg.norm(forces, axis=1)[:, None]
        forces[0] *= 100
        atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=forces)
        atoms.set_constraint(FixAtoms([0]))
        writer.add(atoms)
    writer.close()
    return create_dataset("oc20", "train", str(writer._folder))


def sampler(dataset, rank=0, num_replicas=1, power=1.0, max_atoms=12, **options):
    return ForceWeightedBatchSampler(
        dataset=dataset, max_atoms=max_atoms, num_replicas=num_replicas, rank=rank, seed=3,
        power=power, **options,
    )  # fmt: skip


def epochs(drawn, n):
    for epoch in range(n):
        drawn.set_epoch_and_start_iteration(epoch, 0)
        yield list(drawn)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_frames_come_in_proportion_to_their_force(dataset, power):
    natoms = np.array(dataset.get_metadata("natoms", list(range(len(dataset)))))
    assert len(set(natoms)) == 1, "then an epoch has as many frames as the data"
    drawn = sampler(dataset, power=power, max_atoms=int(natoms[0]))
    frames = [frame for epoch in epochs(drawn, 2000) for batch in epoch for frame in batch]
    counts = np.bincount(frames, minlength=len(MEAN_FORCES)) / 2000
    # fairchem shuffles the rows: the force of each as it is read
    forces = [dataset[index].forces[1:].norm(dim=1).mean() for index in range(len(dataset))]
    np.testing.assert_allclose(sorted(forces), MEAN_FORCES, rtol=1e-5)
    expected = np.array(forces) ** power / np.mean(MEAN_FORCES**power)
    # 2000 draws: standard error below 0.5 / sqrt(2000) = 0.011, and the cut of an epoch
    np.testing.assert_allclose(counts, expected, atol=0.06)


def test_ranks_share_an_epoch_that_starts_anywhere(dataset):
    whole = sampler(dataset)
    ranks = [sampler(dataset, rank, 2) for rank in range(2)]
    for drawn in (whole, *ranks):
        drawn.set_epoch_and_start_iteration(1, 0)
    parts = [list(drawn) for drawn in ranks]
    assert [len(part) for part in parts] == [len(ranks[0])] * 2
    interleaved = [batch for pair in zip(*parts, strict=True) for batch in pair]
    assert interleaved[: len(whole)] == list(whole)
    whole.set_epoch_and_start_iteration(1, 1)
    assert list(whole) == interleaved[1 : len(whole)]
    whole.set_epoch_and_start_iteration(2, 0)
    assert list(whole) != interleaved[: len(whole)]


def test_mistakes(dataset, tmp_path):
    with pytest.raises(UserError, match="power must be 0 or more"):
        sampler(dataset, power=-1)
    with pytest.raises(UserError, match="shuffle: true"):
        sampler(dataset, shuffle=False)
    writer = SplitWriter(tmp_path / "old")
    for atoms in labelled_atoms(3):
        writer.add(atoms)
    writer.close()
    np.savez(tmp_path / "old" / "metadata.npz", natoms=np.array([len(labelled_atoms(1)[0])] * 3))
    with pytest.raises(UserError, match="make them again with `escaip convert`"):
        sampler(create_dataset("oc20", "train", str(tmp_path / "old")))


def test_folders_with_and_without_mean_forces(dataset, tmp_path):
    """Such as an older one: the sizes that all samplers need are there, mean forces are not."""
    folder = Path(dataset.datasets[0].dataset.paths[0])
    shutil.copytree(folder, tmp_path / "z_old")
    natoms = np.load(folder / "metadata.npz")["natoms"]
    np.savez(tmp_path / "z_old" / "metadata.npz", natoms=natoms)
    mixed = create_dataset("oc20", "train", [str(folder), str(tmp_path / "z_old")])
    assert sorted(mixed.get_metadata("natoms", list(range(12)))) == sorted([*natoms, *natoms])
    with pytest.raises(UserError, match="make them again with `escaip convert`"):
        sampler(mixed)


def test_forces_that_are_all_zero(tmp_path):
    writer = SplitWriter(tmp_path / "train")
    for atoms in labelled_atoms(2):
        atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.zeros((len(atoms), 3)))
        writer.add(atoms)
    writer.close()
    with pytest.raises(UserError, match="every force of the training data is zero"):
        sampler(create_dataset("oc20", "train", str(tmp_path / "train")))
