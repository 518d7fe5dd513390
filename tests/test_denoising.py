"""Denoising of non-equilibrium structures: the noise, its encoding, losses, and runs with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from scipy.spatial.transform import Rotation

from escaip_fairchem import calculator
from escaip_fairchem.data.corruption import GIVEN, LABELLED, NOISE, corrupt, corrupt_all
from escaip_fairchem.data.sample import make_sample
from escaip_fairchem.data.store import SplitWriter
from escaip_fairchem.describe import describe, load_safely, text
from escaip_fairchem.errors import UserError
from escaip_fairchem.features import force_projections
from escaip_fairchem.train.callbacks import read_metrics
from escaip_fairchem.train.denoising import Denoising
from escaip_fairchem.train.finetune.model import build_model
from escaip_fairchem.train.finetune.start import read_start
from escaip_fairchem.train.nonfinite import structures
from escaip_fairchem.train.optim import Muon
from fork_runs import launch
from helpers import make_batch, one_thread, slab, triclinic
from unit_parts import (
    DENOISING,
    ENERGY_RMSD,
    FORCE_RMSD,
    MEAN,
    REFERENCES,
    batches,
    corrupted,
    gradient,
    make_unit,
    ranks,
    small_model,
    train,
    write_frames,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

RECIPES = Path(__file__).parents[1] / "configs"
PLAIN = {"prob": 0.4, "std": 0.1, "corrupt_ratio": 0.3, "max_force_norm": None, "scale": 2.0}


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_thread(), ranks(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of labelled frames; all atoms of the first one are fixed, and one of each."""
    folder = tmp_path_factory.mktemp("denoising") / "frames"
    write_frames(folder)
    return folder


def many(frames: Path, copies: int = 30) -> Any:
    """One large batch."""
    (batch,) = batches(frames, [[*range(11)] * copies], stress=True)
    return batch


# the noise


def test_noise_is_where_it_may_be_and_nowhere_else(frames: Path) -> None:
    before = many(frames)
    unlabelled = torch.arange(len(before.pos)) % 7 == 0
    before.forces[unlabelled] = torch.nan
    after = before.clone()
    corrupt(after, np.random.default_rng(0), **PLAIN)
    noise = after[NOISE]
    moved = noise.isfinite().all(1)
    may = (before.fixed == 0) & ~unlabelled
    assert not moved[~may].any()
    touched = torch.zeros(len(before.natoms), dtype=torch.bool)
    touched[before.batch[moved]] = True
    # of chosen structures with k atoms that may move, 1 - 0.7^k have one that does
    k = np.bincount(before.batch[may].numpy(), minlength=len(before.natoms))
    chance = 0.4 * (1 - 0.7**k)
    deviation = np.sqrt((chance * (1 - chance)).sum())
    assert abs(int(touched.sum()) - chance.sum()) < 4 * deviation
    share = moved[may & touched[before.batch]].float().mean()
    assert share == pytest.approx(0.3, abs=0.06)
    values = noise[moved]
    assert abs(values.mean()) < 4 * 0.1 / values.numel() ** 0.5
    assert values.std() == pytest.approx(0.1, rel=4 / (2 * values.numel()) ** 0.5)
    torch.testing.assert_close(after.pos[moved], before.pos[moved] + values, atol=0, rtol=0)
    assert torch.equal(after.pos[~moved], before.pos[~moved])
    # a label is there or not; what the model is given are forces before, of moved atoms only
    assert torch.equal(after.forces.isfinite().all(1), ~moved & ~unlabelled)
    assert torch.equal(after.forces[~moved & ~unlabelled], before.forces[~moved & ~unlabelled])
    assert torch.equal(after[GIVEN][moved], before.forces[moved] / 2.0)
    assert not after[GIVEN][~moved].any()
    assert torch.equal(after.stress.isfinite().flatten(1).all(1), ~touched)
    assert torch.equal(after.stress[~touched], before.stress[~touched])
    for name in ("energy", "cell", "pbc", "atomic_numbers", "fixed", "natoms"):
        assert torch.equal(after[name], before[name]), name


def test_large_forces_and_lonely_atoms_stay(frames: Path) -> None:
    batch = many(frames, 2)
    norms = batch.forces.norm(dim=1)
    largest = torch.stack([norms[batch.batch == i].max() for i in range(len(batch.natoms))])
    limit = float(largest.median())
    everything = {**PLAIN, "prob": 1.0, "corrupt_ratio": 1.0}
    corrupt(batch, np.random.default_rng(0), **{**everything, "max_force_norm": limit})
    moved = batch[NOISE].isfinite().all(1)
    calm = (largest <= limit)[batch.batch]
    assert torch.equal(moved, calm & (batch.fixed == 0))
    assert 0 < int(moved.sum()) < len(moved)
    single = make_batch(triclinic()[:1], triclinic(), dtype=torch.float32)
    single.forces = torch.ones_like(single.pos)
    corrupt(single, np.random.default_rng(0), **everything)
    assert single[NOISE].isfinite().all(1).tolist() == [False] + [True] * 5


