"""``escaip bench accuracy``: equal terms, and trainings that go on whatever fails."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ase.io import write

from data_helpers import labelled_atoms
from escaip_fairchem import UserError
from escaip_fairchem.bench.accuracy import options as accuracy
from escaip_fairchem.bench.accuracy import plan, run
from escaip_fairchem.bench.accuracy.options import MODELS, Options
from escaip_fairchem.bench.accuracy.results import Outcome, tables, write_tables
from escaip_fairchem.bench.report import environment
from escaip_fairchem.cli import main
from escaip_fairchem.data.convert import SplitOptions, convert
from escaip_fairchem.sweep import local
from escaip_fairchem.sweep.store import load_sweep
from escaip_fairchem.train.runner import instantiate
from fork_runs import points_in_forks

RECIPE = Path(__file__).parents[1] / "configs/oc20/escaip_few_frames.yml"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 frames of 8 atoms, 5 of them for validation."""
    folder = tmp_path_factory.mktemp("frames")
    write(folder / "frames.extxyz", labelled_atoms(20))
    split = SplitOptions(val_fraction=0.25)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("ESCAIP_DATA", str(folder))
        convert([str(folder / "frames.extxyz")], folder / "set", split=split, check_units=False)
    return folder / "set"


def options(out: Path, data: Path, **changes: Any) -> Options:
    return Options(
        **{"out": out, "data": str(data), "recipe": RECIPE, "samples": 40, "evaluations": 4}
        | changes
    )


