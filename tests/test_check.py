"""`escaip check`: every message from a recipe broken that way; estimates against measurements."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ase.io import write
from omegaconf import OmegaConf

from data_helpers import labelled_atoms
from escaip_fairchem.check import place
from escaip_fairchem.check.batches import make_batches
from escaip_fairchem.check.data import check_splits, open_splits
from escaip_fairchem.check.devices import find_device
from escaip_fairchem.check.estimate import activation_bytes, estimate_memory, estimate_time
from escaip_fairchem.check.report import Report
from escaip_fairchem.check.run import Options, check
from escaip_fairchem.check.step import Cost, Sample
from escaip_fairchem.cli import main
from escaip_fairchem.data.convert import SplitOptions, convert
from escaip_fairchem.errors import UserError
from escaip_fairchem.train.lock import RunLock
from escaip_fairchem.train.status import RunStatus, write_status

RECIPE = Path(__file__).parents[1] / "configs" / "oc20" / "escaip_2m.yml"
SMALL = ("cluster=cpu", "backbone=tiny", "max_atoms=60")
GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copper of 8 atoms, 30 frames of it for training, 10 for validation; the data set `mine`."""
    root = tmp_path_factory.mktemp("check")
    write(root / "frames.extxyz", labelled_atoms(40))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("ESCAIP_DATA", str(root / "data"))
        split = SplitOptions(val_fraction=0.25)
        convert([str(root / "frames.extxyz")], root / "data" / "mine", split=split)
    return root


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ESCAIP_DATA", str(folder / "data"))


@pytest.fixture(scope="module")
def checked(folder: Path) -> Report:
    """The report of a recipe without a problem."""
    report = Report()
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESCAIP_DATA", str(folder / "data"))
        check(RECIPE, [*SMALL, "dataset=mine", "job.timestamp_id=fine"], Options(), report)
    return report


def problems(report: Report) -> str:
    return "\n".join(map(str, report.problems))


def config(**changes: Any) -> Any:
    """What the checks read of a composed recipe; changes by dotted names."""
    made = OmegaConf.create(
        {
            "job": {
                "run_dir": "runs",
                "timestamp_id": "t",
                "device_type": "cpu",
                "scheduler": {
                    "mode": "local",
                    "ranks_per_node": 1,
                    "num_nodes": 1,
                    "slurm": {
                        "mem_gb": 8, "timeout_hr": 4, "cpus_per_task": 2, "partition": None,
                        "additional_parameters": None,
                    },
                },
            },
            "runner": {
                "max_steps": 100,
                "max_epochs": None,
                "evaluate_every_n_steps": 50,
                "train_dataloader": {"num_workers": 0},
                "train_eval_unit": {"tf32": False},
                "callbacks": [{"checkpoint_every_n_steps": 25, "max_saved_checkpoints": 2}],
            },
        }
    )  # fmt: skip
    for key, value in changes.items():
        OmegaConf.update(made, key.replace("__", "."), value)
    return made


def test_a_recipe_without_a_problem(checked: Report) -> None:
    assert not problems(checked)
    assert checked.values["train"] == {"structures": 30, "atoms": 240}
    assert checked.values["batches"]["number"] == 5  # of 7 frames
    assert checked.values["batches"]["largest"] == 56
    assert checked.values["time"]["steps"] == 5 * 30
    assert checked.values["step"]["parameters_without_gradient"] == []
    assert json.loads(json.dumps(checked.as_dict()))["ok"]


def test_parameters_are_those_of_the_model(checked: Report) -> None:
    from fairchem.core._cli import get_hydra_config_from_yaml

    from escaip_fairchem.train.runner import instantiate

    composed = get_hydra_config_from_yaml(str(RECIPE), [*SMALL, "dataset=mine"])
    model = instantiate(composed.runner.train_eval_unit.model)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert checked.values["model"]["parameters"] == total
    assert sum(checked.values["model"]["parts"].values()) == total
    # weights, gradients, average, two moments of AdamW
    assert checked.values["memory"]["resident"] == pytest.approx(5 * 4 * total, rel=1e-3)


