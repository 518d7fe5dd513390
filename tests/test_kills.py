"""Signals to the `fairchem` command, and the end of processes without any notice."""

from __future__ import annotations

import os
import select
import shutil
import signal
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from escaip_fairchem.data.sample import make_sample
from escaip_fairchem.train.callbacks import read_metrics
from escaip_fairchem.train.lock import holder
from escaip_fairchem.train.status import read_status
from fork_runs import Run, killed_at_random
from helpers import SMALL

if TYPE_CHECKING:
    from collections.abc import Callable

RECIPE = Path(__file__).parents[1] / "configs" / "oc20" / "escaip_2m.yml"
KILLS = int(os.environ.get("ESCAIP_KILLS", "1"))
STEPS = 12
SETTINGS = [
    *("cluster=cpu", "backbone=tiny", "dataset=sample", "epochs=null", f"steps={STEPS}"),
    *("max_atoms=38", "checkpoint_every_n_steps=3", "evaluate_every_n_steps=4", "progress=false"),
    *("++backbone.attention_dropout=0.1", "job.timestamp_id=one", "job.run_dir=runs"),
    *(f"++backbone.{name}={value}" for name, value in {**SMALL, "num_layers": 1}.items()),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    make_sample("oc20", folder / "data" / "oc20" / "sample", n_frames=12)
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> tuple[Any, float]:
    """What a run ends with, and the seconds that it takes."""
    start = time.monotonic()
    assert Run(folder, str(RECIPE), *SETTINGS).wait() == 0
    took = time.monotonic() - start
    ends = result(folder)
    # to be composed once only
    (folder / "config.yaml").write_text((run_of(folder) / "canonical_config.yaml").read_text())
    shutil.rmtree(run_of(folder))
    return ends, took


def run_of(folder: Path) -> Path:
    return folder / "runs" / "one"


def result(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Weights, their average, and the rows of metrics.csv but for the time."""
    path = run_of(folder) / "checkpoints" / "final" / "inference_ckpt.pt"
    checkpoint = torch.load(path, weights_only=False)
    rows = read_metrics(run_of(folder) / "metrics.csv")
    for row in rows:
        del row["wall_time_s"]
    average = {f"ema.{name}": value for name, value in checkpoint.ema_state_dict.items()}
    return checkpoint.model_state_dict | average, rows


def assert_same(ours: Any, theirs: Any) -> None:
    assert [name for name in theirs[0] if not torch.equal(ours[0][name], theirs[0][name])] == []
    assert ours[1] == theirs[1]


def steps_done(folder: Path, steps: int) -> Callable[[], bool]:
    return lambda: any(
        path.name.startswith("step_") and int(path.name[5:]) >= steps
        for path in run_of(folder).glob("checkpoints/step_*")
    )


def test_killed_at_any_moment(folder: Path, undisturbed: tuple[Any, float]) -> None:
    """Start-up, steps, evaluations and checkpoints among them."""
    whole, took = undisturbed
    for code in killed_at_random(folder, "config.yaml", took, KILLS):
        if code == 0:  # it was done; the next begins anew
            assert_same(result(folder), whole)
            assert read_status(run_of(folder)).state == "finished"
            shutil.rmtree(run_of(folder))
        else:
            assert read_status(run_of(folder)).state in ("absent", "dead", "finished")


def test_control_c(folder: Path, undisturbed: tuple[Any, float]) -> None:
    """The first saves and stops; the printed command goes on as it began.

    Meanwhile the run is locked against a second one, which has other settings.
    """
    run = Run(folder, "config.yaml")
    run.when(lambda: read_status(run_of(folder)).state == "running")
    assert holder(run_of(folder))["pid"] == run.pid
    run.send_signal(signal.SIGSTOP)  # it would end first where the machine is busy
    second = Run(folder, "config.yaml", "job.seed=7", log="second")
    assert second.wait() == 1
    run.send_signal(signal.SIGCONT)
    assert f"is in use by process {run.pid}" in second.said().strip().splitlines()[-1]
    run.send_signal(signal.SIGINT)
    assert run.wait() == 130
    status = read_status(run_of(folder))
    assert (status.state, status.reason) == ("interrupted", "SIGINT")
    command = run.said().rpartition("fairchem -c ")[2].split()[0]
    assert command == "runs/one/canonical_config.yaml"
    assert Run(folder, command).wait() == 0
    assert_same(result(folder), undisturbed[0])
    shutil.rmtree(run_of(folder))


def test_closed_terminal(folder: Path, undisturbed: tuple[Any, float]) -> None:
    """It saves and stops, though the bar of progress can no longer be written."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    run = Run(folder, "config.yaml", "runner.callbacks.2.enabled=true", errors=os.ttyname(theirs))
    os.read(ours, 1000)
    os.close(theirs)
    while read_status(run_of(folder)).state != "running":
        if select.select([ours], [], [], 0.01)[0]:
            os.read(ours, 1000)
    run.send_signal(signal.SIGSTOP)  # a terminal sends the signal as it closes
    os.close(ours)
    run.send_signal(signal.SIGHUP)
    run.send_signal(signal.SIGCONT)
    assert run.wait() == 129
    assert read_status(run_of(folder)).reason == "SIGHUP"
    assert "go on by: fairchem -c runs/one/canonical_config.yaml" in run.said()
    assert Run(folder, "config.yaml").wait() == 0
    assert_same(result(folder), undisturbed[0])
    shutil.rmtree(run_of(folder))


@pytest.fixture
def pair(folder: Path, undisturbed: Any) -> Callable[[], list[Run]]:
    def start() -> list[Run]:
        port = get_free_port()
        settings = ["config.yaml", "job.scheduler.ranks_per_node=2", "runner.max_steps=5"]
        return [Run(folder, *settings, rank=rank, port=port) for rank in range(2)]

    return start


@pytest.mark.full  # on SLURM by every `make test-slurm`
def test_two_ranks_stop_together(folder: Path, pair: Callable[[], list[Run]]) -> None:
    """One of them gets the signal; both save, and end with its exit code."""
    runs = pair()
    assert [run.wait() for run in runs] == [0, 0]
    whole = result(folder)
    shutil.rmtree(run_of(folder))
    runs = pair()
    runs[0].when(steps_done(folder, 3))
    runs[1].send_signal(signal.SIGTERM)
    codes = [run.wait() for run in runs]
    if codes != [0, 0]:  # the last step was not done yet
        assert codes == [143, 143]
        assert read_status(run_of(folder)).state == "interrupted"
        assert [run.wait() for run in pair()] == [0, 0]
    assert_same(result(folder), whole)
    shutil.rmtree(run_of(folder))