def test_noise_belongs_to_its_place(frames: Path) -> None:
    def at(*place: int) -> torch.Tensor:
        both = batches(frames, [[3, 4, 5], [3, 4, 5]])
        corrupt_all(both, *place, **{**PLAIN, "prob": 1.0, "corrupt_ratio": 1.0})
        return torch.stack([each.pos for each in both])

    first = at(0, 5, 0)
    assert torch.equal(first, at(0, 5, 0))
    assert not torch.allclose(first[0], first[1])
    for other in ((1, 5, 0), (0, 6, 0), (0, 5, 1)):
        assert not torch.allclose(first, at(*other))


# the encoding


def test_projections_of_two_atoms_by_hand() -> None:
    forces = torch.tensor([[0.0, 3.0, 4.0], [2.0, 0.0, 0.0]])
    directions = torch.tensor([[0.0, 0.0, 1.0], [0.6, 0.8, 0.0], [0.0, 0.0, 0.0]])
    found = force_projections(forces, directions, torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1]))
    expected = [[4.0, 0.0, 5.0, 2.0], [1.2, 2.4, 2.0, 5.0], [0.0, 0.0, 2.0, 2.0]]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("preset", ["paper", "v2"])
def test_without_forces_it_is_the_model_without_denoising(preset: str, frames: Path) -> None:
    plain, denoising = small_model(preset), small_model(preset, denoising=True)
    own = plain.state_dict()
    missing = denoising.load_state_dict(own, strict=False)
    assert not missing.unexpected_keys
    assert own.keys() < denoising.state_dict().keys()
    (batch,) = batches(frames, [[1, 2, 3]])
    given = batch.clone()
    given[GIVEN] = torch.zeros_like(given.pos)
    for mode in (True, False):
        plain.train(mode), denoising.train(mode)
        expected, found = plain(batch.clone()), denoising(given.clone())
        assert (NOISE in denoising(batch.clone())) is mode, "evaluation does not predict noise"
        for name, result in expected.items():
            assert torch.equal(found[name][name], result[name])


@pytest.mark.parametrize("preset", ["paper", "v2"])
def test_noise_turns_with_structure_and_forces(preset: str) -> None:
    model = small_model(preset, denoising=True, force_weights="scalar").double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    atoms, matrix = slab(), Rotation.random(random_state=1).as_matrix()
    forces = np.random.default_rng(2).normal(size=atoms.positions.shape)
    turned = atoms.copy()
    turned.set_cell(atoms.cell.array @ matrix.T)
    turned.positions = atoms.positions @ matrix.T

    def noise(structure: Any, given: np.ndarray) -> np.ndarray:
        batch = make_batch(structure)
        batch[GIVEN] = torch.tensor(given)
        with torch.no_grad():
            return model(batch)[NOISE]["noise"].numpy()

    expected = noise(atoms, forces)
    scale = np.abs(expected).max()
    assert np.abs(noise(turned, forces @ matrix.T) - expected @ matrix.T).max() < 1e-10 * scale
    # forces in other directions of the same lengths mean another noise
    assert np.abs(noise(atoms, forces @ matrix.T) - expected).max() > 1e-3 * scale
    model.backbone.config.__dict__["inference_chunk"] = 7
    assert np.abs(noise(atoms, forces) - expected).max() < 1e-12 * scale


@pytest.mark.parametrize("checkpointing", ["pointwise", "block"])
def test_gradients_do_not_depend_on_what_is_kept(
    checkpointing: str, frames: Path, tmp_path: Path
) -> None:
    data = corrupted(batches(frames, [[1, 2, 3, 4]]))
    found = [
        gradient(
            make_unit(tmp_path, "v2", denoising=DENOISING, backbone={"checkpointing": way}), data
        )
        for way in ("none", checkpointing)
    ]
    assert (found[1] - found[0]).abs().max() < 1e-5 * found[0].abs().max()


# losses


