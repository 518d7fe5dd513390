"""`escaip sweep`: the file, names, composing, halving, and a small sweep on this machine."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml
from fairchem.core._cli import get_hydra_config_from_yaml
from fairchem.core.launchers import slurm_launch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from escaip_fairchem.cli import main
from escaip_fairchem.commands.sweep import with_action
from escaip_fairchem.errors import UserError
from escaip_fairchem.sweep.compose import composer, to_yaml
from escaip_fairchem.sweep.halving import decide, decision, ranked
from escaip_fairchem.sweep.local import run_locally
from escaip_fairchem.sweep.points import expand, override, point_name
from escaip_fairchem.sweep.run import cancel, retry
from escaip_fairchem.sweep.spec import Halving, load_spec, parse_spec
from escaip_fairchem.sweep.states import look
from escaip_fairchem.sweep.store import Sweep, difference, load_sweep
from escaip_fairchem.sweep.submit import executor_parameters
from escaip_fairchem.sweep.table import watch
from escaip_fairchem.train.lock import RunLock
from escaip_fairchem.train.status import RunStatus, write_status
from fork_runs import points_in_forks

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs/oc20/escaip_2m.yml"
SMALL = ["cluster=cpu", "backbone=tiny", "dataset=sample", "epochs=null", "steps=4"]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A data root with a small sample; ESCAIP_DATA says so while this module runs."""
    root = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("ESCAIP_DATA", str(root))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert main(["sample-data", "oc20", "--frames", "24"]) == 0
        yield root


# The sweep file


def test_every_combination_is_a_point_once():
    spec = parse_spec(
        {"grid": {"lr": [1e-3, 2e-3], "seed": [0, 1]},
         "list": [{"backbone": "tiny"}, {"backbone": "mini"}, {"backbone": "tiny"}],
         "fixed": {"steps": 5, "cluster": "cpu"},
         "resources": [{"when": {"backbone": "mini"}, "set": {"job.scheduler.num_nodes": 2}}]}
    )  # fmt: skip
    points = expand(spec, ["cluster=gpu"])
    assert len(points) == 8
    assert points[0].name == "lr_0.001+seed_0+backbone_tiny"
    assert points[0].overrides == ("steps=5", "cluster=gpu", "lr=0.001", "seed=0", "backbone=tiny")
    for point in points:
        assert ("job.scheduler.num_nodes=2" in point.overrides) == ("backbone_mini" in point.name)
    with pytest.raises(UserError, match="lr is varied by the sweep file"):
        expand(spec, ["lr=3"])


def test_numbers_are_those_of_hydra(tmp_path):
    (tmp_path / "s.yml").write_text("grid: {lr: [1e-3, 2]}\nlist: [{a: '1e-3', b: null}]\n")
    spec = load_spec(tmp_path / "s.yml")
    assert spec.grid["lr"] == [0.001, 2]
    assert spec.sets == [{"a": "1e-3", "b": None}]


def test_draws_are_within_bounds_and_do_not_depend_on_their_number():
    given_ = {"lr": {"loguniform": [1e-5, 1e-2]}, "n": {"int": [2, 3]}, "w": {"uniform": [-1, 1]}}
    few, many = (
        [p.varied for p in expand(parse_spec({"random": given_, "samples": n}))] for n in (5, 200)
    )
    assert many[:5] == few
    assert {p["n"] for p in many} == {2, 3}
    rates = sorted(p["lr"] for p in many)
    assert rates[0] >= 1e-5
    assert rates[-1] <= 1e-2
    assert 1e-4 < rates[100] < 1e-3  # the median in the logarithm
    assert min(p["w"] for p in many) < -0.9
    assert max(p["w"] for p in many) > 0.9
    other = expand(parse_spec({"random": given_, "samples": 5, "sampling_seed": 1}))
    assert [p.varied for p in other] != few


