"""Interrupted runs: what is saved, what is refused, and that what follows is bitwise the same."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ase.io
import pytest
import torch
from fairchem.core._cli import get_hydra_config_from_yaml
from omegaconf import OmegaConf

from escaip_fairchem.data.sample import make_sample
from escaip_fairchem.errors import UserError
from escaip_fairchem.train.callbacks import read_metrics
from escaip_fairchem.train.checkpoints import damage, newest_whole
from escaip_fairchem.train.runner import TrainEvalRunner
from escaip_fairchem.train.status import read_status
from escaip_fairchem.train.unit import TrainEvalUnit
from helpers import SMALL, one_thread
from unit_parts import DROPOUTS, ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

RECIPE = Path(__file__).parents[1] / "configs" / "oc20" / "escaip_2m.yml"
#: Bytes: more than any file of a run but for those of its checkpoints.
FILE_LIMIT = 100_000
#: 10 batches an epoch; evaluations at steps 4 and 8, after epochs, and at the end.
STEPS = 13
UNIT, LOADER = "train_eval_unit", "train_dataloader"
#: Settings of the composed configuration, which takes seconds to compose.
SHAPES: dict[str, dict[str, Any]] = {
    "dropout": {},
    "accumulate": {
        f"{UNIT}.accumulate": 3,
        f"{UNIT}.cosine_lr_scheduler_fn.steps": 6,
        "max_steps": 6,
        "evaluate_every_n_steps": 2,
    },
    "workers": {
        f"{LOADER}.num_workers": 1,
        "eval_dataloader.num_workers": 1,
        f"{LOADER}.batch_sampler_fn._target_": "escaip_fairchem.data.sampling."
        "ForceWeightedBatchSampler",
        f"{LOADER}.batch_sampler_fn.power": 0.7,
    },
    "muon": {
        f"{UNIT}.optimizer_fn": {
            "_target_": "escaip_fairchem.train.optim.Muon",
            "_partial_": True,
            "lr": 1e-3,
        }
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_thread(), ranks(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Configurations by shape, composed once."""
    folder = tmp_path_factory.mktemp("recovery")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("ESCAIP_DATA", str(folder / "data"))
        make_sample("oc20", folder / "data" / "oc20" / "sample", n_frames=12)
        common = [
            *("cluster=cpu", "backbone=tiny", "dataset=sample", "epochs=null", f"steps={STEPS}"),
            *("max_atoms=38", "checkpoint_every_n_steps=5", "evaluate_every_n_steps=4", "lr=1e-3"),
            *("progress=false", "job.timestamp_id=run", "job.run_dir=RUNS"),
            *(f"++backbone.{name}=0.1" for name in DROPOUTS),
            *(f"++backbone.{name}={value}" for name, value in {**SMALL, "num_layers": 1}.items()),
        ]
        composed = OmegaConf.to_container(get_hydra_config_from_yaml(str(RECIPE), common))
        # enumerations as their names
        composed = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(composed)))
        without_references(composed)
        found = {}
        for shape, settings in SHAPES.items():
            found[shape] = deepcopy(composed)
            for name, value in settings.items():
                set_to(found[shape], name, value)
        yield found  # data are looked for when they are read, too