@pytest.mark.parametrize("form", ["paper", "v2"])
def test_losses_by_numpy(form: str, frames: Path, tmp_path: Path) -> None:
    unit = make_unit(tmp_path, form, accumulate=2, denoising=DENOISING)
    data = corrupted(batches(frames, [[0, 1, 2, 3], [4, 5, 6]]))
    loss = float(unit._backward([batch.clone() for batch in data]))
    energies, sums, counts, errors = [], [], [], []
    for batch in data:
        found = {
            name: next(iter(value.values())).detach().double().numpy()
            for name, value in unit.model(batch.clone()).items()
        }
        for index in range(len(batch.natoms)):
            mine = (batch.batch == index).numpy()
            numbers = batch.atomic_numbers.numpy()[mine]
            label = float(batch.energy[index]) - REFERENCES[numbers].sum() - MEAN
            error = abs(label / ENERGY_RMSD - found["energy"][index])
            energies.append(error / (mine.sum() if form == "v2" else 1))
            labels, noise = batch[LABELLED].numpy()[mine], batch[NOISE].numpy()[mine]
            moved, fixed = np.isfinite(noise[:, 0]), batch.fixed.numpy()[mine] == 1
            off = np.linalg.norm(labels / FORCE_RMSD - found["forces"][mine], axis=1)
            away = np.linalg.norm(noise / 0.1 - found[NOISE][mine], axis=1)
            parts = [10 * off[~moved & ~fixed], 0.3 * 10 * away[moved]]
            share = 1 if form == "paper" else max((~fixed).sum(), 1)
            sums.append(sum(part.sum() for part in parts) / share)
            counts.append((~fixed).sum() if form == "paper" else (~fixed).any())
            errors.extend(0.1 * away[moved])
    expected = 4 * np.mean(energies) + sum(sums) / sum(counts)
    assert loss == pytest.approx(expected, rel=1e-5)
    total, number = unit.last_noise.tolist()
    assert (number, total) == (len(errors), pytest.approx(sum(errors), rel=1e-5))
    assert number > 5


def test_report_of_a_bad_step_has_labels_and_noise(frames: Path, tmp_path: Path) -> None:
    """A step that is not finite is judged by the labels of all atoms, and where they were."""
    (batch,) = corrupted(batches(frames, [[1, 2, 3]]))
    write(tmp_path / "bad.extxyz", structures(batch), write_results=True)
    (before,) = batches(frames, [[1, 2, 3]])
    found = read(tmp_path / "bad.extxyz", ":")
    forces = np.concatenate([atoms.get_forces(apply_constraint=False) for atoms in found])
    np.testing.assert_allclose(forces, before.forces, atol=1e-6)
    noise = np.concatenate([atoms.arrays["noise"] for atoms in found])
    positions = np.concatenate([atoms.positions for atoms in found])
    np.testing.assert_allclose(positions - noise, before.pos, atol=1e-6)
    assert 0 < (noise != 0).any(1).sum() < len(noise)


def test_settings_that_cannot_be_meant(frames: Path, tmp_path: Path) -> None:
    good = {"prob": 0.5, "std": 0.1, "corrupt_ratio": 0.5, "weight": 0.1}
    for name, value in (("prob", 0.0), ("corrupt_ratio", 1.5), ("std", None), ("weight", "x")):
        with pytest.raises(UserError, match=rf"denoising.{name} must be .* got {value}"):
            Denoising(**{**good, name: value})
    with pytest.raises(UserError, match=r"nothing is denoised; add \+denoising=dens"):
        make_unit(tmp_path, model=small_model(denoising=True))
    with pytest.raises(UserError, match=r"denoising needs backbone.force_encoding: true"):
        make_unit(tmp_path, model=small_model(), denoising=DENOISING)
    with pytest.raises(UserError, match="DenoisingHead needs a backbone with force_encoding"):
        small_model(denoising=True, force_encoding=False)


def test_noise_of_real_frames_is_learnt(test_data: Path, tmp_path: Path) -> None:
    """Four molecules of aspirin with one noise each; a few seconds are too short for more."""
    writer = SplitWriter(tmp_path / "frames")
    for atoms in read(test_data / "rmd17_sample.extxyz.gz", ":4"):
        labels = {"energy": 0.0, "forces": atoms.get_forces(), "stress": np.zeros(6)}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        writer.add(atoms)
    writer.close()
    resolved = {"init": "resolved", "norm": "skip", "max_neighbors": 12}
    denoising = Denoising(prob=1.0, std=0.1, corrupt_ratio=0.5, weight=10.0)
    muon = partial(Muon, lr=3e-3, weight_decay=1e-3)
    unit = make_unit(tmp_path, "v2", optimizer=muon, denoising=denoising, backbone=resolved)
    data = corrupted(batches(tmp_path / "frames", [[0, 1, 2, 3]]), denoising)
    unit.prepare = lambda _: None
    errors = []
    for _ in range(30):
        train(unit, [data])
        total, number = unit.last_noise.tolist()
        errors.append(total / number)
    nothing = 0.1 * (8 / np.pi) ** 0.5
    assert np.mean(errors[-5:]) < 0.8 * nothing


# runs


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    make_sample("mptrj", folder / "data" / "mptrj" / "sample", n_frames=12)
    return folder


COMMAND = [
    RECIPES / "mptrj" / "escaip_direct.yml", "cluster=cpu", "backbone=tiny", "dataset=sample",
    "+denoising=dens", "denoising.prob=0.8", "rotate=true", "bf16=true", "steps=4", "epochs=null",
    "max_atoms=60", "accumulate=2", "evaluate_every_n_steps=100",
]  # fmt: skip