@pytest.mark.parametrize(
    "content, message",
    [
        ({"gird": {}}, "did you mean grid"),
        ({"grid": {"lr": 3}}, "give a list of values"),
        ({"grid": {"lr": []}}, "give a list of values"),
        ({"list": {"lr": 3}}, "list of sets"),
        ({"random": {"lr": {"uniform": [0, 1]}}}, "go together"),
        ({"random": {"lr": {"unifrom": [0, 1]}}, "samples": 2}, "did you mean uniform"),
        ({"random": {"lr": {"loguniform": [0, 1]}}, "samples": 2}, "positive"),
        ({"random": {"lr": {"int": [0.5, 1]}}, "samples": 2}, "two integers"),
        ({"random": {"lr": {"uniform": [2, 1]}}, "samples": 2}, "the smaller one first"),
        ({"parallel": 0}, "at least 1"),
        ({"halving": {"metric": "x", "steps": [3, 2]}}, "rising integers"),
        ({"halving": {"metric": "x", "steps": [3], "factor": 1}}, "above 1"),
        ({"halving": {"steps": [3]}}, "give metric"),
        ({"fixed": {"job.run_dir": "x"}}, "set by the sweep itself"),
        ({"grid": {"+stop_at_step": [1]}}, "set by the sweep itself"),
        ([1], "expected keys"),
    ],
)
def test_mistakes_in_the_file(content, message):
    with pytest.raises(UserError, match=message):
        parse_spec(content)


# Overrides and names

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), min_size=1).filter(
    lambda text: "${" not in text
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=150)
@given(VALUES)
def test_overrides_mean_the_value_in_hydra(value):
    parsed = OverridesParser.create().parse_override(override("key", value))
    assert OmegaConf.to_container(OmegaConf.create({"v": parsed.value()}))["v"] == value


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.dictionaries(st.sampled_from(["lr", "+a.b", "w"]), VALUES), min_size=2, max_size=2)
)
def test_names_are_safe_and_tell_points_apart(pair):
    names = [point_name(varied) for varied in pair]
    for name in names:
        assert len(name) <= 96
        assert set(name) <= set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+-"
        )
        assert name[0] not in ".-+"
    same = json.dumps(pair[0]) == json.dumps(pair[1])
    assert (names[0] == names[1]) == same


def test_names_are_readable_and_stable():
    assert point_name({"lr": 1e-5, "backbone": "h512l6"}) == "lr_1e-05+backbone_h512l6"
    assert point_name({"++optim.ema_decay": None}) == "optim.ema_decay_null"
    assert point_name({}) == "base"
    assert point_name({"a": "1"}) != point_name({"a": 1})
    # printf '{"a": "x y"}' | sha256sum
    assert point_name({"a": "x y"}) == "a_x-y-ec26bab2"


# Composing


def test_composed_as_fairchem_composes(sample):
    """Values, groups, new keys; and the text that is stored gives the same when it is read."""
    cases = [
        ["lr=1e-2", "seed=3"],
        ["backbone=mini", "loss.energy=3", "++backbone.num_layers=5"],
        ["+sampler=forces", "job.scheduler.ranks_per_node=2", "normalizer.mean=1e-1"],
        ["tasks=huber", "optimizer=muon", "job.run_name='1e-3'"],
    ]
    own = [*SMALL, "job.run_dir=runs", "job.timestamp_id=x"]
    expected = [get_hydra_config_from_yaml(str(RECIPE), own + case) for case in cases]
    with composer(RECIPE) as compose:
        found = [compose(own + case) for case in cases]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == OmegaConf.to_container(theirs, enum_to_str=True)
        assert OmegaConf.to_container(OmegaConf.create(to_yaml(mine))) == mine
    assert found[3]["job"]["run_name"] == "1e-3"


