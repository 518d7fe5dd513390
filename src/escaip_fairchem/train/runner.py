"""fairchem's training runner, for runs that are interrupted, and mistakes in one line."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import torch
from fairchem.core.common import distutils
from fairchem.core.components.train import train_runner
from omegaconf import Container, OmegaConf

from escaip_fairchem.errors import UserError
from escaip_fairchem.train.checkpoints import WriteFailed, write_checkpoint
from escaip_fairchem.train.record import Record
from escaip_fairchem.train.signals import Signals, Stop, requeue
from escaip_fairchem.train.start import Start, find_start, save_rank, size_of
from escaip_fairchem.train.status import ALIVE
from escaip_fairchem.train.status_callback import StatusCallback
from escaip_fairchem.train.stopping import StoppingCallback
from escaip_fairchem.train.summary import SUMMARY_NAME, summary_table

if TYPE_CHECKING:
    from collections.abc import Iterator


def instantiate(config: Any) -> Any:
    """Build what a configuration describes; a user's mistake surfaces as itself.

    Hydra wraps every exception in its own, whose last line is a configuration key, so that the
    message of a `UserError` would be buried in the middle of the traceback.

    Args:
        config: A configuration; anything else is returned as it is.

    Raises:
        UserError: When one is the cause of Hydra's exception.
    """
    if not isinstance(config, Container | dict | list):
        return config
    try:
        return hydra.utils.instantiate(config)
    except Exception as error:
        mistake = _user_error_behind(error)
        if mistake is None:
            raise
    raise mistake from None


def _user_error_behind(error: BaseException | None) -> UserError | None:
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return UserError(*error.args) if error is not None else None


def _reason(error: BaseException) -> str:
    """The last line of an error; of the first one, where others are raised from it."""
    while error.__cause__ is not None:  # Hydra's own message ends in a configuration key
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[-1]


def share_cores() -> None:
    """Give each rank of a machine its part of the cores, unless OMP_NUM_THREADS is set.

    fairchem's local launcher leaves every rank as many threads as the machine has cores: two
    ranks on two cores then take 1.6 times as long for a step.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))


