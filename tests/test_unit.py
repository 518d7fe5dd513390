"""The training and evaluation units: accumulation, ranks, sharding, fp16, exact metrics."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from fairchem.core._cli import get_hydra_config_from_yaml
from fairchem.core.units.mlip_unit import mlip_unit
from omegaconf import OmegaConf

from data_helpers import stored
from escaip_fairchem.data.sample import make_sample
from escaip_fairchem.errors import UserError
from escaip_fairchem.train.callbacks import read_metrics
from escaip_fairchem.train.evaluation import within_threshold
from escaip_fairchem.train.runner import TrainEvalRunner
from escaip_fairchem.train.unit import TrainEvalUnit
from helpers import one_thread
from unit_parts import (
    DENOISING,
    Answers,
    batches,
    corrupted,
    evaluate,
    gradient,
    make_tasks,
    make_unit,
    ranks,
    small_model,
    train,
    weights,
    write_frames,
)
from unit_rank import GROUPS, STEPS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ase import Atoms

RECIPES = Path(__file__).parents[1] / "configs"


def free(atoms: Atoms) -> np.ndarray:
    fixed = [i for constraint in atoms.constraints for i in constraint.index]
    return np.setdiff1d(np.arange(len(atoms)), fixed)


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with labelled frames and written predictions, some within EFwT's thresholds."""
    folder = tmp_path_factory.mktemp("unit")
    write_frames(folder / "frames")
    rng = np.random.default_rng(7)
    table = {}
    for index, atoms in enumerate(stored(folder / "frames")):
        close = index % 2 == 0
        forces = atoms.get_forces(apply_constraint=False)
        noise = rng.uniform(-1, 1, forces.shape) * (0.029 if close else 0.2)
        fixed = np.setdiff1d(np.arange(len(atoms)), free(atoms))
        noise[fixed] = 5.0
        stress = atoms.get_stress(voigt=False)
        energy = atoms.get_potential_energy()
        # 0.05 eV fails by the energy alone, in frame 4
        offset = 0.05 if index == 4 else rng.uniform(-0.019, 0.019)
        table[float(np.float32(energy))] = {
            "energy": energy + offset,
            "forces": forces + noise,
            "stress": stress + rng.normal(0, 0.01, (3, 3)),
        }
    torch.save(table, folder / "answers.pt")
    return folder


@pytest.fixture(scope="module")
def table(frames: Path) -> dict[float, dict[str, np.ndarray]]:
    return torch.load(frames / "answers.pt", weights_only=False)  # written above