def test_mistakes_of_all_points_are_listed_and_nothing_is_started(sample, tmp_path, capsys):
    sweep = tmp_path / "s.yml"
    sweep.write_text(
        "list:\n- {lrr: 1}\n- {preset: giant}\n- {dataset.train: nowhere}\n"
        "- {+backbone.cutof: 3}\n- {+unused: 1}\n- {lr: 1e-3}\n"
    )
    command = ["sweep", str(RECIPE), str(sweep), "--dir", str(tmp_path / "d"), *SMALL]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "5 mistakes in 6 points, nothing was started" in error
    for text in ("lrr_1: ", "preset/giant", "nowhere does not exist", "cutoff", "'unused'"):
        assert text in error
    assert not (tmp_path / "d" / "configs").exists()
    assert not (tmp_path / "d" / "points").exists()


def test_halving_needs_evaluations_where_rungs_end(sample, tmp_path, capsys):
    sweep = tmp_path / "s.yml"
    sweep.write_text("grid: {lr: [1, 2]}\nhalving: {metric: val_loss, steps: [3]}\n")
    command = ["sweep", str(RECIPE), str(sweep), "--dir", str(tmp_path / "d"), "--dry-run", *SMALL]
    assert main([*command, "evaluate_every_n_steps=2"]) == 2
    assert "no evaluation at step 3" in capsys.readouterr().err
    assert main([*command, "evaluate_every_n_steps=1"]) == 0
    out = capsys.readouterr().out
    assert "2 to 3, 1 to the end" in out
    assert "88 % of the steps" in out  # 3 + 3 + 1 of 8