def test_the_baseline_is_that_of_the_labels(checked: Report, folder: Path) -> None:
    """By hand from the definition: 4 x |E - E_ref| + 100 x |F| of free atoms, scaled."""
    from data_helpers import stored

    frames = stored(folder / "data" / "mine" / "train")
    loss = checked.values["step"]["baseline_loss"]
    group = OmegaConf.load(folder / "data" / "configs" / "dataset" / "mine.yaml")
    references = np.array(group.element_refs.energy)
    energies, forces = [], []
    for atoms in frames:
        energies.append(abs(atoms.get_potential_energy() - references[atoms.numbers].sum()))
        forces += list(np.linalg.norm(atoms.get_forces(apply_constraint=False)[1:], axis=1))
    scale = group.normalizer.rmsd
    bounds = [
        4 * pick(energies) / scale + 100 * pick(forces) / scale for pick in (np.min, np.max)
    ]  # the step takes some of the frames
    assert bounds[0] < loss < bounds[1]


def test_all_problems_at_once_and_the_exit_code(folder: Path, capsys) -> None:
    arguments = [str(RECIPE), "cluster=cpu", "backbone=tiny", "dataset=oc20_2m", "+backbone.lr=1"]
    with pytest.raises(SystemExit) as stop:
        main(["check", *arguments])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    wrong = [line for line in out.splitlines() if line.startswith("WRONG")]
    assert any("split train" in line and "escaip convert" in line for line in wrong)
    assert any("split val" in line for line in wrong)
    assert any("unknown model key 'lr'" in line for line in wrong)
    assert out.splitlines()[-1] == f"{len(wrong)} problems"


@pytest.mark.parametrize(
    "recipe, overrides, message",
    [
        ("absent.yml", [], "no recipe at absent.yml"),
        (str(RECIPE), ["dataset=smaple"], "Could not find 'dataset/smaple'"),
        (str(RECIPE), ["unused=1"], "cannot be composed"),
        (str(RECIPE), ["job.scheduler.mode=CLOUD"], "cannot be composed"),
    ],
)
def test_what_cannot_be_composed(recipe: str, overrides: list[str], message: str) -> None:
    report = Report()
    check(Path(recipe), overrides, Options(), report)
    (problem,) = report.problems
    assert problem.topic == "recipe"
    assert message in problem.text
    assert "\n" not in problem.text


def test_problems_of_the_data(folder: Path) -> None:
    """An element without place, sizes, missing references, forces in another unit."""
    from run_helpers import compose_quickly

    composed = compose_quickly(
        str(RECIPE), [*SMALL, "dataset=mine", "max_atoms=5", "+backbone.max_num_elements=20"]
    )
    report = Report()
    splits = open_splits(composed, report)
    check_splits(composed, splits, report)
    text = problems(report)
    assert "Cu: above max_num_elements 20" in text
    assert "40 structures are never trained on; set max_atoms=8" in text
    with pytest.raises(UserError, match="max_atoms 5: no structure is so small"):
        make_batches(composed, splits["train"], 1, report)
    composed = compose_quickly(str(RECIPE), [*SMALL, "dataset=mine"])
    with pytest.raises(UserError, match=r"30 structures give 5 batches .* for 6 ranks; lower"):
        make_batches(composed, splits["train"], 6, report)


def test_labels_of_another_unit(folder: Path) -> None:
    from run_helpers import compose_quickly

    frames = labelled_atoms(12)
    for atoms in frames:
        atoms.calc.results["forces"] *= 200 / 0.0433641
    write(folder / "kcal.extxyz", frames)
    convert(
        [str(folder / "kcal.extxyz")], folder / "data" / "kcal", check_units=False,
        split=SplitOptions(val_fraction=0.25),
    )  # fmt: skip
    composed = compose_quickly(str(RECIPE), [*SMALL, "dataset=kcal"])
    report = Report()
    check_splits(composed, open_splits(composed, report), report)
    assert "kcal/mol" in problems(report)


def test_memory_of_a_larger_batch(checked: Report, folder: Path) -> None:
    """The estimate for a batch, from smaller ones, against one that is measured."""
    from escaip_fairchem.bench.measure import peak_bytes
    from escaip_fairchem.check.step import build_unit, edges_of, one_rank, take_step
    from run_helpers import compose_quickly

    composed = compose_quickly(str(RECIPE), [*SMALL, "dataset=mine", "max_atoms=200"])
    report = Report()
    splits = open_splits(composed, report)
    batches = make_batches(composed, splits["train"], 1, report)
    with one_rank("cpu") as device:
        unit = build_unit(composed, report)
        small = make_batches(
            compose_quickly(str(RECIPE), [*SMALL, "dataset=mine"]), splits["train"], 1, report
        )
        cost = take_step(unit, small, device, report)
        for parameter in unit.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        largest = batches.largest
        estimate = activation_bytes(cost, edges_of(unit, largest))
        measured = peak_bytes(lambda: float(unit._backward([largest.clone()])), device)
    assert int(largest.natoms.sum()) == 200
    assert estimate == pytest.approx(measured, rel=0.15)


