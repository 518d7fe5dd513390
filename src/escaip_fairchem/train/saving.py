"""fairchem's training unit, with checkpoints that hold what this package adds to it."""

from __future__ import annotations

import logging
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from fairchem.core.common import distutils
from fairchem.core.units.mlip_unit import mlip_unit
from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint
from omegaconf import OmegaConf
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from escaip_fairchem.train.checkpoints import published


class SavedUnit(mlip_unit.MLIPTrainEvalUnit):
    """The part of `TrainEvalUnit` that writes and reads its state."""

    scaler: torch.amp.GradScaler
    shard_optimizer: bool
    _steps_per_epoch: int

    def save_state(self, checkpoint_location: str) -> None:
        """Write a checkpoint, and what predicts with it; the caller makes sure that it is whole.

        fairchem reads its checkpoint again to make the latter, and writes it twice.

        Args:
            checkpoint_location: Folder to write.
        """
        folder, config = Path(checkpoint_location), deepcopy(self.run_config)
        config["job"]["runner_state_path"] = str(published(folder))
        unit = config["runner"]["train_eval_unit"]
        if self.get_finetune_model_config() is not None:
            unit["model"] = _plain(self.get_finetune_model_config())
        state = self.state_dict()
        dcp.save({"unit_state": state}, checkpoint_id=checkpoint_location)
        if not distutils.is_master():
            return
        OmegaConf.save(config, folder / mlip_unit.UNIT_RESUME_CONFIG)
        if self.save_inference_ckpt:
            model, average = (
                {name: tensor.cpu() for name, tensor in state[key].items()}
                for key in ("model", "ema")
            )
            checkpoint = MLIPInferenceCheckpoint(
                model_config=unit["model"],
                model_state_dict=model,
                ema_state_dict=average,
                tasks_config=unit["tasks"],
            )
            # a stream of Python tells why it cannot be written
            with (folder / mlip_unit.UNIT_INFERENCE_CHECKPOINT).open("wb") as file:
                torch.save(checkpoint, file)

    @cached_property
    def run_config(self) -> dict[str, Any]:
        """Configuration of the run, read once: a command that is refused overwrites the file."""
        return _plain(OmegaConf.load(self.job_config.metadata.config_path))

    def state_dict(self) -> dict[str, Any]:
        """What fairchem saves, the loss scale of fp16, and the length of an epoch."""
        state = super().state_dict()
        state["steps_per_epoch"] = self._steps_per_epoch
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state.

        With another number of ranks or batches per step, training goes on at the same part of the
        epoch; the schedule of the learning rate keeps the length it was made for.

        Args:
            state_dict: From `state_dict`.
        """
        set_model_state_dict(self.model, state_dict["model"])
        set_model_state_dict(self.ema_model, state_dict["ema"])
        set_optimizer_state_dict(
            self.model,
            self.optimizer,
            state_dict["optim"],
            # a rank with a part of the states lacks the others
            options=StateDictOptions(strict=not self.shard_optimizer),
        )
        progress = dict(state_dict["progress"])
        saved, now = state_dict.get("steps_per_epoch"), self._steps_per_epoch
        if saved and saved != now:
            done = progress["num_steps_completed_in_epoch"]
            progress["num_steps_completed_in_epoch"] = min(done * now // saved, now - 1)
            logging.warning(f"an epoch has {now} steps, {saved} when the checkpoint was saved")
        self.train_progress.load_state_dict(progress)
        self.scheduler.load_state_dict(state_dict["scheduler"])
        if "scaler" in state_dict:
            self.scaler.load_state_dict(state_dict["scaler"])

    def _execute_load_state(self, checkpoint_location: str) -> None:
        state = self.state_dict()
        saved = dcp.FileSystemReader(checkpoint_location).read_metadata().state_dict_metadata
        for key in ("scaler", "steps_per_epoch"):  # not in every checkpoint
            if not any(name.startswith(f"unit_state.{key}") for name in saved):
                state.pop(key, None)
        dcp.load({"unit_state": state}, checkpoint_id=checkpoint_location)
        self.load_state_dict(state)
        logging.info(f"Done loading checkpoint from {checkpoint_location}")


def _plain(config: Any) -> Any:
    """A configuration without OmegaConf, whose copies are slow."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