@pytest.fixture(scope="module")
def direct(workplace: Path) -> Path:
    """A run with direct stress, rotations and bf16, by the command."""
    done = launch(workplace, *COMMAND, "job.timestamp_id=whole")
    assert done.returncode == 0, done.stderr[-3000:]
    return workplace / "runs" / "whole"


def test_noise_of_a_run_is_in_its_table(direct: Path) -> None:
    rows = read_metrics(direct / "metrics.csv")
    found = [row["train_noise_error"] for row in rows if "train_noise_error" in row]
    assert found  # 0.16 A is that of predicting nothing
    assert all(0.08 < value < 0.8 for value in found)


def test_a_step_draws_its_noise_whatever_came_before(frames: Path, tmp_path: Path) -> None:
    data = batches(frames, [[1, 2, 3], [4, 5]])
    drawn = []
    for way in ("goes on", "trained", "does not move"):
        unit = make_unit(tmp_path, denoising=DENOISING)
        if way == "trained":
            train(unit, [data, data])
        elif way == "goes on":
            unit.train_progress.increment_step(), unit.train_progress.increment_step()
        noisy = [batch.clone() for batch in data]
        unit.prepare(noisy)
        drawn.append(torch.cat([batch.pos for batch in noisy]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.full  # the parts are above, and in test_recovery
def test_a_run_that_paused_draws_the_same_noise(direct: Path) -> None:
    for more in (["stop_at_step=2"], []):
        done = launch(direct.parents[1], *COMMAND, "job.timestamp_id=paused", *more)
        assert done.returncode == 0, done.stderr[-3000:]
    final = Path("checkpoints", "final", "inference_ckpt.pt")
    whole, paused = (load_safely(run / final) for run in (direct, direct.with_name("paused")))
    for name, value in whole.ema_state_dict.items():
        assert torch.equal(value, paused.ema_state_dict[name]), name
    errors = [
        [row.get("train_noise_error") for row in read_metrics(run / "metrics.csv")]
        for run in (direct, direct.with_name("paused"))
    ]
    assert errors[0] == errors[1]


def test_checkpoint_serves_as_any_other(direct: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the calculator, which loads strictly; for further training, with and without noise."""
    checkpoint = direct / "checkpoints" / "final" / "inference_ckpt.pt"
    stored = load_safely(checkpoint)
    assert [task["name"] for task in stored.tasks_config] == ["energy", "forces", "stress"]
    parts = {name for name in stored.ema_state_dict if "forces.weight" in name or NOISE in name}
    assert any("attributes.forces" in name for name in parts)
    atoms = triclinic()
    atoms.calc = calculator(checkpoint, device="cpu")
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    assert np.isfinite(atoms.get_stress()).all()

    backbone = {**stored.model_config["backbone"], "force_encoding": False}
    heads = {name: head for name, head in stored.model_config["heads"].items() if name != NOISE}
    with caplog.at_level("INFO"):
        plain = build_model(start=str(direct), backbone=backbone, heads=heads)
    assert "stay behind, which served denoising" in caplog.text
    said = describe(direct)
    assert said["parameters"] == sum(value.numel() for value in plain.state_dict().values())
    batch = make_batch(atoms, dtype=torch.float32)
    with torch.no_grad():
        found = plain.eval()(batch)
    by_property = {task["property"]: task["normalizer"]["rmsd"] for task in stored.tasks_config}
    scaled = by_property["forces"] * found["forces"]["forces"].numpy()
    np.testing.assert_allclose(scaled, forces, rtol=1e-4, atol=1e-5)

    weights, start = stored.ema_state_dict, read_start(direct)
    assert start.denoising == sum(weights[name].numel() for name in parts)
    assert f"and {start.denoising:,} that only denoising uses" in text(said)
    gone = set(weights) - set(start.checkpoint.ema_state_dict)
    assert gone == {name for name in weights if "attributes.forces." in name or NOISE in name}
    assert "force_encoding" not in start.model["backbone"]
    assert NOISE not in start.model["heads"]
    again = build_model(
        start=str(direct), **{k: stored.model_config[k] for k in ("backbone", "heads")}
    )
    assert NOISE in again.output_heads
    assert np.isfinite(energy)


def test_conservative_finetuning_begins_with_it(direct: Path) -> None:
    recipe = RECIPES / "mptrj" / "escaip_conservative_finetune.yml"
    small = [argument for argument in COMMAND[1:] if "denois" not in argument]
    done = launch(direct.parents[1], recipe, *small, f"start={direct}", "steps=2", "bf16=false")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stay behind, which served denoising" in done.stderr + done.stdout
    assert "stay behind, which made direct forces and stress" in done.stderr + done.stdout