def test_cost_of_a_sweep_with_two_shapes(sample, tmp_path, capsys):
    sweep = tmp_path / "s.yml"
    sweep.write_text(
        "grid: {seed: [0, 1, 2], job.scheduler.num_nodes: [1, 2]}\n"
        "fixed: {job.scheduler.slurm.timeout_hr: 5, cluster: slurm}\n"
    )
    rest = [word for word in SMALL if word != "cluster=cpu"]
    command = ["sweep", str(RECIPE), str(sweep), *rest, "--dir", str(tmp_path / "d"), "--dry-run"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "3 points on 1 x 8 GPU, up to 5 h each: at most 120 GPU hours" in out
    assert "3 points on 2 x 8 GPU, up to 5 h each: at most 240 GPU hours" in out
    assert not (tmp_path / "d").exists()


def test_submitit_gets_what_fairchem_gives_it(sample, tmp_path, monkeypatch):
    given_ = {}

    class Executor:
        def __init__(self, **_):
            pass

        def update_parameters(self, **parameters):
            given_.update(parameters)

        def submit(self, *_):
            return type("Job", (), {"job_id": "1"})

    monkeypatch.setattr(slurm_launch, "AutoExecutor", Executor)
    own = [
        "cluster=slurm",
        "dataset=sample",
        "job.scheduler.slurm.qos=high",
        f"job.run_dir={tmp_path}",
    ]
    config = get_hydra_config_from_yaml(str(RECIPE), own)
    slurm_launch.slurm_launch(config, str(tmp_path))
    given_.pop("name")
    assert executor_parameters(OmegaConf.to_container(config.job, enum_to_str=True)) == given_


def test_the_first_difference_is_named():
    stored = {"job": {"scheduler": {"x": 1}, "seed": 0}, "runner": {"a": [1, {"b": 2}]}}
    wanted = {"job": {"scheduler": {"x": 2}, "seed": 0}, "runner": {"a": [1, {"b": 3}]}}
    assert difference(stored, wanted) == "runner.a.1.b was 2 and is 3"
    assert difference(stored, {**stored, "job": wanted["job"]}) is None


# Halving


def test_ranking():
    scores = {"b": 1.0, "a": 1.0, "c": 0.5, "failed": None, "nan": float("nan")}
    assert ranked(scores, "min") == ["c", "a", "b"]
    assert ranked(scores, "max") == ["a", "b", "c"]
    assert Halving("m", (1, 2), 3).sizes(20) == [20, 6, 2]
    assert Halving("m", (1, 2, 3), 3).sizes(4) == [4, 1, 1, 1]


def made_up(folder: Path, name: str, state: str, values: dict[int, float], step: int) -> None:
    run = folder / "points" / name
    run.mkdir(parents=True)
    write_status(
        run, RunStatus(state=state, step=step, reason="why" if state == "failed" else None)
    )
    lines = ["step,val_loss", *(f"{step},{value}" for step, value in values.items())]
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")


def test_decisions_are_made_once_from_results_on_disk(tmp_path):
    halving = {"metric": "val_loss", "mode": "min", "factor": 2, "steps": [10, 20]}
    points = {name: {"k": name} for name in "abcdef"}
    sweep = Sweep(tmp_path, points=points, halving=halving)
    made_up(tmp_path, "a", "paused", {5: 0.1, 10: 3.0}, 10)  # the value at the end counts
    made_up(tmp_path, "b", "paused", {10: 2.0}, 10)
    made_up(tmp_path, "c", "paused", {10: 2.0, 20: 9.0}, 20)  # later ones do not
    made_up(tmp_path, "d", "failed", {10: 0.1}, 10)
    made_up(tmp_path, "e", "finished", {10: 1.0}, 40)
    made_up(tmp_path, "f", "paused", {5: 0.1}, 5)  # did not get there
    assert decide(sweep, 1) == ["e", "b", "c"]
    shutil.rmtree(tmp_path / "points" / "e")
    assert decide(sweep, 1) == ["e", "b", "c"]
    assert decision(sweep, 1)["scores"] == {
        "a": 3.0, "b": 2.0, "c": 2.0, "d": None, "e": 1.0, "f": None,
    }  # fmt: skip
    assert decide(sweep, 2) == ["c"]
    states = {state.name: (state.state, state.rung) for state in look(sweep)}
    assert states["a"] == ("eliminated", 0)
    assert states["b"] == ("eliminated", 1)
    assert states["c"] == ("paused", 2)
    assert states["d"] == ("failed", 0)


# A sweep on this machine


@pytest.fixture(scope="module")
def swept(sample, tmp_path_factory):
    """Two points that finish and one that fails, by the command; its folder and output."""
    folder = tmp_path_factory.mktemp("sweep")
    broken = sample / "broken" / "train"
    shutil.copytree(sample / "oc20/sample/train", broken)
    database = next(broken.glob("*.aselmdb"))
    database.rename(broken / "kept")
    database.write_text("no database")
    (folder / "s.yml").write_text(
        "list: [{lr: 1e-3}, {lr: 2e-3}, {lr: 3e-3, dataset.train: broken/train}]\n"
        "fixed: {max_atoms: 120, evaluate_every_n_steps: 2, checkpoint_every_n_steps: 2,"
        " train_fraction: 0.5, runner.callbacks.0.every_n_steps: 1}\n"
    )
    return folder, *run_sweep(folder), database


def run_sweep(folder: Path, *more: str) -> tuple[int, str]:
    """Exit code and output of the command, in this process; its runs are forks."""
    text = io.StringIO()
    with redirect_stdout(text), redirect_stderr(text), points_in_forks():
        command = ["sweep", str(RECIPE), str(folder / "s.yml"), "--dir", str(folder / "d")]
        code = main([*command, *SMALL, *more])
    return code, text.getvalue()


def test_points_are_run_and_failures_reported(swept, capsys):
    folder, code, output, _ = swept
    assert code == 2
    assert "1 of 3 points did not finish" in output
    assert "lr_0.001: finished at step 4" in output
    assert "lr_0.002: finished at step 4" in output
    states = {state.name: state for state in look(load_sweep(folder / "d"))}
    assert [state.state for state in states.values()] == ["finished", "finished", "failed"]
    assert (folder / "d/points/lr_0.001/checkpoints/final/inference_ckpt.pt").is_file()
    assert main(["sweep", "status", str(folder / "d")]) == 0
    out = capsys.readouterr().out
    assert "2 finished, 1 failed" in out
    failed = next(state for state in states.values() if state.state == "failed")
    assert failed.reason
    assert f"{failed.name} failed: {failed.reason}" in out
    config = yaml.safe_load((folder / "d/configs/lr_0.001.yaml").read_text())
    assert config["runner"]["train_eval_unit"]["optimizer_fn"]["lr"] == 1e-3


def test_the_same_command_again_does_nothing_and_a_changed_one_is_refused(swept):
    folder = swept[0]
    before = {path: path.stat().st_mtime_ns for path in folder.glob("d/points/*/status.json")}
    code, output = run_sweep(folder)
    assert code == 0
    assert "left alone: 2 finished, 1 failed" in output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    code, output = run_sweep(folder, "seed=5")
    assert code == 2
    assert "seed was 0 and is 5" in output


def test_a_sweep_that_is_under_way_is_left_alone(swept):
    folder = swept[0]
    with RunLock(folder / "d"):
        code, output = run_sweep(folder)
    assert code == 2
    assert f"in use by process {os.getpid()}" in output


def test_results_best_and_plots(swept, capsys):
    folder = swept[0]
    sweep = str(folder / "d")
    assert main(["sweep", "results", sweep, "--csv", str(folder / "r.csv")]) == 0
    rows = {row["point"]: row for row in csv.DictReader((folder / "r.csv").open())}
    values = {}
    for name in ("lr_0.001", "lr_0.002"):
        last = list(csv.DictReader((folder / "d/points" / name / "metrics.csv").open()))
        values[name] = [r["val_forces_mae"] for r in last if r["val_forces_mae"]][-1]
        assert rows[name]["val_forces_mae"] == values[name]
        assert rows[name]["state"] == "finished"
        assert float(rows[name]["lr"]) in (1e-3, 2e-3) or rows[name]["lr"]
    capsys.readouterr()
    assert main(["sweep", "best", sweep, "-n", "2"]) == 0
    out = capsys.readouterr().out.splitlines()
    order = sorted(values, key=lambda name: float(values[name]))
    assert [line.partition(":")[0] for line in (out[0], out[3])] == order
    assert out[1].strip() == f"lr={order[0].removeprefix('lr_')}"
    assert Path(out[2].strip()).is_file()
    assert main(["sweep", "best", sweep, "--metric", "nothing"]) == 2
    assert "val_forces_mae" in capsys.readouterr().err
    assert main(["sweep", "plot", sweep]) == 0
    for path in map(Path, capsys.readouterr().out.split()):
        assert Image.open(path).convert("L").getextrema()[0] < 128


@pytest.mark.full  # on SLURM by every `make test-slurm`
def test_a_failed_point_is_retried(swept, capsys):
    folder, *_, database = swept
    (database.parent / "kept").rename(database)
    assert main(["sweep", "retry", str(folder / "d")]) == 0
    assert "finished at step 4" in capsys.readouterr().out
    assert {state.state for state in look(load_sweep(folder / "d"))} == {"finished"}
    assert main(["sweep", "retry", str(folder / "d")]) == 2
    assert "nothing to retry" in capsys.readouterr().err


def test_half_of_the_structures_are_used(sample):
    from escaip_fairchem.data.datasets import create_dataset

    def energies(**options) -> list[float]:
        dataset = create_dataset("oc20", "train", "oc20/sample/train", **options)
        return [float(dataset[index].energy) for index in range(len(dataset))]

    whole, half, fifth = energies(), energies(fraction=0.5), energies(fraction=0.2)
    assert len(half) == round(len(whole) / 2)
    assert set(fifth) < set(half) < set(whole)
    assert energies(fraction=0.5) == half
    with pytest.raises(UserError, match="train_fraction"):
        energies(fraction=0)


def test_overrides_may_stand_anywhere():
    words = ["sweep", "c.yml", "--dir", "d", "s.yml", "--dry-run", "lr=1", "+a.b=2"]
    assert with_action(words) == [
        "sweep", "run", "c.yml", "s.yml", "lr=1", "+a.b=2", "--dir", "d", "--dry-run",
    ]  # fmt: skip
    assert with_action(["sweep", "status", "d"]) == ["sweep", "status", "d"]
    assert with_action(["info", "sweep"]) == ["info", "sweep"]


@pytest.mark.full
def test_ctrl_c_stops_the_runs_in_good_order(swept, tmp_path):
    shutil.copy(swept[0] / "s.yml", tmp_path / "s.yml")
    status = tmp_path / "d/points/lr_0.001/status.json"

    def press() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if status.exists() and json.loads(status.read_text())["step"] > 2:
                break
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(SystemExit) as stop:
        run_sweep(tmp_path, "steps=100000")
    presser.join()
    assert stop.value.code == 130
    states = [state.state for state in look(load_sweep(tmp_path / "d"))]
    assert states == ["interrupted", "new", "new"]
    assert [*tmp_path.glob("d/points/lr_0.001/checkpoints/step_*")]


def test_points_that_have_not_said_anything(tmp_path, monkeypatch):
    """Imports take longer than a look: a point begins, or its process has ended."""
    sweep = Sweep(tmp_path, points={"a": {}, "b": {}})
    sweep.run("a").mkdir(parents=True)
    (sweep.run("a") / "output.log").write_text("no such module\n")
    found = {state.name: (state.state, state.reason) for state in look(sweep)}
    assert found == {"a": ("lost", "no such module"), "b": ("new", None)}
    monkeypatch.setattr("escaip_fairchem.sweep.states.holder", lambda _: {"pid": 0})
    assert [state.state for state in look(sweep)] == ["starting", "new"]


def test_watches_as_long_as_the_command_is_at_work(tmp_path, monkeypatch, capsys):
    Sweep(tmp_path, points={"a": {}, "b": {}}).save()
    answers = [{"pid": 0}, {"pid": 0}, None]
    monkeypatch.setattr("escaip_fairchem.sweep.table.holder", lambda _: answers.pop(0))
    watch(tmp_path, every=0)
    assert not answers
    assert capsys.readouterr().out.count("2 new") == 3


def test_points_may_be_cancelled_while_the_sweep_composes(tmp_path, monkeypatch):
    Sweep(tmp_path, points={"a": {}, "b": {}}).save()
    composing = load_sweep(tmp_path)
    cancel(tmp_path, ["a"])
    composing.parallel = 2
    composing.save()
    found = load_sweep(tmp_path)
    assert (found.canceled, found.parallel) == (["a"], 2)
    assert [state.state for state in look(composing)] == ["canceled", "new"]
    monkeypatch.setattr("escaip_fairchem.sweep.run._carry_on", lambda *_, **__: None)
    retry(tmp_path, ["a"])
    assert load_sweep(tmp_path).canceled == []


def test_a_sweep_in_the_background_of_a_script_is_cancelled(tmp_path, monkeypatch, capsys):
    """A shell without job control ignores SIGINT for it, and so for all that it starts."""
    monkeypatch.setattr(
        "escaip_fairchem.sweep.local.fairchem_command",
        lambda: [sys.executable, "-S", "-c", "import time; time.sleep(60)"],
    )
    sweep = Sweep(tmp_path, points={"a": {}, "b": {}}, parallel=1)
    sweep.save()
    started = sweep.run("a") / "output.log"
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with contextlib.suppress(SystemExit), RunLock(tmp_path):
            run_locally(sweep, ["a", "b"])
        os._exit(0)
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    cancel(tmp_path, [])
    assert os.waitpid(child, 0) == (child, 0)
    assert not sweep.run("b").exists()
    assert capsys.readouterr().out.startswith("cancelled 2 points\ntold process")
    cancel(tmp_path, [])
    assert capsys.readouterr().out == "cancelled 0 points; 2 had ended before\n"
