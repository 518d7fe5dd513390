"""The learning curve of a run, written to metrics.csv whatever logger is used."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem.core.common import distutils
from torchtnt.framework.callback import Callback

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchtnt.framework import State

    from escaip_fairchem.train.unit import TrainEvalUnit

FILE_NAME = "metrics.csv"
_COLUMNS = ["step", "epoch", "lr", "wall_time_s", "train_loss"]
_UNITS = {"energy": "eV", "forces": "eV/A", "stress": "eV/A^3"}


class MetricsCallback(Callback):
    """Writes metrics.csv into the folder of the run and prints a table at the end.

    A row is written every `every_n_steps` steps (mean training loss on the first rank since the
    row before) and after every evaluation. A run that is resumed continues its file; rows later
    than the checkpoint it resumes from are dropped.

    Args:
        every_n_steps: Steps between rows with the training loss.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self.path: Path | None = None
        self._columns: list[str] = []
        self._losses: list[Any] = []
        self._start = 0.0

    def set_runner_callbacks(self, _save: Callable, _load: Callable, checkpoint_dir: str) -> None:
        """Learn where the run lives; the runner calls this before training.

        Args:
            checkpoint_dir: Folder of the checkpoints, inside the folder of the run.
        """
        self.path = Path(checkpoint_dir).parent / FILE_NAME

    def on_train_start(self, state: State, unit: TrainEvalUnit) -> None:
        """Start the file, or take up the rows of the run that is being resumed."""
        done = unit.train_progress.num_steps_completed
        rows = [row for row in read_metrics(self.path) if row["step"] <= done]
        self._start = time.monotonic() - (rows[-1]["wall_time_s"] if rows else 0.0)
        self._columns = [*_COLUMNS, *_metric_columns(state, unit)]
        if distutils.is_master():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(rows, mode="w")

    def on_train_step_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Collect the loss; write the mean of the last steps."""
        # Kept as it is: reading a tensor on a GPU would stop the GPU at every step.
        self._losses.append(unit.last_loss)
        if unit.train_progress.num_steps_completed % self.every_n_steps == 0:
            self._add_row(unit, {})

    def on_eval_epoch_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Write the metrics of the evaluation that has just ended."""
        self._add_row(unit, column_names(unit.eval_unit.last_metrics))

    def on_train_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Print the last evaluation."""
        metrics = unit.eval_unit.last_metrics
        if metrics and distutils.is_master():
            print(summary_table(column_names(metrics), unit.train_progress.num_steps_completed))
            print(f"learning curve: {self.path}", flush=True)

    def _add_row(self, unit: TrainEvalUnit, metrics: dict[str, float]) -> None:
        losses = [float(loss) for loss in self._losses]
        self._losses = []
        row = {
            "step": unit.train_progress.num_steps_completed,
            "epoch": unit.train_progress.num_epochs_completed,
            "lr": unit.scheduler.get_last_lr()[0],
            "wall_time_s": round(time.monotonic() - self._start, 2),
            "train_loss": sum(losses) / len(losses) if losses else "",
            **metrics,
        }
        if distutils.is_master():
            self._write([row], mode="a")

    def _write(self, rows: list[dict[str, Any]], mode: str) -> None:
        with self.path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, self._columns, extrasaction="ignore")
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)


def _metric_columns(state: State, unit: TrainEvalUnit) -> list[str]:
    names = unit.eval_unit.metric_names(state.eval_state.dataloader.dataset.dataset_names)
    return list(column_names(dict.fromkeys(["val/loss", *names], 0.0)))


def column_names(metrics: dict[str, float]) -> dict[str, float]:
    """Short names for fairchem's metrics: val_energy_mae for ``val/oc20.val,energy,mae``.

    Args:
        metrics: Values by fairchem's names.

    Returns:
        Values by column name. With several data sets of one split, their full names are kept.
    """
    parts = {name: name.removeprefix("val/").split(",") for name in metrics if "," in name}
    datasets = {dataset for dataset, *_ in parts.values()}
    splits = {dataset: dataset.rpartition(".")[2] for dataset in datasets}
    unique = len(set(splits.values())) == len(datasets)
    named = {
        "_".join([splits[dataset] if unique else dataset, *rest]): metrics[name]
        for name, (dataset, *rest) in parts.items()
    }
    return {"val_loss": metrics["val/loss"], **named}


def summary_table(metrics: dict[str, float], steps: int) -> str:
    """Text table of an evaluation.

    Args:
        metrics: Values by column name.
        steps: Steps trained.

    Returns:
        The table, one metric a line, with units where they are known.
    """
    lines = [f"validation after {steps} steps"]
    for name, value in metrics.items():
        unit = next((unit for key, unit in _UNITS.items() if f"_{key}_" in name), "")
        unit = "" if "cosine" in name else f"{unit}/atom" if "per_atom" in name else unit
        lines.append(f"  {name:<32} {value:12.5f} {unit}".rstrip())
    return "\n".join(lines)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.csv.

    Args:
        path: The file; it need not exist.

    Returns:
        One dictionary a row, numbers as numbers, without the cells that are empty.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {name: _number(cell) for name, cell in row.items() if cell}
            for row in csv.DictReader(file)
        ]


def _number(cell: str) -> int | float:
    return int(cell) if cell.isdigit() else float(cell)
