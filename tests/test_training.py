"""Training by the `fairchem` command: one run shared by the tests, its resumption, its mistakes."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from escaip_fairchem.errors import UserError
from escaip_fairchem.train.averaging import ema_decay_at, warmed_up_average
from escaip_fairchem.train.callbacks import column_names, read_metrics
from escaip_fairchem.train.runner import share_cores
from fork_runs import launch

if TYPE_CHECKING:
    import subprocess

    from escaip_fairchem.train.parity import Parity

RECIPE = Path(__file__).parents[1] / "configs" / "oc20" / "escaip_2m.yml"
SMALL = ["cluster=cpu", "backbone=tiny", "dataset=sample"]

STEPS, CHECKPOINT = 30, 20
COMMAND = (
    "recipe.yml", *SMALL, f"steps={STEPS}", "epochs=null", "lr=1e-3", "max_atoms=120",
    f"checkpoint_every_n_steps={CHECKPOINT}", "job.timestamp_id=one",
)  # fmt: skip


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small sample and a copy of the recipe."""
    from escaip_fairchem.data.sample import make_sample

    folder = tmp_path_factory.mktemp("workplace")
    make_sample("oc20", folder / "data" / "oc20" / "sample", n_frames=48)
    shutil.copy(RECIPE, folder / "recipe.yml")
    return folder


@pytest.fixture(scope="module")
def trained(workplace: Path) -> tuple[Path, str]:
    """Folder and output of a finished run; its `final` is kept as `undisturbed`."""
    done = launch(workplace, *COMMAND)
    assert done.returncode == 0, done.stderr[-3000:]
    run = workplace / "runs" / "one"
    shutil.copytree(run / "checkpoints" / "final", run / "undisturbed")
    return run, done.stdout


@pytest.fixture(scope="module")
def parity(trained: tuple[Path, str], workplace: Path) -> Parity:
    from omegaconf import OmegaConf

    from escaip_fairchem.train.parity import evaluate

    run, _ = trained
    config = OmegaConf.load(run / "canonical_config.yaml")
    config.runner.eval_dataloader.dataset.src = str(workplace / "data" / "oc20" / "sample" / "val")
    return evaluate(config, run / "undisturbed" / "inference_ckpt.pt")


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    # Written by the run above; fairchem's checkpoint holds its own classes.
    return torch.load(checkpoint / "inference_ckpt.pt", weights_only=False).ema_state_dict


def test_loss_falls_below_its_start(trained: tuple[Path, str]) -> None:
    losses = [
        row["train_loss"] for row in read_metrics(trained[0] / "metrics.csv") if "train_loss" in row
    ]
    assert losses[-1] < 0.5 * losses[0]


def test_files_of_a_run(trained: tuple[Path, str]) -> None:
    run, output = trained
    with (run / "metrics.csv").open() as file:
        header = next(csv.reader(file))
    assert header[:5] == ["step", "epoch", "lr", "wall_time_s", "train_loss"]
    assert {"val_loss", "val_energy_mae", "val_forces_mae", "val_forces_cosine_similarity"} <= set(
        header
    )
    assert (run / "checkpoints" / "final" / "resume.yaml").exists()
    assert f"validation after {STEPS} steps" in output
    assert "val_forces_mae" in output


def test_checkpoint_gives_the_errors_of_the_training(
    trained: tuple[Path, str], parity: Parity
) -> None:
    last = [row for row in read_metrics(trained[0] / "metrics.csv") if "val_loss" in row][-1]
    errors = parity.errors()
    assert errors["energy MAE, eV"][0] == pytest.approx(last["val_energy_mae"], rel=1e-3)
    assert errors["force MAE, eV/A"][0] == pytest.approx(last["val_forces_mae"], rel=1e-3)


def test_baselines_are_those_of_the_labels(workplace: Path, parity: Parity) -> None:
    from ase.db import connect

    shard = workplace / "data" / "oc20" / "sample" / "val" / "data.0000.aselmdb"
    with connect(shard, type="aselmdb", readonly=True, use_lock_file=False) as database:
        rows = list(database.select())
    frames = [row.toatoms() for row in rows]
    forces = np.concatenate(
        [atoms.get_forces(apply_constraint=False)[atoms.get_tags() > 0] for atoms in frames]
    )
    assert parity.errors()["force MAE, eV/A"][1] == pytest.approx(np.abs(forces).mean(), rel=1e-5)
    labels = [atoms.get_potential_energy() for atoms in frames]
    assert np.allclose(np.sort(parity.energy), np.sort(labels), rtol=1e-6)
    names = [f"{row.data['sid']}-frame-{row.data['fid']}" for row in rows]
    assert sorted(parity.names) == sorted(names)