# the plan


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--minutes", "0"], "--minutes is 0"),
        (["--samples", "5", "--models", "escaip,mace"], "'mace' is not one of escaip"),
        (["--samples", "5", "--models", "esen,esen"], "each once"),
        (["--samples", "5", "--set", "lr"], "MODEL:KEY=VALUE"),
        (["--samples", "5", "--recipe", "no.yml"], "no recipe at no.yml"),
        (["--samples", "5", "--data", "nowhere"], "nowhere"),
        (["--samples", "5", "--set", "backbone.maxneighbors=3"], "maxneighbors"),
    ],
)
def test_mistakes_are_told_before_anything_runs(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(local.subprocess, "Popen", None)
    given = ["--recipe", str(RECIPE)] if "--recipe" not in arguments else []
    out = ["--out", str(tmp_path / "out"), "--models", "escaip"]
    assert main(["bench", "accuracy", *out, *given, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("escaip: error: ")
    assert message in line


@pytest.fixture(scope="module")
def planned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Options, dict[str, Any]]:
    """The command line and the resolved configurations of all models."""
    settings = ("escaip:lr=7e-3", "optim.clip_grad_norm=3")
    given = options(tmp_path_factory.mktemp("out"), data, settings=settings)
    sweep = plan.make_plan(given)
    read = {name: yaml.safe_load(sweep.config(f"{name}-0").read_text()) for name in MODELS}
    return given, read


def test_only_model_and_optimizer_differ(planned, data):
    _, configs = planned
    parts = {}
    for name, config in configs.items():
        runner = config["runner"]
        unit = runner["train_eval_unit"]
        model, optimizer = unit.pop("model"), unit.pop("optimizer_fn")
        parts[name] = (model, optimizer)
        unit.pop("job_config")
        assert unit["clip_grad_norm"] == 3
        assert unit["cosine_lr_scheduler_fn"]["_target_"].endswith("BudgetSchedule")
        assert runner["train_dataloader"]["dataset"]["src"] == str(data / "train")
    escaip = configs["escaip"]["runner"]
    assert all(config["runner"] == escaip for config in configs.values())
    assert float(parts["escaip"][1]["lr"]) == 7e-3
    assert parts["escaip"][1]["_target_"].endswith("Muon")
    assert {parts[name][1]["_target_"] for name in parts if name != "escaip"} == {
        "torch.optim.AdamW"
    }
    own = [parts[name][0]["backbone"] for name in ("escaip", "escaip_adamw")]
    assert own[0] | {"init": "published"} == own[1]


def test_models_train_on_the_same_batches(planned):
    """Each is built as the training builds it, and its weights get gradients."""
    _, configs = planned
    loader = instantiate(configs["escaip"]["runner"]["train_dataloader"])
    batch = next(iter(loader))
    for name in MODELS:
        config = yaml.safe_load((planned[0].out / "configs" / f"{name}-0.yaml").read_text())
        model = instantiate(config["runner"]["train_eval_unit"]["model"])
        predicted = model(batch.clone())
        energy, forces = predicted["energy"]["energy"], predicted["forces"]["forces"]
        assert energy.numel() == len(batch.natoms)
        assert forces.shape == batch.pos.shape
        (energy.sum() + forces.square().sum()).backward()
        sizes = [(p.numel(), p.grad is not None) for p in model.parameters()]
        learning = sum(size for size, has in sizes if has) / sum(size for size, _ in sizes)
        assert learning == 1 if name != "esen" else learning > 0.9  # eSEN has idle weights


def test_the_builtin_gets_as_many_slots_as_it_needs(planned, data):
    """One fewer, and it fails on these data; so its speed is the best it can have."""
    config = yaml.safe_load((planned[0].out / "configs" / "builtin-0.yaml").read_text())["runner"]
    backbone = config["train_eval_unit"]["model"]["backbone"]
    loaders = [instantiate(config[f"{kind}_dataloader"]) for kind in ("train", "eval")]
    for fewer in (0, 1):
        slots = backbone["knn_pad_size"] - fewer
        changed = config["train_eval_unit"]["model"] | {
            "backbone": backbone | {"knn_pad_size": slots}
        }
        model = instantiate(changed)
        batches = [batch for loader in loaders for batch in loader]
        if fewer:
            with pytest.raises((IndexError, RuntimeError)):
                [model(batch) for batch in batches]
        else:
            assert all("energy" in model(batch) for batch in batches)


def test_a_folder_keeps_its_settings(planned, data):
    given, _ = planned
    with pytest.raises(UserError, match=r"escaip-0: .*lr.*give another --out"):
        plan.make_plan(options(given.out, data, settings=("optim.clip_grad_norm=3",)))


def test_domains_say_what_is_periodic():
    given = Options(Path("out"), samples=1, domain="spice")
    assert "backbone.use_pbc=false" in given.overrides("builtin", 0)
    assert "backbone.always_use_pbc=false" in given.overrides("esen", 0)
    assert set(accuracy.DOMAINS) == {"oc20", "mptrj", "spice", "rmd17"}


# the trainings


def argv(out: Path, data: Path, *more: str) -> list[str]:
    return [
        "bench", "accuracy", "--out", str(out), "--data", str(data), "--recipe", str(RECIPE),
        "--samples", "40", "--evaluations", "2", *more,
    ]  # fmt: skip


def test_a_training_by_the_command(tmp_path, data, capsys):
    """Two passes and a bit over 15 structures of 8 atoms, in batches of at most 40 atoms."""
    command = argv(tmp_path / "out", data, "--models", "escaip", "--set", "max_atoms=40")
    with points_in_forks():
        assert main(command) == 0
    assert "escaip-0: finished at step" in capsys.readouterr().out
    with (tmp_path / "out" / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["samples"]) for row in rows] == [20, 40]
    folder = tmp_path / "out" / "points" / "escaip-0"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metrics"]["val_forces_mae"]["last"] == float(rows[-1]["val_forces_mae"])
    with (tmp_path / "out" / "trainings.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["model"], row["state"], row["torch"]) == ("escaip", "finished", torch.__version__)
    assert int(row["parameters"]) == summary["parameters"]
    assert row["hardware"]
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    with (folder / "metrics.csv").open(newline="") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    # of the first group, AdamW's of the recipe; the schedule ended with the budget
    assert rates[-1] == pytest.approx(0.01 * 5e-4)
    written = (folder / "metrics.csv").stat().st_mtime_ns
    assert main(command) == 0
    assert "1 of 1 had finished" in capsys.readouterr().out
    assert (folder / "metrics.csv").stat().st_mtime_ns == written


_PRETENDER = """
import json, pathlib, sys, yaml
job = yaml.safe_load(open(sys.argv[-1]))["job"]
run = pathlib.Path(job["run_dir"], job["timestamp_id"])
failing = run.name.startswith(FAILING)
status = {"state": "failed" if failing else "finished", "step": 3, "reason": "it burst"}
(run / "status.json").write_text(json.dumps(status))
print("out of luck")
if failing:
    sys.exit(1)
error = 0.25 if run.name == "esen-0" else 0.5
head = "step,used,seconds,samples,val_energy_mae,val_forces_mae,val_forces_cosine_similarity\\n"
rows = [f"{i},{i / 4},{i * 3},{i * 10},{2 * error},{error},0.5\\n" for i in (1, 2, 3, 4)]
(run / "curve.csv").write_text(head + "".join(rows))
metrics = {"val_energy_mae": {"baseline": 2.0}, "val_forces_mae": {"baseline": 1.0}}
versions = {"torch": "2", "git_commit": "abc"}
summary = {"parameters": 12345, "metrics": metrics, "versions": versions, "epochs": 1}
(run / "summary.json").write_text(json.dumps(summary))
"""


def test_a_model_that_fails_stops_none_of_the_others(planned, capsys, monkeypatch):
    """Trainings by a program that pretends to be fairchem; the second call trains what is left."""
    given, _ = planned
    monkeypatch.setattr(run, "make_plan", lambda options: load_sweep(options.out))

    def pretend(failing: str) -> None:
        program = _PRETENDER.replace("FAILING", repr(failing))
        monkeypatch.setattr(local, "fairchem_command", lambda: [sys.executable, "-c", program])

    pretend("builtin")
    with pytest.raises(UserError, match=r"^builtin-0 did not finish"):
        run.run(given)
    printed = capsys.readouterr().out
    assert "| EScAIP built into fairchem | builtin-0: failed: it burst |" in printed
    assert "0.25, 0.25 of baseline | 0.5 |" in printed
    with (given.out / "trainings.csv").open(newline="") as file:
        states = {row["model"]: row["state"] for row in csv.DictReader(file)}
    finished = dict.fromkeys(MODELS, "finished")
    assert states == finished | {"builtin": "failed"}
    pretend("none")
    run.run(given)
    printed = capsys.readouterr().out
    assert "3 of 4 had finished" in printed
    assert "builtin-0: finished" in printed
    assert "esen-0: started" not in printed
    assert "failed" not in (given.out / "tables.md").read_text()


def test_models_are_compared_where_the_first_of_them_ends():
    def outcome(model: str, end: int, seed: int = 0) -> Outcome:
        curve = [
            {"step": i, "seconds": 10.0 * i, "samples": end * i / 4, "val_energy_mae": 5.0 - i,
             "val_forces_mae": 1.0 / i + seed, "val_forces_cosine_similarity": 0.1 * i}
            for i in (1, 2, 3, 4)
        ]  # fmt: skip
        metrics = {name: {"baseline": 4.0} for name in ("val_energy_mae", "val_forces_mae")}
        summary = {"parameters": 7, "metrics": metrics}
        return Outcome(f"{model}-{seed}", model, seed, "finished", curve=curve, summary=summary)

    fast, slow = outcome("escaip", 400), outcome("esen", 150)
    assert fast.at("samples", 150)["val_energy_mae"] == pytest.approx(3.5)
    assert fast.at("samples", 150)["val_forces_mae"] == pytest.approx(0.75)
    assert fast.at("samples", 99) is fast.at("samples", 401) is None
    text = tables([fast, slow])
    assert "At structures seen 150" in text
    assert "At training time" not in text  # which is the same for both
    line = "7 | 2 | 150 | 15 | 3.5, 0.88 of baseline | 0.75, 0.19 of baseline | 0.15 |"
    assert f"| EScAIP, recipe as shipped | {line}" in text
    assert "not evaluated yet" in tables([fast, outcome("esen", 90)])
    assert "| 0.75 (0.25 to 1.25), 0.19 of baseline |" in tables([fast, outcome("escaip", 400, 1)])


def test_hardware_is_that_of_the_run(tmp_path):
    devices = ["NVIDIA H100", "cpu, 2 threads a rank"]
    write_tables(
        [Outcome(d, "escaip", 0, "failed", summary={"device": d}) for d in devices], tmp_path
    )
    with (tmp_path / "trainings.csv").open(newline="") as file:
        found = [row["hardware"] for row in csv.DictReader(file)]
    assert found == ["NVIDIA H100", environment("cpu")["hardware"]]


@pytest.mark.full
def test_a_killed_training_goes_on(tmp_path, data):
    """kill -9 behind the first checkpoint, and the same command."""
    out = tmp_path / "out"
    more = ["--models", "escaip", "--set", "max_atoms=40", "--samples", "4000"]
    command = [shutil.which("escaip") or "escaip", *argv(out, data, *more)]
    folder = out / "points" / "escaip-0"
    with subprocess.Popen(command) as process:
        while not list(folder.glob("checkpoints/step_[1-9]*")):
            assert process.poll() is None
        status = json.loads((folder / "status.json").read_text())
        subprocess.run(["kill", "-9", str(status["pid"])], check=True)
        process.wait()
    assert len(list(csv.DictReader((folder / "curve.csv").open()))) == 1
    assert main(argv(out, data, *more)) == 0
    rows = list(csv.DictReader((folder / "curve.csv").open()))
    assert [int(row["samples"]) for row in rows] == [2000, 4000]
    assert json.loads((folder / "status.json").read_text())["restarts"] == 1
