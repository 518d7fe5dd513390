"""The learning curve of a run: metrics.csv whatever logger is used, TensorBoard on request."""

from __future__ import annotations

import csv
import logging
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem.core.common import distutils
from torchtnt.framework.callback import Callback

from escaip_fairchem.errors import UserError
from escaip_fairchem.train.checkpoints import gathered, sync
from escaip_fairchem.train.metrics import FILE_NAME, read_metrics

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchtnt.framework import State

    from escaip_fairchem.train.unit import TrainEvalUnit

_COLUMNS = ["step", "epoch", "lr", "wall_time_s", "train_loss", "samples"]


class MetricsCallback(Callback):
    """Writes metrics.csv into the folder of the run, and the same numbers for TensorBoard.

    A row is written every `every_n_steps` steps (mean training loss on the first rank since the
    row before, with denoising also the mean length of the error of the noise, structures seen by
    all ranks so far) and after every evaluation. A run that is resumed continues its file, with the
    rows and losses that it had when the checkpoint was written.

    Args:
        every_n_steps: Steps between rows with the training loss.
        tensorboard: Whether to write event files too, into logs/tensorboard of the run.

    Raises:
        UserError: If TensorBoard is wanted and not installed.
    """

    def __init__(self, every_n_steps: int = 10, tensorboard: bool = False) -> None:
        self.every_n_steps = every_n_steps
        self.path: Path | None = None
        self._board_type = _tensorboard() if tensorboard else None
        self._board: Any = None
        self._columns: list[str] = []
        self._losses: list[Any] = []
        self._noise: list[Any] = []  # sums and numbers, see `Denoising.error`
        self._unwritten: list[dict[str, Any]] = []
        self._rows = 0
        self._samples: int | None = 0  # of all ranks, up to the last row; None if not known
        self._new_samples = 0  # of this rank, since
        self._resumed: dict[str, Any] | None = None
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
        if self._resumed is not None:
            rows, self._losses = rows[: self._resumed["rows"]], list(self._resumed["losses"])
            # a checkpoint of an earlier version has not counted them
            self._samples, self._new_samples = self._resumed.get("samples", (None, 0))
            self._noise = list(self._resumed.get("noise", []))
        self._rows = len(rows)
        self._start = time.monotonic() - (rows[-1]["wall_time_s"] if rows else 0.0)
        self._columns = list(dict.fromkeys([*_COLUMNS, *(name for row in rows for name in row)]))
        if not distutils.is_master():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write(rows, mode="w")
        if self._board_type is not None:
            # events of later steps, of the run that is being resumed, are hidden
            folder = self.path.parent / "logs" / "tensorboard"
            self._board = self._board_type(str(folder), purge_step=done + 1 if done else None)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; the rows so far are on the disk before it is."""
        self._flush()
        if distutils.is_master() and self.path.exists():
            sync(self.path)
        return {
            "rows": self._rows,
            "losses": [float(loss) for loss in self._losses],
            "samples": (self._samples, self._new_samples),
            "noise": [[float(number) for number in pair] for pair in self._noise],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Args:
            state: From `state_dict`.
        """
        self._resumed = state

    def on_train_step_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Collect the loss; write the mean of the last steps."""
        # Kept as it is: reading a tensor on a GPU would stop the GPU at every step.
        self._losses.append(unit.last_loss)
        if unit.last_noise is not None:
            self._noise.append(unit.last_noise)
        self._new_samples += unit.last_samples
        if unit.train_progress.num_steps_completed % self.every_n_steps == 0:
            self._add_row(unit, {})

    def on_eval_epoch_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Write the metrics of the evaluation that has just ended."""
        self._add_row(unit, column_names(unit.eval_unit.last_metrics))

    def on_train_end(self, state: State, unit: TrainEvalUnit) -> None:
        """Write out what is still held."""
        self._flush()
        if self._board is not None:
            self._board.close()

    def on_exception(self, state: State, unit: TrainEvalUnit, exc: BaseException) -> None:
        """The same, of a run that is interrupted."""
        self.on_train_end(state, unit)

    def _add_row(self, unit: TrainEvalUnit, metrics: dict[str, float]) -> None:
        # a step that was left out may have none
        losses = [value for value in map(float, self._losses) if math.isfinite(value)]
        self._losses = []
        total, moved = (sum(float(pair[i]) for pair in self._noise) for i in range(2))
        self._noise = []
        self._rows += 1
        seen, self._new_samples = sum(gathered(self._new_samples)), 0
        if self._samples is not None:
            self._samples += seen
        row = {
            "step": unit.train_progress.num_steps_completed,
            "epoch": unit.train_progress.num_epochs_completed,
            "lr": unit.scheduler.get_last_lr()[0],
            "wall_time_s": round(time.monotonic() - self._start, 2),
            **({"train_loss": sum(losses) / len(losses)} if losses else {}),
            **({"train_noise_error": total / moved} if moved else {}),
            **({} if self._samples is None else {"samples": self._samples}),
            **metrics,
        }
        if not distutils.is_master():
            return
        self._unwritten.append(row)
        self._flush()
        if self._board is not None:
            for name in row.keys() - {"step", "wall_time_s", "samples"}:
                self._board.add_scalar(name.replace("_", "/", 1), row[name], row["step"])

    def _flush(self) -> None:
        """Write the rows that are held; on a full disk they wait for the next ones."""
        rows, known = self._unwritten, self._columns
        if not rows:
            return
        self._columns = list(dict.fromkeys([*known, *(name for row in rows for name in row)]))
        try:
            if self._columns != known or not self.path.exists():
                self._write([*read_metrics(self.path), *rows], mode="w")
            else:
                self._write(rows, mode="a")
            self._unwritten = []
        except OSError as error:
            self._columns = known
            logging.warning(f"{self.path} could not be written ({error.strerror}); tried again")

    def _write(self, rows: list[dict[str, Any]], mode: str) -> None:
        # a file is replaced as a whole, so that no moment is without its rows
        path = self.path if mode == "a" else self.path.with_name(f".{FILE_NAME}.partial")
        before = path.stat().st_size if mode == "a" else 0
        try:
            with path.open(mode, newline="") as file:
                writer = csv.DictWriter(file, self._columns)
                if mode == "w":
                    writer.writeheader()
                writer.writerows(rows)
        except OSError:
            if mode == "a":
                os.truncate(path, before)  # no half row
            raise
        if path != self.path:
            path.replace(self.path)


def _tensorboard() -> Any:
    """The class that writes TensorBoard's event files."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "logger=tensorboard needs TensorBoard: pip install 'escaip-fairchem[tensorboard]'"
        ) from error
    return SummaryWriter


def column_names(metrics: dict[str, float]) -> dict[str, float]:
    """Short names for fairchem's metrics: val_energy_mae for ``val/oc20.val,energy,mae``.

    Args:
        metrics: Values by fairchem's names; those without a data set (speed, epoch) are left out,
            but for the loss.

    Returns:
        Values by column name. With several data sets of one split, their full names are kept.
    """
    parts = {name: name.removeprefix("val/").split(",") for name in metrics if "," in name}
    datasets = {dataset for dataset, *_ in parts.values()}
    splits = {dataset: dataset.rpartition(".")[2] for dataset in datasets}
    unique = len(set(splits.values())) == len(datasets)
    loss = {"val_loss": metrics["val/loss"]} if "val/loss" in metrics else {}
    return loss | {
        "_".join([splits[dataset] if unique else dataset, *rest]): metrics[name]
        for name, (dataset, *rest) in parts.items()
    }