def test_plot(trained: tuple[Path, str], workplace: Path, monkeypatch, capsys) -> None:
    from escaip_fairchem.train.plot import plot_run

    monkeypatch.chdir(workplace)
    monkeypatch.setenv("ESCAIP_DATA", "data")
    figures = [path for path in plot_run(trained[0]) if path.suffix == ".png"]
    assert {"learning_curve.png", "parity.png"} <= {path.name for path in figures}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures)
    assert "baseline" in capsys.readouterr().out


def test_plot_of_something_else(tmp_path: Path) -> None:
    from escaip_fairchem.train.plot import plot_run

    with pytest.raises(UserError, match=r"job\.run_dir/job\.timestamp_id"):
        plot_run(tmp_path)


@pytest.mark.parametrize("by", ["same command", "resume.yaml"])
def test_resumed_run_ends_at_the_same_weights(
    by: str, trained: tuple[Path, str], workplace: Path
) -> None:
    run, _ = trained
    shutil.rmtree(run / "checkpoints" / "final")
    checkpoint = run / "checkpoints" / f"step_{CHECKPOINT}"
    done = launch(workplace, *(COMMAND if by == "same command" else [checkpoint / by]))
    assert done.returncode == 0, done.stderr[-3000:]
    # from the checkpoint, not from the start
    assert str(checkpoint) in done.stdout + done.stderr
    resumed, undisturbed = weights(run / "checkpoints" / "final"), weights(run / "undisturbed")
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in resumed)
    steps = [row["step"] for row in read_metrics(run / "metrics.csv") if "train_loss" in row]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS


@pytest.mark.full  # on SLURM by every `make test-slurm`; ranks in test_unit, test_predict
def test_two_processes(workplace: Path) -> None:
    """On CPUs (gloo), with data-loader workers: both processes share the work, and end."""
    done = launch(
        workplace, "recipe.yml", *SMALL, "job.scheduler.ranks_per_node=2", "num_workers=1",
        "accumulate=2", "shard_optimizer=true", "steps=4", "epochs=null", "max_atoms=120",
        "job.timestamp_id=two",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    run = workplace / "runs" / "two"
    final = weights(run / "checkpoints" / "final")
    assert all(tensor.isfinite().all() for tensor in final.values())
    last = [row for row in read_metrics(run / "metrics.csv") if "val_loss" in row][-1]
    assert last["step"] == 4
    assert 0 <= last["val_efwt"] <= 1


def test_absent_data_is_the_last_line(workplace: Path) -> None:
    line = last_line(
        launch(workplace, "recipe.yml", "cluster=cpu", "backbone=tiny", "dataset=oc20_2m")
    )
    assert "UserError" in line
    assert str(workplace / "data" / "oc20_2m" / "train") in line
    assert "escaip convert" in line


def test_misspelt_model_key_is_the_last_line(workplace: Path) -> None:
    line = last_line(launch(workplace, "recipe.yml", *SMALL, "+backbone.hiden_size=64"))
    assert "UserError" in line
    assert "hidden_size" in line


def test_average_against_a_hand_made_loop() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=warmed_up_average(0.5))
    by_hand = None
    for step in range(20):
        with torch.no_grad():
            model.weight += torch.randn_like(model.weight)
        average.update_parameters(model)
        decay = min(0.5, (1 + step) / (10 + step))
        current = model.weight.detach().double()
        by_hand = current if by_hand is None else decay * by_hand + (1 - decay) * current
    assert torch.allclose(average.module.weight.double(), by_hand, atol=1e-6)


def test_average_forgets_the_start_of_a_short_run() -> None:
    kept = np.prod([ema_decay_at(step, 0.999) for step in range(1, 100)])
    assert kept < 1e-6 < 0.999**99
    assert ema_decay_at(10**6, 0.999) == 0.999


def test_average_needs_a_decay() -> None:
    from escaip_fairchem.train.unit import TrainEvalUnit

    with pytest.raises(UserError, match="ema_decay"):
        TrainEvalUnit(ema_decay=None)


def test_columns_of_several_data_sets() -> None:
    same_split = {"val/loss": 1.0, "val/a.val,energy,mae": 2.0, "val/b.val,energy,mae": 3.0}
    assert list(column_names(same_split)) == ["val_loss", "a.val_energy_mae", "b.val_energy_mae"]
    splits = {"val/loss": 1.0, "val/a.val_id,forces,mae": 2.0, "val/a.val_ood,forces,mae": 3.0}
    assert list(column_names(splits)) == ["val_loss", "val_id_forces_mae", "val_ood_forces_mae"]


@pytest.mark.parametrize("ranks, omp, expected", [("1", None, 8), ("3", None, 2), ("3", "8", 8)])
def test_ranks_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, ranks: str, omp: str | None, expected: int
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    try:
        torch.set_num_threads(8)
        share_cores()
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(threads)