class TrainEvalRunner(train_runner.TrainEvalRunner):
    """`fairchem.core`'s runner that builds its parts itself, and survives interruptions.

    Use it with ``_recursive_: false``, which hands over the configuration of the parts instead
    of the parts. Objects are accepted too. fairchem calls `load_state` before `run`, so the
    parts exist before anything needs them.

    One process group trains into the folder of a run at a time. On SIGTERM, SIGHUP, SIGINT, and the
    signal by which submitit asks a job to end, all ranks write a checkpoint together between two
    steps and stop; a job of submitit is requeued if the signal was its own.

    Args:
        stop_at_step: Where to pause, or None; what remains is as if the run had not paused.
        parts: The arguments of fairchem's runner, each as a configuration or as an object.
    """

    def __init__(self, *, stop_at_step: int | None = None, **parts: Any) -> None:
        if stop_at_step is not None and (not isinstance(stop_at_step, int) or stop_at_step < 0):
            raise UserError(f"stop_at_step must be a number of steps or null, got {stop_at_step}")
        self.stop_at_step = stop_at_step
        self._parts: dict[str, Any] | None = parts
        self._signals = Signals()
        self._start: Start | None = None

    def load_state(self, checkpoint_location: str | None) -> None:
        """Build the parts, then take up a checkpoint: the given one, else the newest, else none.

        Args:
            checkpoint_location: Folder of a checkpoint, or None.

        Raises:
            UserError: Another process trains into the folder, the checkpoint is damaged, or a
                setting is wrong.
        """
        self._signals.install()
        self._record = Record(Path(self.job_config.metadata.checkpoint_dir).parent)
        with self._recorded():
            self._start = find_start(self._record.run, checkpoint_location)
            if checkpoint_location is None and self._is_over(self._start):
                return
            self._build()
            if self._start.path is not None:
                logging.info(f"going on from {self._start.path}")
                self.train_eval_unit.load_state(str(self._start.path))

    def run(self) -> None:
        """Train.

        Raises:
            SystemExit: After an interruption, with 128 and the number of the signal.
        """
        self._signals.install()  # once more, over the handlers of fairchem
        with self._recorded(last=True):
            if self._parts is not None and self._is_over(self._start):
                self._say_over()
            else:
                self._train()

    def save_state(self, checkpoint_location: str, is_preemption: bool = False) -> bool:
        """Write a checkpoint, together with the other ranks.

        Where there is no space for it, training goes on, and tries again at the next one; ``final``
        must be written.

        Args:
            checkpoint_location: Folder of the checkpoint.
            is_preemption: submitit asks when it requeues a job. The checkpoint was written before.

        Returns:
            Whether it was written; False where submitit asks, so that it names none to begin with.

        Raises:
            UserError: ``final`` could not be written.
        """
        if is_preemption:
            return False
        failure = self._save(Path(checkpoint_location))
        if failure and Path(checkpoint_location).name == "final":
            raise UserError(f"{failure}; free some, then go on by: {self._record.command()}")
        if failure and distutils.is_master():
            logging.warning(f"{failure}; training goes on")
        return failure is None

    def _build(self) -> None:
        if self._parts is None:
            return
        share_cores()
        unit = self._parts.get("train_eval_unit")
        if OmegaConf.is_dict(unit) and "job_config" in unit:
            # canonical_config.yaml holds a copy: of the run that wrote it, and its folder
            unit.job_config = self.job_config
        parts = {name: instantiate(config) for name, config in self._parts.items()}
        super().__init__(**parts)
        self._parts = None
        unit = self.train_eval_unit
        unit.signals = unit.eval_unit.signals = self._signals

    def _train(self) -> None:
        own = [*self.callbacks, StatusCallback(self._record.run, self._record.status)]
        start, seed = self._start, int(self.job_config.get("seed", 0))
        start.restore_callbacks(own)
        self._saved = start.path and (start.path, start.step, start.evaluation_due)
        self._stopping = StoppingCallback(
            self.stop_at_step,
            own,
            lambda: start.restore(seed),
            evaluation_due=start.evaluation_due,
        )
        self.callbacks = [*own, self._stopping]
        try:
            super().run()
        except Stop as stop:
            self._stop(stop)

    def _save(self, path: Path) -> str | None:
        """Write a checkpoint unless it is there already; why it could not be written."""
        unit, progress = self.train_eval_unit, self.train_eval_unit.train_progress
        about = {
            "step": progress.num_steps_completed,
            "epoch": progress.num_epochs_completed,
            "evaluation_due": self._stopping.evaluation_due,
        }
        this = (path, about["step"], about["evaluation_due"])
        if self._saved == this:
            return None

        def fill(folder: Path) -> None:
            unit.save_state(str(folder))
            save_rank(folder, self.callbacks)

        keep = getattr(self.checkpoint_callback, "max_saved_checkpoints", 2)
        try:
            write_checkpoint(path, fill, about, keep)
        except WriteFailed as error:
            free = shutil.disk_usage(path.parent).free / 2**20
            needed = size_of(unit) / 2**20
            return (
                f"checkpoint {path} could not be written ({error}; {free:,.0f} MiB are free, "
                f"about {needed:,.0f} MiB are needed)"
            )
        self._saved = this
        return None

    def _stop(self, stop: Stop) -> None:
        step = self.train_eval_unit.train_progress.num_steps_completed
        folder = Path(self.job_config.metadata.checkpoint_dir)
        # before the first step there is nothing to save
        failure = self._save(folder / f"step_{step}") if step else None
        self._record.end(stop.state, str(stop), step)
        handler = self._signals.requeue_handler()
        if stop.number == self._signals.requeue and handler is not None:
            if failure:
                logging.error(failure)
            progress = step > self._start.step
            requeue(handler, stop.number, rank=distutils.get_rank(), progress=progress)
        if failure:
            raise UserError(f"{failure}; free some, then go on by: {self._record.command()}")
        if distutils.is_master():
            print(f"{stop.state} ({stop}) at step {step}; go on by: {self._record.command(stop)}")
        if stop.number is not None:
            raise SystemExit(128 + stop.number)

    def _is_over(self, start: Start) -> bool:
        """Whether nothing is left to do, not even the summary."""
        if self._parts is None or start.path is None or start.path.name != "final":
            return False
        limits = (
            (start.step, self._parts.get("max_steps")),
            (start.epoch, self._parts.get("max_epochs", 1)),
        )
        reached = any(limit is not None and done >= limit for done, limit in limits)
        return reached and (self._record.run / SUMMARY_NAME).is_file()

    def _say_over(self) -> None:
        if distutils.is_master():
            summary = json.loads((self._record.run / SUMMARY_NAME).read_text())
            print(f"{self._record.run} had finished; nothing is left to do", flush=True)
            print(summary_table(summary), flush=True)

    @contextmanager
    def _recorded(self, *, last: bool = False) -> Iterator[None]:
        """Keep status.json, the lock and the handlers of signals right however a part ends."""
        try:
            yield
            if last and self._record.status.state in ALIVE:
                self._record.end("finished")
        except BaseException as error:
            last = True
            code = signal.SIGINT if isinstance(error, KeyboardInterrupt) else None
            if code is not None:
                self._record.end("interrupted", "stopped at once")
                raise SystemExit(128 + code) from None
            if self._record.status.state in ALIVE or not isinstance(error, SystemExit):
                self._record.end("failed", _reason(error))
            raise
        finally:
            if last:
                self._record.close()
                self._signals.remove()
