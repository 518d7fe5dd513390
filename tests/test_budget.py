"""Budgets of time and of structures: what uses them, and what ends with them."""

from __future__ import annotations

import csv
import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from escaip_fairchem import UserError
from escaip_fairchem.train import budget
from escaip_fairchem.train.budget import BudgetCallback, BudgetSchedule

if TYPE_CHECKING:
    from pathlib import Path


def test_learning_rate_follows_the_budget():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [w], "lr": rate} for w, rate in zip(weights, (2.0, 0.5), strict=True)]
    optimizer = torch.optim.AdamW(groups)
    schedule = BudgetSchedule(
        optimizer=optimizer, n_iters_per_epoch=7, warmup=0.1, warmup_factor=0.2, lr_min_factor=0.1,
        epochs=None, steps=None, warmup_epochs=3,
    )  # fmt: skip
    expected = {0.0: 0.2, 0.05: 0.6, 0.1: 1.0, 0.55: 0.55, 1.0: 0.1}
    for used, factor in expected.items():
        schedule.used = used
        for _ in range(2):  # a step has no effect of its own
            optimizer.step()
            schedule.step()
            assert schedule.get_last_lr() == pytest.approx([2 * factor, 0.5 * factor])
    state = schedule.state_dict()
    schedule.used = 0.0
    schedule.load_state_dict(state)
    assert schedule.used == 1.0
    assert math.isclose(schedule.factor(), 0.1)


class Driver:
    """What torchtnt and fairchem do around a `BudgetCallback`, with a clock of its own."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.now, self.folder = 0.0, folder
        self.callback = BudgetCallback(**settings)
        self.saved: list[tuple[int, float, dict[str, Any]]] = []
        self.model = torch.nn.Identity()
        schedule = SimpleNamespace(used=0.0, step=lambda: None)
        self.unit = SimpleNamespace(
            model=self.model,
            scheduler=schedule,
            train_progress=SimpleNamespace(num_steps_completed=0),
            eval_unit=SimpleNamespace(last_metrics={"val/cu.val,energy,mae": 0.5}),
        )
        self.stopped = False
        evaluations = SimpleNamespace(_evaluate_every_n_epochs=1)
        self.state = SimpleNamespace(eval_state=evaluations, stop=self._stop)
        self.callback.set_runner_callbacks(self._save, None, str(folder / "checkpoints"))

    def _stop(self) -> None:
        self.stopped = True

    def _save(self, path: str) -> None:
        self.now += 100  # none of which is training
        self.saved.append((int(path.rpartition("_")[2]), self.now, self.callback.state_dict()))

    def train(self, seconds: float = 1.0, structures: int = 3, most: int = 1000) -> None:
        call, args = self.callback, (self.state, self.unit)
        call.on_train_start(*args)
        for _ in range(most):
            if self.stopped:
                break
            self.now += 0.25 * seconds  # the batch is loaded
            call.on_train_get_next_batch_end(*args)
            call.on_train_step_start(*args)
            self.now += 0.75 * seconds
            batch = SimpleNamespace(natoms=torch.ones(structures), pos=torch.zeros(5, 3))
            self.model.train()(batch)
            self.unit.train_progress.num_steps_completed += 1
            call.on_train_step_end(*args)
            if call.wants_evaluation:
                self.now += 40
                self.model.eval()(batch)
                call.on_eval_epoch_end(*args)
                call.on_eval_end(*args)
        call.on_train_end(*args)

    def curve(self) -> list[dict[str, str]]:
        with (self.folder / "curve.csv").open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, Driver]:
    found: dict[str, Driver] = {}
    monkeypatch.setitem(budget.CLOCKS, "cpu", lambda: found["driver"].now)
    return found


def test_only_training_steps_use_the_time(tmp_path, clock):
    driver = clock["driver"] = Driver(tmp_path, seconds=20, evaluations=4)
    driver.train()
    # the first step of a process compiles, so that the 21st ends the 20 s
    assert driver.unit.train_progress.num_steps_completed == 21
    rows = driver.curve()
    assert [float(row["seconds"]) for row in rows] == [5, 10, 15, 20]
    assert [int(row["step"]) for row in rows] == [6, 11, 16, 21]
    assert [int(row["samples"]) for row in rows] == [18, 33, 48, 63]
    assert [row["val_energy_mae"] for row in rows] == ["0.5"] * 4
    assert [step for step, *_ in driver.saved] == [6, 11, 16]
    assert driver.unit.scheduler.used == 1.0
    assert driver.state.eval_state._evaluate_every_n_epochs is None


def test_a_long_step_is_evaluated_once(tmp_path, clock):
    driver = clock["driver"] = Driver(tmp_path, seconds=20, evaluations=10)
    driver.train(seconds=7)
    assert [float(row["seconds"]) for row in driver.curve()] == [7, 14, 21]


def test_structures_as_a_budget(tmp_path, clock):
    driver = clock["driver"] = Driver(tmp_path, samples=30, evaluations=2)
    driver.train(structures=4)
    assert [int(row["samples"]) for row in driver.curve()] == [16, 32]


def test_a_killed_training_has_used_what_its_checkpoint_says(tmp_path, clock):
    first = clock["driver"] = Driver(tmp_path, seconds=20, evaluations=4)
    first.train(most=14)
    step, _, state = first.saved[-1]
    assert (step, state["seconds"], state["samples"]) == (11, 10.0, 33)
    second = clock["driver"] = Driver(tmp_path, seconds=20, evaluations=4)
    second.unit.train_progress.num_steps_completed = step
    second.callback.load_state_dict(state)
    second.train()
    rows = second.curve()
    assert [float(row["seconds"]) for row in rows] == [5, 10, 15, 20]
    assert [int(row["samples"]) for row in rows] == [18, 33, 51, 66]  # its first step is free too
    third = clock["driver"] = Driver(tmp_path, seconds=20, evaluations=4)
    third.unit.train_progress.num_steps_completed = second.unit.train_progress.num_steps_completed
    third.callback.load_state_dict(second.callback.state_dict())
    third.train()
    assert third.stopped
    assert third.curve() == rows


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "give one of them"),
        ({"seconds": 1.0, "samples": 3}, "give one of them"),
        ({"seconds": -1.0}, "positive"),
        ({"seconds": 1.0, "clock": "sun"}, "one of cpu, wall"),
        ({"seconds": 1.0, "evaluations": 0}, "positive whole number"),
    ],
)
def test_refused_budgets(settings, message):
    with pytest.raises(UserError, match=message):
        BudgetCallback(**settings)