@pytest.fixture(scope="module")
def two(frames: Path) -> list[dict[Any, Any]]:
    """What two ranks found."""
    script = Path(__file__).with_name("unit_rank.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, script, frames, str(rank)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in started:
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors[-3000:]
    return [torch.load(frames / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_thread(), ranks(tmp_path_factory.mktemp("group")):
        yield


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("form", ["paper", "v2"])
def test_two_batches_are_one_large_batch(form: str, frames: Path, tmp_path: Path) -> None:
    unit = make_unit(tmp_path, form, accumulate=2)
    apart = gradient(unit, batches(frames / "frames", [[1, 2, 3], [0, 4]]))
    whole = gradient(unit, batches(frames / "frames", [[1, 2, 3, 0, 4]]))
    assert largest(apart, whole) < 1e-5


@pytest.mark.parametrize("form", ["paper", "v2"])
def test_gradient_of_one_batch_is_fairchems(form: str, frames: Path, tmp_path: Path) -> None:
    unit = make_unit(tmp_path, form)
    (batch,) = batches(frames / "frames", [[0, 1, 2, 3]])
    ours = gradient(unit, [batch])
    losses = mlip_unit.compute_loss(make_tasks(form), unit.model(batch), batch)
    sum(losses.values()).backward()
    theirs = torch.cat([p.grad.flatten() for p in unit.model.parameters()])
    assert largest(ours, theirs) < 1e-5


@pytest.mark.parametrize("form", ["paper", "v2"])
def test_two_ranks_are_one_that_accumulates(
    form: str, frames: Path, two: list[dict[Any, Any]], tmp_path: Path
) -> None:
    unit = make_unit(tmp_path, form, accumulate=2)
    data = batches(frames / "frames", GROUPS)
    assert largest(two[0]["gradient", form], gradient(unit, data[:2])) < 1e-5
    assert largest(two[0]["four", form], gradient(unit, data[:4])) < 1e-5
    denoised = make_unit(tmp_path, form, accumulate=2, denoising=DENOISING)
    noisy = corrupted(batches(frames / "frames", GROUPS))
    assert largest(two[0]["denoised", form], gradient(denoised, noisy[:4])) < 1e-5
    before = weights(unit)
    train(unit, [data[i : i + 2] for i in range(0, 2 * STEPS, 2)])
    moved = (weights(unit) - before).abs().max()
    difference = (two[0]["plain", form] - weights(unit)).abs().max()
    assert difference < 1e-4 * moved
    assert torch.equal(two[0]["plain", form], two[1]["plain", form])


def test_sharded_training_is_the_plain_one(two: list[dict[Any, Any]]) -> None:
    for found in two:
        assert largest(found["sharded", "v2"], found["plain", "v2"]) < 1e-7
        assert largest(found["muon", True], found["muon", False]) < 1e-6
        assert found["bytes", "sharded"] < 0.55 * found["bytes", "plain"]
    held = [found["bytes", "sharded"] for found in two]
    assert sum(held) == two[0]["bytes", "plain"]


def test_sharded_state_goes_to_any_number_of_ranks(
    frames: Path, two: list[dict[Any, Any]], tmp_path: Path
) -> None:
    """Saved by two ranks; loaded by two that share, and by one that does not."""
    for found in two:
        assert largest(found["one more after plain"], found["one more"]) < 1e-7
        assert found["bytes", "loaded"] == found["bytes", "sharded"]
    unit = make_unit(tmp_path, "v2", accumulate=2)
    unit._execute_load_state(str(frames / "sharded"))
    assert torch.equal(weights(unit), two[0]["sharded", "v2"])
    assert unit.train_progress.num_steps_completed == STEPS
    before = weights(unit)
    train(unit, [batches(frames / "frames", GROUPS[:2])])
    moved = (weights(unit) - before).abs().max()
    assert (weights(unit) - two[0]["one more"]).abs().max() < 1e-4 * moved
    loaded = torch.load(frames / "sharded" / "inference_ckpt.pt", weights_only=False)
    assert loaded.model_state_dict.keys() == unit.state_dict()["model"].keys()


def test_two_ranks_survive_an_overflow_together(two: list[dict[Any, Any]]) -> None:
    for found in two:
        assert found["overflow"] == (True, 2.0**119)
        assert found["after overflow"][1] == 2.0**4
    after = [found["after overflow"][0] for found in two]
    assert torch.equal(*after)
    assert after[0].isfinite().all()


def by_numpy(folder: Path, table: dict[float, dict[str, np.ndarray]]) -> dict[str, float]:
    """The metrics by their definitions, from labels and predictions per structure."""
    energy, per_atom, force, cosine, magnitude, stress, within = [], [], [], [], [], [], []
    for atoms in stored(folder / "frames"):
        label = atoms.get_potential_energy()  # whole in float64; fairchem's is float32
        said = table[float(np.float32(label))]
        error = said["energy"] - label
        energy.append(abs(error))
        per_atom.append(abs(error) / len(atoms))
        labels = atoms.get_forces(apply_constraint=False).astype(np.float32).astype(float)
        labels, model = labels[free(atoms)], said["forces"][free(atoms)]
        force += list(np.abs(labels - model).ravel())
        norms = np.linalg.norm(labels, axis=1), np.linalg.norm(model, axis=1)
        cosine += list((labels * model).sum(1) / norms[0] / norms[1])
        magnitude += list(np.abs(norms[0] - norms[1]))
        tensor = atoms.get_stress(voigt=False).astype(np.float32)
        stress += list(np.abs(tensor - said["stress"]).ravel())
        if len(labels):
            within.append(abs(error) < 0.02 and np.abs(labels - model).max() < 0.03)
    assert 0 < np.mean(within) < 1
    return {
        "energy,mae": np.mean(energy),
        "energy,per_atom_mae": np.mean(per_atom),
        "forces,mae": np.mean(force),
        "forces,cosine_similarity": np.mean(cosine),
        "forces,magnitude_error": np.mean(magnitude),
        "stress,mae": np.mean(stress),
        "efwt": np.mean(within),
    }


@pytest.mark.parametrize("max_atoms", [20, 10_000])
@pytest.mark.parametrize("n_ranks", [1, 2])
def test_metrics_against_numpy(
    n_ranks: int, max_atoms: int, frames: Path, table: Any, request: pytest.FixtureRequest
) -> None:
    expected = by_numpy(frames, table)
    if n_ranks == 1:
        found = [evaluate(Answers(table), frames, max_atoms, make_tasks(stress=True))]
    else:
        found = [rank["metrics", max_atoms] for rank in request.getfixturevalue("two")]
    for metrics in found:
        for name, value in expected.items():
            assert metrics[f"val/cu.val,{name}"] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_loss_of_the_set_does_not_depend_on_batches_or_ranks(
    frames: Path, table: Any, two: list[dict[Any, Any]]
) -> None:
    """And it is fairchem's, of all frames in one batch."""
    (batch,) = batches(frames / "frames", [list(range(11))], stress=True)
    model = Answers(table)
    predictions = {
        name: {key: value.float() for key, value in task.items()}
        for name, task in model(batch).items()
    }
    with torch.no_grad():
        losses = mlip_unit.compute_loss(make_tasks(stress=True), predictions, batch)
    expected = float(sum(losses.values()))
    losses = [rank["metrics", size]["val/loss"] for rank in two for size in (20, 10_000)]
    losses.append(evaluate(model, frames, 20, make_tasks(stress=True))["val/loss"])
    assert losses == pytest.approx([expected] * 5, rel=1e-5)


def test_nan_predictions_are_told_and_are_not_within_threshold(frames: Path, table: Any) -> None:
    before = evaluate(Answers(table), frames, 20, make_tasks(stress=True))
    spoilt = {**table}
    key = float(np.float32(stored(frames / "frames")[2].get_potential_energy()))
    spoilt[key] = {**table[key], "forces": np.full_like(table[key]["forces"], np.nan)}
    after = evaluate(Answers(spoilt), frames, 20, make_tasks(stress=True))
    assert np.isnan(after["val/cu.val,forces,mae"])
    assert np.isnan(after["val/loss"])
    assert after["val/cu.val,energy,mae"] == before["val/cu.val,energy,mae"]
    # frame 2 was within; ten frames have free atoms
    drop = before["val/cu.val,efwt"] - after["val/cu.val,efwt"]
    assert drop == pytest.approx(0.1)


def test_structures_without_labels_are_not_counted(frames: Path, table: Any) -> None:
    (batch,) = batches(frames / "frames", [[2, 4, 6, 0]])
    energy, forces = make_tasks()
    said = Answers(table)(batch)
    within, counted = within_threshold(energy, forces, said, batch, "cu.val")
    assert within.tolist() == [True, False, True, False]
    assert counted.tolist() == [True, True, True, False]  # frame 0 has no free atom
    batch.forces[1] = np.nan  # of a free atom of the first structure
    within, counted = within_threshold(energy, forces, said, batch, "cu.val")
    assert within.tolist() == [False, False, True, False]
    assert counted.tolist() == [False, True, True, False]


def test_fp16_overflow_leaves_everything_as_it_was(frames: Path, tmp_path: Path) -> None:
    unit = make_unit(tmp_path, fp16=True)
    data = batches(frames / "frames", [[1, 2, 3]])
    train(unit, [data])
    average = [p.clone() for p in unit.ema_model.parameters()]
    before, rate, scale = weights(unit), unit.scheduler.get_last_lr(), 2.0**120
    state = {
        key: value.clone()
        for key, value in unit.optimizer.state[next(unit.model.parameters())].items()
    }
    unit.scaler.load_state_dict({**unit.scaler.state_dict(), "scale": scale})
    train(unit, [data])
    assert unit.scaler.get_scale() == scale / 2
    assert torch.equal(weights(unit), before)
    assert unit.scheduler.get_last_lr() == rate
    assert all(
        torch.equal(*pair) for pair in zip(average, unit.ema_model.parameters(), strict=True)
    )
    now = unit.optimizer.state[next(unit.model.parameters())]
    assert all(torch.equal(state[key], now[key]) for key in state)
    assert unit.train_progress.num_steps_completed == 2
    unit.scaler.load_state_dict({**unit.scaler.state_dict(), "scale": 16.0})
    train(unit, [data])
    assert not torch.equal(weights(unit), before)
    assert weights(unit).isfinite().all()


def test_fp16_gradient_points_where_that_of_float32_does(frames: Path, tmp_path: Path) -> None:
    data = batches(frames / "frames", [[1, 2, 3]])
    exact = gradient(make_unit(tmp_path), data)
    unit = make_unit(tmp_path, fp16=True)
    unit.scaler.load_state_dict({**unit.scaler.state_dict(), "scale": 16.0})
    half = gradient(unit, data) / 16.0
    assert torch.nn.functional.cosine_similarity(exact, half, dim=0) > 0.999
    assert float(half.norm() / exact.norm()) == pytest.approx(1, abs=0.02)


def test_loss_scale_is_saved_and_not_needed(frames: Path, tmp_path: Path) -> None:
    unit = make_unit(tmp_path, fp16=True, save_inference_ckpt=False)
    unit.scaler.load_state_dict({**unit.scaler.state_dict(), "scale": 8.0})
    unit.save_state(str(tmp_path / "half"))
    make_unit(tmp_path, save_inference_ckpt=False).save_state(str(tmp_path / "full"))
    again = make_unit(tmp_path, fp16=True)
    again._execute_load_state(str(tmp_path / "half"))
    assert again.scaler.get_scale() == 8.0
    make_unit(tmp_path)._execute_load_state(str(tmp_path / "half"))
    fresh = make_unit(tmp_path, fp16=True)
    fresh._execute_load_state(str(tmp_path / "full"))
    assert fresh.scaler.get_scale() == 2.0**16


def test_hopeless_fp16_stops_with_a_line(frames: Path, tmp_path: Path) -> None:
    unit = make_unit(tmp_path, fp16=True)
    next(unit.model.parameters()).data.fill_(torch.nan)
    unit.scaler.load_state_dict({**unit.scaler.state_dict(), "scale": 1e-6})
    with pytest.raises(UserError, match="fp16"):
        train(unit, [batches(frames / "frames", [[1]])])


@pytest.mark.parametrize("settings, bound", [({"bf16": True}, 2e-2), ({"fp16": True}, 3e-3)])
@pytest.mark.parametrize("preset", ["paper", "v2"])
def test_evaluation_in_reduced_precision(
    preset: str, settings: dict[str, bool], bound: float, frames: Path
) -> None:
    """Relative to the errors of an untrained model, all of which are of the size of the labels."""
    model = small_model(preset)
    exact = evaluate(model, frames, 40, make_tasks())
    reduced = evaluate(model, frames, 40, make_tasks(), **settings)
    for name in ("val/cu.val,energy,mae", "val/cu.val,forces,mae"):
        assert reduced[name] != exact[name], "not in reduced precision"
        assert reduced[name] == pytest.approx(exact[name], rel=bound)


def test_settings_that_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bf16 and fp16"):
        make_unit(tmp_path, bf16=True, fp16=True)
    with pytest.raises(UserError, match="accumulate"):
        make_unit(tmp_path, accumulate=0)
    with pytest.raises(UserError, match="shard_optimizer"):
        make_unit(tmp_path, train_strategy="fsdp")


def test_epoch_of_another_length_goes_on_at_the_same_part(tmp_path: Path) -> None:
    unit = make_unit(tmp_path)
    for _ in range(10):
        unit.train_progress.increment_step()
    state = unit.state_dict()
    other = make_unit(tmp_path, accumulate=3)
    other.load_scheduler(20)
    other.load_state_dict(state)
    assert other.train_progress.num_steps_completed == 10
    assert other.train_progress.num_steps_completed_in_epoch == 3


def run(config: Any) -> None:
    """What fairchem's command does after composing, in this process."""
    job, parts = config.job, {**config.runner}
    Path(job.metadata.config_path).parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, job.metadata.config_path)
    parts.pop("_target_"), parts.pop("_recursive_")
    runner = TrainEvalRunner(**parts)
    runner.job_config = job
    torch.manual_seed(0)
    runner.load_state(None)
    runner.run()


@pytest.mark.parametrize(
    "recipe", sorted(RECIPES.glob("*/escaip_*.yml")), ids=lambda path: path.stem
)
def test_recipes_have_the_settings_and_they_are_off(recipe: Path) -> None:
    unit = get_hydra_config_from_yaml(str(recipe), []).runner.train_eval_unit
    assert (unit.accumulate, unit.fp16, unit.shard_optimizer) == (1, False, False)


def test_resumed_in_the_middle_of_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten batches by threes: every frame once an epoch, the last step with the one left over."""
    monkeypatch.setenv("ESCAIP_DATA", str(tmp_path / "data"))
    make_sample("oc20", tmp_path / "data" / "oc20" / "sample", n_frames=12)
    recipe = RECIPES / "oc20" / "escaip_2m.yml"
    config = get_hydra_config_from_yaml(
        str(recipe),
        ["cluster=cpu", "backbone=tiny", "dataset=sample", "steps=6", "epochs=null", "accumulate=3",
         "max_atoms=38", "checkpoint_every_n_steps=3", f"job.run_dir={tmp_path}",
         "job.timestamp_id=run"],
    )  # fmt: skip
    seen = []
    step = TrainEvalUnit.train_step

    def spy(unit: Any, state: Any, data: list[Any]) -> None:
        seen.append([energy for batch in data for energy in batch.energy.tolist()])
        sizes.append(len(data))
        step(unit, state, data)

    sizes: list[int] = []
    monkeypatch.setattr(TrainEvalUnit, "train_step", spy)
    run(config)
    assert sizes == [3, 3, 3, 1, 3, 3]
    labels = [
        np.float32(a.get_potential_energy()) for a in stored(tmp_path / "data/oc20/sample/train")
    ]
    assert sorted(energy for step in seen[:4] for energy in step) == sorted(labels)
    final = tmp_path / "run" / "checkpoints" / "final"
    undisturbed = torch.load(final / "inference_ckpt.pt", weights_only=False)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert rows[-1]["samples"] == sum(map(len, seen))
    shutil.rmtree(final)
    run(config)
    assert sizes[6:] == [1, 3, 3], "from step 3 on"
    assert seen[6:] == seen[3:6]
    resumed = torch.load(final / "inference_ckpt.pt", weights_only=False)
    for name, tensor in undisturbed.ema_state_dict.items():
        assert torch.equal(tensor, resumed.ema_state_dict[name]), name
    again = read_metrics(tmp_path / "run" / "metrics.csv")
    for name in ("lr", "samples"):
        assert [row[name] for row in again] == [row[name] for row in rows]
    assert again[-1]["val_efwt"] == rows[-1]["val_efwt"]
