"""What a training shows and writes while it runs: bar, lines, rates, the learning curve."""

from __future__ import annotations

import os
import pty
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from escaip_fairchem import display
from escaip_fairchem.errors import UserError
from escaip_fairchem.train import progress, speed
from escaip_fairchem.train.callbacks import MetricsCallback, read_metrics
from escaip_fairchem.train.progress import ProgressCallback, total_steps
from escaip_fairchem.train.speed import SpeedCallback

ATOMS, STEPS = 100, 6


class Clock:
    """Time that passes only when told."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Unit:
    """What the callbacks read of a training unit; its model is called as fairchem calls it."""

    def __init__(self) -> None:
        self.accumulate = 1
        core = torch.nn.Identity()
        self.model = torch.nn.Module()
        self.model.module = core
        self.train_progress = SimpleNamespace(num_steps_completed=0, num_epochs_completed=0)
        self.eval_progress = SimpleNamespace(num_steps_completed_in_epoch=0)
        self.eval_unit = SimpleNamespace(last_metrics={})
        self.scheduler = SimpleNamespace(get_last_lr=lambda: [0.1])
        self.last_loss: Any = None
        self.last_samples = 4
        self.last_noise = None


def state(**limits: int | None) -> Any:
    train = {"max_steps": None, "max_epochs": None, "dataloader": range(4), **limits}
    evaluation = SimpleNamespace(dataloader=range(2), max_steps_per_epoch=None)
    return SimpleNamespace(train_state=SimpleNamespace(**train), eval_state=evaluation)


def train(callback: Any, clock: Clock, steps: int = STEPS) -> Unit:
    """Half a second of loading and half of computing a step, a minute of all else."""
    unit, run = Unit(), state(max_steps=steps)
    callback.on_train_start(run, unit)
    for step in range(steps):
        clock.now += 0.5
        callback.on_train_get_next_batch_end(run, unit)
        clock.now += 20  # a checkpoint
        callback.on_train_step_start(run, unit)
        clock.now += 30 if step == 0 else 0.5  # the first step compiles
        unit.model.module(SimpleNamespace(pos=torch.zeros(ATOMS, 3)))
        unit.last_loss = torch.tensor(1.5)
        unit.train_progress.num_steps_completed += 1
        callback.on_train_step_end(run, unit)
        callback.on_eval_start(run, unit)
        for batch in range(2):
            clock.now += 20
            unit.eval_progress.num_steps_completed_in_epoch = batch + 1
            callback.on_eval_step_end(run, unit)
        callback.on_eval_end(run, unit)
    callback.on_train_end(run, unit)
    return unit


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    monkeypatch.setattr(display, "time", clock)
    return clock


def test_rate_is_that_of_training_alone(clock: Clock) -> None:
    callback = SpeedCallback()
    unit = train(callback, clock)
    assert callback.recent() == pytest.approx((1.0, ATOMS))
    assert (callback.steps, callback.atoms) == (STEPS - 1, (STEPS - 1) * ATOMS)
    assert callback.seconds == pytest.approx(STEPS - 1)
    assert not unit.model.module._forward_pre_hooks


def test_evaluation_does_not_count_as_training(clock: Clock) -> None:
    callback, unit = SpeedCallback(), Unit()
    callback.on_train_start(state(), unit)
    unit.model.module.eval()
    unit.model.module(SimpleNamespace(pos=torch.zeros(ATOMS, 3)))
    callback.on_train_step_end(state(), unit)
    assert callback.atoms == 0


@pytest.mark.parametrize(
    "steps, epochs, expected", [(10, None, 10), (None, 3, 12), (10, 2, 8), (None, None, None)]
)
def test_total(steps: int | None, epochs: int | None, expected: int | None) -> None:
    run = state(max_steps=steps, max_epochs=epochs)
    assert total_steps(run, Unit()) == expected


def test_total_with_accumulation() -> None:
    """Four batches in an epoch, three a step: two steps."""
    unit = Unit()
    unit.accumulate = 3
    assert total_steps(state(max_epochs=5), unit) == 10


def test_lines_of_a_log_file(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps end after 50.5 s, 111.5 s and every 61 s from there."""
    train(ProgressCallback(line_seconds=90), clock)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert "\r" not in out
    assert [line.split(",")[0] for line in lines] == [
        "training: 2/6 (33%)",
        "training: 4/6 (67%)",
        "training: 6/6 (100%)",
    ]
    assert "1 steps/s, 100 atoms/s, loss 1.5" in lines[0]
    assert "01:52 passed, 03:43 left" in lines[0]
    assert "03:54 passed, 01:57 left" in lines[1]


def test_off(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    train(ProgressCallback(enabled=False), clock)
    assert capsys.readouterr() == ("", "")


def test_no_line_of_other_ranks(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.distutils, "is_master", lambda: False)
    train(ProgressCallback(line_seconds=0), clock)
    assert capsys.readouterr() == ("", "")


def read_all(terminal: int) -> str:
    """What is written to a terminal until it is closed, which a pty reports as an error."""
    parts = []
    try:
        while part := os.read(terminal, 4096):
            parts.append(part)
    except OSError:
        pass
    return b"".join(parts).decode()


@pytest.mark.parametrize("columns", [80, 0])
def test_bar_of_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    import fcntl
    import struct
    import termios

    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(writer, "w") as terminal, ThreadPoolExecutor() as pool:
        shown = pool.submit(read_all, reader)
        monkeypatch.setattr(sys, "stderr", terminal)
        train(ProgressCallback(), clock)
        terminal.close()
        shown = shown.result(timeout=30)
    os.close(reader)
    frames = [frame for frame in shown.split("\r") if frame.strip()]
    assert "3/6" in shown
    assert "validation" in shown
    assert "1 steps/s, 100 atoms/s, loss 1.5" in shown
    assert "6/6" in frames[-1]
    assert all(len(frame.strip("\n\x1b[A")) <= (columns or 100) for frame in frames)


def test_columns_that_come_late(tmp_path: Any) -> None:
    """A metric that the first rows do not have gets its column, and they keep their values."""
    callback, unit = MetricsCallback(every_n_steps=1), Unit()
    callback.set_runner_callbacks(None, None, str(tmp_path / "checkpoints"))
    callback.on_train_start(state(), unit)
    unit.last_loss, unit.train_progress.num_steps_completed = torch.tensor(2.0), 1
    callback.on_train_step_end(state(), unit)
    unit.eval_unit.last_metrics = {"val/loss": 3.0, "val/a.val,efwt": 0.5, "val/epoch": 0.0}
    callback.on_eval_epoch_end(state(), unit)
    first, second = read_metrics(tmp_path / "metrics.csv")
    assert first["train_loss"] == 2.0
    assert "val_loss" not in first
    assert (first["samples"], second["samples"]) == (4, 4)
    assert (second["val_loss"], second["val_efwt"]) == (3.0, 0.5)
    assert "train_loss" not in second


def test_tensorboard_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"escaip-fairchem\[tensorboard\]"):
        MetricsCallback(tensorboard=True)