def fake_cost(**changes: Any) -> Cost:
    samples = [Sample(50, 1000, 10**8, 1.0, 1.0), Sample(100, 2000, 15 * 10**7, 2.0, 1.0)]
    values = {
        "samples": samples, "resident": GIB, "states": GIB // 2, "moving": 0,
        "checkpoint": 10**9, "flops": 1e9, "device": torch.device("cpu"),
    }  # fmt: skip
    return Cost(**(values | changes))


def test_activations_lie_on_a_line() -> None:
    assert activation_bytes(fake_cost(), 4000) == pytest.approx(25e7)
    one = fake_cost(samples=[Sample(50, 1000, 10**8, 1.0, 1.0)])
    assert activation_bytes(one, 4000) == pytest.approx(4e8)


@pytest.mark.parametrize(
    "capacity, state, remedy",
    [(8.0, "ok", ""), (2.4, "note", "set max_atoms="), (1.5, "WRONG", "smaller backbone")],
)
def test_what_does_not_fit(
    capacity: float, state: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 GiB that stays, 1 GiB of a process, 0.23 GiB of activations."""
    monkeypatch.setattr("escaip_fairchem.check.estimate.edges_of", lambda unit, batch: 4000)
    batches: Any = SimpleNamespace(
        largest=None, atoms=np.array([200]), natoms=np.array([8]), ranks=1
    )
    report = Report()
    unit: Any = SimpleNamespace(shard_optimizer=False)
    estimate_memory(fake_cost(), unit, batches, capacity * GIB, report)
    (finding,) = report.findings
    assert finding.state == state
    assert remedy in finding.text
    assert report.values["memory"]["needed"] == 2 * GIB + 25 * 10**7


def test_time_of_a_training() -> None:
    """2 ranks at 50 atoms/s each, 100 atoms a batch, 10 s to read 5 batches by one worker."""
    batches: Any = SimpleNamespace(
        atoms=np.full(20, 100), natoms=np.array([10]), ranks=2, accumulate=2,
        batches_per_epoch=10, steps_per_epoch=5, seconds_per_atom=0.01,
    )  # fmt: skip
    made = config(job__device_type="cuda")
    report = Report()
    total = estimate_time(
        made, fake_cost(), batches, val_atoms=300, device=find_device("h100"), given=50.0,
        report=report,
    )  # fmt: skip
    # 100 steps of two batches, each 2 s of training and 1 s of reading; validations of 1 s:
    # after every 50 steps and each of the 20 epochs
    assert total == pytest.approx(100 * 2 * (2 + 1) + 22 * 1)
    assert report.values["time"]["epoch_seconds"] == pytest.approx(5 * 6)
    assert "num_workers=1" in report.findings[0].text


def test_a_gpu_is_as_busy_as_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 GFLOP/s of 500 is a tenth; a tenth of an H100 in bf16 at 1 GFLOP an atom."""
    monkeypatch.setattr("escaip_fairchem.check.estimate.cpu_peak", lambda: 500e9)
    batches: Any = SimpleNamespace(
        atoms=np.full(20, 100), natoms=np.array([10]), ranks=1, accumulate=1,
        batches_per_epoch=20, steps_per_epoch=20, seconds_per_atom=0.0,
    )  # fmt: skip
    made = config(job__device_type="cuda", runner__train_eval_unit={"bf16": True})
    report = Report()
    estimate_time(
        made, fake_cost(), batches, val_atoms=0, device=find_device("H100"), given=None,
        report=report,
    )  # fmt: skip
    assert report.values["time"]["atoms_per_second_and_rank"] == pytest.approx(0.1 * 989e12 / 1e9)
    assert report.values["time"]["factor_of_doubt"] == 3


def sinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A login node whose `sinfo` answers with a text, as Slurm 22.05 writes it."""
    for name in ("sbatch", "sinfo"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\ncat <<'E'\n{text}\nE\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_SUBMIT_HOST", raising=False)


PARTITIONS = "cpu*|16|64000|(null)|2-00:00:00\ngpu|64+|512000|gpu:a100:4(S:0-1)|12:00:00"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"partition": "fast"}, "no partition fast: set .* to one of cpu, gpu"),
        ({"cpus_per_task": 99}, "2 ranks x 99 CPUs: a node of cpu has 16 of cpus"),
        ({"mem_gb": 100}, "mem_gb 100: a node of cpu has 64000 MB of memory"),
        ({"timeout_hr": 72}, "a time limit of 72 h: cpu allows 48 h; set .*timeout_hr=48"),
        ({"partition": "gpu", "timeout_hr": 13}, "gpu allows 12 h"),
    ],
)
def test_what_slurm_would_refuse(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sinfo(tmp_path, monkeypatch, PARTITIONS)
    made = config(job__scheduler__mode="slurm", job__scheduler__ranks_per_node=2)
    report = Report()
    place.check_slurm(made, report)
    assert not report.problems
    OmegaConf.update(made, "job.scheduler.slurm", changes, merge=True)
    place.check_slurm(made, report)
    (problem,) = report.problems
    assert problem.topic == "slurm"
    assert re.search(message, problem.text)


def test_gpus_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sinfo(tmp_path, monkeypatch, PARTITIONS)
    made = config(
        job__scheduler__mode="slurm", job__device_type="cuda", job__scheduler__ranks_per_node=8
    )
    made.job.scheduler.slurm.partition = "gpu"
    report = Report()
    place.check_slurm(made, report)
    assert "8 GPUs: a node of gpu has 4 of GPUs; lower job.scheduler.ranks_per_node" in problems(
        report
    )


def test_no_login_node_and_inside_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_SUBMIT_HOST", "login")
    report = Report()
    place.check_slurm(config(job__scheduler__mode="slurm"), report)
    assert "no sbatch here" in problems(report)
    assert "inside a SLURM job" in problems(report)


@pytest.mark.parametrize(
    "seconds, times", [(3600, "one job"), (30 * 3600, "7 to 22 requeues"), (3 * 3600, "0 to 2")]
)
def test_requeues(seconds: float, times: str) -> None:
    """Jobs of 4 h; three times as long as thought at the worst."""
    report = Report()
    place.check_requeues(config(job__scheduler__mode="slurm"), seconds, 3.0, report)
    assert times in report.findings[0].text


@pytest.mark.parametrize(
    "text, hours",
    [("2-00:00:00", 48), ("12:30:00", 12.5), ("30:00", 0.5), ("90", 1.5), ("1-12", 36)],
)
def test_times_of_slurm(text: str, hours: float) -> None:
    assert place._hours(text) == hours


def test_folder_of_the_run(tmp_path: Path) -> None:
    made = config(job__run_dir=str(tmp_path))
    run = tmp_path / "t"

    def found() -> Any:
        report = Report()
        place.check_run(made, report)
        return report.findings[0]

    assert found().state == "ok"
    with RunLock(run):
        assert "is in use by process" in found().text
        assert found().state == "WRONG"
    assert "begins anew" in found().text
    step = run / "checkpoints" / "step_20"
    step.mkdir(parents=True)
    (step / ".metadata").touch()
    assert "goes on from step_20" in found().text
    write_status(run, RunStatus(state="running", step=25))
    assert "(dead): it goes on from step_20" in found().text
    write_status(run, RunStatus(state="finished"))
    assert "has finished" in found().text


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 checkpoints are written; two, a new one beside them, are there at a time."""
    monkeypatch.setattr(place.shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * GIB))
    made = config(job__run_dir=str(tmp_path / "absent"))
    for size, state in ((0.6, "ok"), (0.7, "WRONG")):
        report = Report()
        place.check_disk(made, int(size * GIB), 100, report)
        assert report.findings[0].state == state
        assert report.values["disk"]["kept"] == 3
        assert report.values["disk"]["written"] == 5


@pytest.mark.skipif(torch.version.cuda is not None, reason="for builds of torch without CUDA")
def test_torch_without_gpus() -> None:
    report = Report()
    assert place.check_machine(config(job__device_type="cuda"), report) == 1
    assert "is a build without GPUs" in problems(report)


def test_nodes_without_slurm() -> None:
    report = Report()
    made = config(job__scheduler__num_nodes=4, job__scheduler__ranks_per_node=2)
    assert place.check_machine(made, report) == 2
    assert "cluster=slurm" in report.findings[0].text


@pytest.mark.parametrize("arguments", [["--gpu", "abacus"], ["--gpu-memory", "-1"]])
def test_mistakes_on_the_command_line(arguments: list[str], capsys) -> None:
    assert main(["check", str(RECIPE), *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err