@pytest.fixture(scope="module")
def whole(configs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Undisturbed runs by shape, made when they are asked for."""

    class Runs(dict):
        def __missing__(self, shape: str) -> Path:
            self[shape] = tmp_path_factory.mktemp(shape)
            run(configs[shape], self[shape])
            return self[shape]

    return Runs()


def without_references(config: Any) -> None:
    """Element references are lists of a hundred numbers, which take Hydra a second to build."""
    for value in config.values() if isinstance(config, dict) else config:
        if isinstance(value, dict | list):
            without_references(value)
    if isinstance(config, dict) and "element_references" in config:
        config["element_references"] = None


def set_to(config: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    place = config["runner"]
    for part in path:
        place = place[part]
    place[last] = value


def run(config: Any, folder: Path, **settings: Any) -> Path:
    """What fairchem's command does after composing, in this process; the folder of the run."""
    text = json.dumps(config).replace(str(Path.cwd() / "RUNS"), str(folder))
    config = json.loads(text)
    for name, value in settings.items():
        set_to(config, name, value)
    job, parts = OmegaConf.create(config["job"]), config["runner"]
    Path(job.metadata.config_path).parent.mkdir(parents=True, exist_ok=True)
    Path(job.metadata.config_path).write_text(text)  # JSON is YAML
    parts.pop("_target_"), parts.pop("_recursive_")
    training = TrainEvalRunner(**parts)
    training.job_config = job
    torch.manual_seed(0)
    training.load_state(job.runner_state_path)
    training.run()
    return folder / "run"


def final(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "run" / "checkpoints" / "final" / "inference_ckpt.pt"
    checkpoint = torch.load(path, weights_only=False)
    return {
        **{f"ema.{name}": value for name, value in checkpoint.ema_state_dict.items()},
        **checkpoint.model_state_dict,
    }


def rows(folder: Path) -> list[dict[str, Any]]:
    found = read_metrics(folder / "run" / "metrics.csv")
    return [{key: row[key] for key in row if key != "wall_time_s"} for row in found]


def assert_same(folder: Path, undisturbed: Path) -> None:
    ours, theirs = final(folder), final(undisturbed)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert rows(folder) == rows(undisturbed)


def interrupt(monkeypatch: pytest.MonkeyPatch, what: str, call: int, number: int) -> None:
    """Send a signal to this process within a call of the unit, counted from 1."""
    function, calls = getattr(TrainEvalUnit, what), []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return function(*arguments)

    monkeypatch.setattr(TrainEvalUnit, what, interrupted)


# step 3, the last of an epoch; evaluations of step 4, of the epoch, of the last step, of the end
MOMENTS = {
    "dropout": [
        *(("train_step", 3), ("eval_step", 1), ("on_eval_epoch_end", 3)),
    ],
    "accumulate": [("on_eval_epoch_end", 2)],
    "workers": [("train_step", 6)],
    "muon": [("train_step", 6)],
}
MORE_MOMENTS = [
    ("dropout", "train_step", 8),
    ("dropout", "train_step", 10),
    ("dropout", "on_eval_epoch_end", 4),
    ("accumulate", "train_step", 1),
    ("accumulate", "on_eval_epoch_end", 4),
]


@pytest.mark.parametrize(
    "shape, what, call",
    [(shape, *moment) for shape, moments in MOMENTS.items() for moment in moments]
    + [pytest.param(shape, *moment, marks=pytest.mark.full) for shape, *moment in MORE_MOMENTS],
)
def test_continued_run_is_bitwise_the_undisturbed_one(
    shape: str, what: str, call: int, configs: Any, whole: Any, tmp_path: Path, monkeypatch, capsys
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, what, call, signal.SIGTERM)
        with pytest.raises(SystemExit) as end:
            run(configs[shape], tmp_path)
    assert end.value.code == 143
    status = read_status(tmp_path / "run")
    assert (status.state, status.reason) == ("interrupted", "SIGTERM")
    path = tmp_path / "run" / "canonical_config.yaml"
    assert f"fairchem -c {path}" in capsys.readouterr().out
    torch.manual_seed(99)  # what else drew numbers must not matter
    run(configs[shape], tmp_path)
    assert_same(tmp_path, whole[shape])
    status = read_status(tmp_path / "run")
    assert (status.state, status.restarts) == ("finished", 1)


def test_goes_on_under_nohup(configs: Any, tmp_path: Path, monkeypatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt(monkeypatch, "train_step", 3, signal.SIGHUP)
        run(configs["dropout"], tmp_path)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert read_status(tmp_path / "run").state == "finished"


def test_pauses(configs: Any, whole: Any, tmp_path: Path, capsys) -> None:
    """At the step of an evaluation, and at that of the end of an epoch."""
    for stop in (4, 10):
        run(configs["dropout"], tmp_path, stop_at_step=stop)
        status = read_status(tmp_path / "run")
        assert (status.state, status.step, status.total_steps) == ("paused", stop, STEPS)
        assert "runner.stop_at_step=null" in capsys.readouterr().out
    run(configs["dropout"], tmp_path)
    assert_same(tmp_path, whole["dropout"])


def test_damaged_checkpoints_are_left_out(
    configs: Any, whole: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Truncated, altered, half-written; the newest is by step, whatever the times say."""
    shutil.copytree(whole["dropout"] / "run", tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    with (folder / "final" / "__0_0.distcp").open("r+b") as file:
        file.truncate(1000)
    shards = [path for path in (folder / "step_10").iterdir() if path.suffix == ".distcp"]
    content = bytearray(shards[0].read_bytes())
    content[len(content) // 2] ^= 1
    shards[0].write_bytes(content)
    os.utime(folder / "step_5", (0, 0))
    (folder / ".partial_step_12").mkdir()
    shutil.copytree(folder / "step_5", folder / ".replaced_step_7")
    assert newest_whole(folder) == folder / "step_5"
    warned = [record.message for record in caplog.records if "damaged" in record.message]
    assert [name for line in warned for name in ("final", "step_10") if name in line] == [
        "final",
        "step_10",
    ]
    shutil.rmtree(folder / "step_5")
    run(configs["dropout"], tmp_path)
    assert_same(tmp_path, whole["dropout"])
    # the one that was being replaced came back; nothing is left of what was cut off
    names = {path.name for path in folder.iterdir()}
    assert len(names) == 3
    assert {"final", "step_10"} < names <= {"final", "step_10", "step_5", "step_7"}
    assert [damage(folder / name) for name in names] == [None] * 3


def test_a_given_checkpoint_must_be_whole(configs: Any, whole: Any, tmp_path: Path) -> None:
    shutil.copytree(whole["dropout"] / "run", tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step_10"
    (path / "rank_0.pt").unlink()
    config = deepcopy(configs["dropout"])
    config["job"]["runner_state_path"] = str(path)
    with pytest.raises(UserError, match=r"step_10 is damaged \(rank_0\.pt: No such file"):
        run(config, tmp_path)


def test_finished_run_does_nothing(configs: Any, whole: Any, monkeypatch, capsys) -> None:
    monkeypatch.setattr(TrainEvalUnit, "__init__", lambda *_, **__: pytest.fail("was built"))
    before = (whole["dropout"] / "run" / "metrics.csv").read_bytes()
    run(configs["dropout"], whole["dropout"])
    assert "had finished" in capsys.readouterr().out
    assert (whole["dropout"] / "run" / "metrics.csv").read_bytes() == before
    assert read_status(whole["dropout"] / "run").state == "finished"


@pytest.fixture
def no_space() -> Iterator[Any]:
    """Sets the largest size of a file, as a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [FILE_LIMIT, 64])
def test_full_disk(
    configs: Any, whole: Any, tmp_path: Path, no_space: Any, monkeypatch, caplog, limit: int
) -> None:
    """Training goes on; the end is refused in a line; once there is space it is the same run."""
    step = TrainEvalUnit.train_step

    def filling(unit: Any, *arguments: Any) -> None:
        if unit.train_progress.num_steps_completed == 7:
            no_space(limit)
        step(unit, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TrainEvalUnit, "train_step", filling)
        with pytest.raises(UserError, match=r"final could not be written \(File too large; .* MiB"):
            run(configs["dropout"], tmp_path)
    no_space(resource.RLIM_INFINITY)
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step_5"]
    assert damage(folder / "step_5") is None
    assert "step_10 could not be written" in caplog.text
    # below the last limit status.json could not be written either
    assert read_status(tmp_path / "run").state == ("failed" if limit == FILE_LIMIT else "dead")
    run(configs["dropout"], tmp_path)
    assert_same(tmp_path, whole["dropout"])


def spoil(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    """Make the forces of the model NaN in these steps."""
    loss = TrainEvalUnit._loss

    def spoilt(unit: Any, batch: Any, weights: torch.Tensor) -> torch.Tensor:
        if unit.train_progress.num_steps_completed in steps:
            model = unit.model
            hook = model.register_forward_hook(
                lambda _module, _inputs, out: {
                    **out,
                    "forces": {"forces": out["forces"]["forces"] * torch.nan},
                }
            )
            try:
                return loss(unit, batch, weights)
            finally:
                hook.remove()
        return loss(unit, batch, weights)

    monkeypatch.setattr(TrainEvalUnit, "_loss", spoilt)


def test_nan_stops_with_the_structures(configs: Any, tmp_path: Path, monkeypatch) -> None:
    spoil(monkeypatch, range(6, 7))
    with pytest.raises(UserError, match=r"step 6: .*nan_step_6\.json; .*on_nan=skip"):
        run(configs["dropout"], tmp_path)
    about = json.loads((tmp_path / "run" / "nan_step_6.json").read_text())
    (batch,) = about["batches"]
    assert torch.tensor(batch["loss"]["forces"]).isnan()
    assert torch.tensor(batch["loss"]["energy"]).isfinite()
    frames = ase.io.read(tmp_path / "run" / "nan_step_6.extxyz", index=":")
    assert [len(atoms) for atoms in frames] == batch["natoms"]
    stored = tmp_path.parent  # of the data set, whose labels these are
    assert all(torch.tensor(atoms.get_forces()).isfinite().all() for atoms in frames), stored
    assert read_status(tmp_path / "run").state == "failed"


def test_nan_steps_are_left_out(configs: Any, tmp_path: Path, monkeypatch) -> None:
    """Weights, average, optimizer and schedule stay; ten in a row end the run."""
    spoil(monkeypatch, range(2, 4))
    seen = []
    step = TrainEvalUnit.train_step

    def watching(unit: Any, *arguments: Any) -> None:
        step(unit, *arguments)
        tensors = [*unit.model.parameters(), *unit.ema_model.parameters()]
        tensors += [v for s in unit.optimizer.state.values() for v in s.values()]
        state = torch.cat([torch.as_tensor(t).detach().flatten().double() for t in tensors])
        seen.append((state, unit.scheduler.get_last_lr()[0]))

    monkeypatch.setattr(TrainEvalUnit, "train_step", watching)
    run(configs["dropout"], tmp_path, **{f"{UNIT}.on_nan": "skip", "max_steps": 6})
    same = [torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in pairwise(seen)]
    assert same == [False, True, True, False, False]
    assert sorted(path.name for path in (tmp_path / "run").glob("nan_step_*")) == [
        *("nan_step_2.extxyz", "nan_step_2.json", "nan_step_3.extxyz", "nan_step_3.json")
    ]
    shutil.rmtree(tmp_path / "run")
    monkeypatch.undo()
    spoil(monkeypatch, range(1, 13))
    with pytest.raises(UserError, match="10 steps in a row"):
        run(configs["dropout"], tmp_path, **{f"{UNIT}.on_nan": "skip"})
