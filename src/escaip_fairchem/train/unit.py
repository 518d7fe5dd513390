"""fairchem's training unit, for large batches on few GPUs, reduced precision and short runs."""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.common import distutils
from fairchem.core.units.mlip_unit import mlip_unit
from fairchem.core.units.mlip_unit.utils import tf32_context_manager
from torch.nn.parallel import DistributedDataParallel

from escaip_fairchem.data.energies import use_exact_energy
from escaip_fairchem.data.rotation import rotate_all
from escaip_fairchem.errors import UserError
from escaip_fairchem.train.averaging import warmed_up_average
from escaip_fairchem.train.counting import loss_counts, loss_weights, summed
from escaip_fairchem.train.denoising import require_parts
from escaip_fairchem.train.evaluation import EvalUnit, device_type, reduced_precision
from escaip_fairchem.train.later import Later
from escaip_fairchem.train.nonfinite import FiniteCheck
from escaip_fairchem.train.saving import SavedUnit
from escaip_fairchem.train.scales import require_one_scale
from escaip_fairchem.train.sharding import sharded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fairchem.core.datasets.atomic_data import AtomicData
    from torchtnt.framework import State

    from escaip_fairchem.train.denoising import Denoising
    from escaip_fairchem.train.signals import Signals

#: A loss scale below this means gradients that are not finite in any precision.
SMALLEST_SCALE = 1e-6


class TrainEvalUnit(SavedUnit):
    """fairchem's training unit with its own step.

    A step is one move of the optimizer, on `accumulate` batches of every rank. Steps, epochs,
    schedule, logs and checkpoints all count these. The last step of an epoch takes the batches that
    are left. The gradient is that of the losses taken over all batches of the step on all ranks as
    one: means are divided by the number of structures or atoms of them all.

    With `fp16` the loss is scaled so that small gradients do not vanish. Where a gradient overflows
    the scale is halved, and weights, their average, the optimizer and the learning rate stay as
    they are; the step counts, its batches are spent.

    Args:
        args: As for fairchem's unit.
        ema_decay: Largest decay of the average of weights; 0 evaluates the last weights.
        accumulate: Batches per step and rank.
        bf16: Train and evaluate under autocast in bfloat16. Geometry, heads, losses and weights
            stay in float32.
        fp16: The same in float16, with loss scaling, for GPUs without bfloat16.
        shard_optimizer: Share the states of the optimizer out among the ranks.
        rotate: Turn each training structure at random, anew at each step.
        denoising: Corrupt some training structures and learn the noise; None: none.
        on_nan: ``stop`` or ``skip``, where a loss or gradient is not finite; see `FiniteCheck`.
        kwargs: As for fairchem's unit.

    Raises:
        UserError: A setting is out of range, or excludes another.
    """

    #: Of the run; without, nothing stops it.
    signals: Signals | None = None
    #: Structures of the last step, on this rank.
    last_samples: int = 0
    #: Of the last step on this rank, what `Denoising.error` says; None without denoising.
    last_noise: torch.Tensor | None = None

    def __init__(
        self,
        *args: Any,
        ema_decay: float = 0.999,
        accumulate: int = 1,
        bf16: bool = False,
        fp16: bool = False,
        shard_optimizer: bool = False,
        rotate: bool = False,
        denoising: Denoising | None = None,
        on_nan: str = "stop",
        **kwargs: Any,
    ) -> None:
        if ema_decay is None or not 0 <= ema_decay < 1:
            raise UserError(
                f"ema_decay must be at least 0 and below 1, got {ema_decay}; "
                "0 evaluates and saves the last weights"
            )
        if not isinstance(accumulate, int) or accumulate < 1:
            raise UserError(f"accumulate must be a whole number of at least 1, got {accumulate}")
        dtype = reduced_precision(bf16=bf16, fp16=fp16)
        if kwargs.get("train_strategy", "ddp") != "ddp":
            raise UserError(
                "train_strategy must be ddp: fairchem's fsdp reaches none of this model's layers; "
                "shard_optimizer: true shares the optimizer's states out among the ranks"
            )
        if kwargs.get("debug_checksums_save_path"):
            raise UserError("debug_checksums_save_path is not supported; leave it out")
        if shard_optimizer:
            kwargs["optimizer_fn"] = sharded(kwargs["optimizer_fn"])
        super().__init__(*args, ema_decay=ema_decay, bf16=bf16, **kwargs)
        # an empty group, as frozen parts may leave it, would be saved but could not be loaded
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [group for group in groups if group["params"]]
        model = getattr(self.model, "module", self.model)  # of DDP
        require_one_scale(model, self.tasks)
        require_parts(model, denoising)
        self.ema_model.multi_avg_fn = warmed_up_average(ema_decay)
        self.accumulate = accumulate
        self.shard_optimizer = shard_optimizer
        self._rotates, self._denoising = rotate, denoising
        self._finite = FiniteCheck(Path(self.job_config.metadata.config_path).parent, on_nan)
        self._flags = Later()
        self._epoch_is_over = False
        self.autocast_enabled, self.autocast_dtype = dtype is not None, dtype or torch.bfloat16
        self.scaler = torch.amp.GradScaler(device_type(), enabled=fp16)
        self._losses = self._counted = summed(self.tasks)
        if denoising is not None:
            self._losses = denoising.with_noise(self._losses)
            self._counted = denoising.counted(self._losses)
        evaluated = self.eval_unit.model
        self.eval_unit = EvalUnit(
            self.job_config, None, self.tasks, bf16=bf16, fp16=fp16, tf32=self.tf32
        )
        self.eval_unit.setup_train_eval_unit(evaluated)

    def load_scheduler(self, train_dataloader_size: int) -> None:
        """Make the schedule of the learning rate, which counts steps of the optimizer."""
        self._steps_per_epoch = math.ceil(train_dataloader_size / self.accumulate)
        super().load_scheduler(self._steps_per_epoch)

    def on_train_start(self, state: State) -> None:
        """Take up a checkpoint if there is one, and go to its place in the epoch."""
        super().on_train_start(state)
        done = self.train_progress.num_steps_completed_in_epoch
        # so it stopped in the evaluation after the last step
        self._epoch_is_over = done >= self._steps_per_epoch
        # fairchem takes a step for a batch
        start = 0 if self._epoch_is_over else done * self.accumulate
        mlip_unit.set_sampler_state(state, self.train_progress.num_epochs_completed, start)

    def get_next_train_batch(
        self, state: State, data_iter: Iterator[AtomicData]
    ) -> list[AtomicData]:
        """The batches of a step; fewer at the end of an epoch."""
        if self._epoch_is_over:
            self._epoch_is_over = False
            raise StopIteration
        batches = list(islice(data_iter, self.accumulate))
        if not batches:
            raise StopIteration
        return batches

    def train_step(self, state: State, data: list[AtomicData]) -> None:
        """Move the weights once.

        Args:
            state: torchtnt's state.
            data: The batches of this rank.
        """
        self._finite.look()
        self.last_samples = sum(len(batch.natoms) for batch in data)
        self.prepare(data)
        try:
            self.last_loss = self._backward(data)
            moved = self._move(data)
        except UserError:
            raise
        except Exception:
            structures = [sid for batch in data for sid in getattr(batch, "sid", [])]
            logging.error(f"step {self.train_progress.num_steps_completed} failed on {structures}")
            raise
        self._report(data)
        if moved:
            self.scheduler.step()

    def prepare(self, batches: list[AtomicData]) -> None:
        """Rotate and corrupt structures at random, as far as that is wanted.

        Args:
            batches: Of this rank, for the step that is about to begin; their tensors are replaced.
        """
        if not self._rotates and self._denoising is None:
            return
        # what alone decides it
        step, rank = self.train_progress.num_steps_completed, distutils.get_rank()
        place = self.job_config.seed, step, rank
        if self._rotates:
            rotate_all(batches, *place)
        if self._denoising is not None:
            self._denoising.corrupt(batches, self._losses, *place)

    def _backward(self, batches: list[AtomicData]) -> torch.Tensor:
        """Leave the gradient of the step in the parameters; the loss of this rank's batches."""
        device = distutils.get_device_for_local_rank()
        # counted before they go to the GPU, which then never waits for the CPU
        counts = torch.stack([self.counts(batch) for batch in batches]).sum(0)
        flags = counts.new_tensor(self.signals.flags() if self.signals else [])
        shared = distutils.all_reduce(torch.cat([counts, flags]).to(device))
        counts, flags = shared.split([len(counts), len(flags)])
        self._flags.put(flags)
        weights = loss_weights(self._losses, counts, distutils.get_world_size())
        self._losses_of_step: list[dict[str, torch.Tensor]] = []
        self.last_noise = None
        total = 0.0
        for index, batch in enumerate(batches, start=1):
            # gradients are averaged over ranks once, by the last backward pass
            sync = nullcontext() if index == len(batches) else self._no_sync()
            with sync, tf32_context_manager(self.tf32):
                loss = self._loss(batch.to(device), weights)
                self.scaler.scale(loss).backward()
            total = total + loss.detach()
        return total

    def counts(self, batch: AtomicData) -> torch.Tensor:
        """What the summed losses of a batch are to be divided by, [losses]."""
        return loss_counts(self._counted, batch)

    def _loss(self, batch: AtomicData, weights: torch.Tensor) -> torch.Tensor:
        with torch.autocast(
            device_type(), enabled=self.autocast_enabled, dtype=self.autocast_dtype
        ):
            predictions = self.model(batch)
            use_exact_energy(batch)
            losses = mlip_unit.compute_loss(self._losses, predictions, batch)
        if self._denoising is not None:
            noise = self._denoising.error(predictions, batch)
            self.last_noise = noise if self.last_noise is None else self.last_noise + noise
        losses = dict(zip(losses, map(torch.mul, weights, losses.values()), strict=True))
        self._losses_of_step.append({name: loss.detach() for name, loss in losses.items()})
        return sum(losses.values())

    def _no_sync(self) -> Any:
        parallel = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if parallel else nullcontext()

    def _move(self, batches: list[AtomicData]) -> bool:
        """Clip, step and average; whether the weights moved."""
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if self.clip_grad_norm is None else self.clip_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=limit).detach()
        if self.clip_grad_norm is not None:
            self.last_grad_norm = norm
        if not self.scaler.is_enabled() and not self._finite.put(
            norm,
            batches,
            self._losses_of_step,
            step=self.train_progress.num_steps_completed,
            rate=self.scheduler.get_last_lr()[0],
        ):
            self.optimizer.zero_grad(set_to_none=True)
            return False
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        scale = self.scaler.get_scale()
        if scale < before:
            step = self.train_progress.num_steps_completed
            logging.warning(f"step {step} overflowed in fp16 and was left out; scale {scale:g}")
            if scale < SMALLEST_SCALE:
                raise UserError(
                    "fp16: gradients are not finite whatever the loss scale; lower lr, or set "
                    "fp16 to false"
                )
            return False
        self.ema_model.update_parameters(self.model)
        return True

    def signal_of_all_ranks(self) -> int | None:
        """The signal at which all ranks stop now, before the step that is about to begin.

        With several ranks it is known one step after it came: the flags of a step's begin travel
        with the counts of its labels.
        """
        if self.signals is None:
            return None
        if distutils.get_world_size() == 1:
            return self.signals.decided(self.signals.flags())
        flags = self._flags.take()
        return None if flags is None else self.signals.decided(flags.tolist())

    def on_eval_start(self, state: State) -> None:
        """Evaluate only weights that are finite."""
        self._finite.look()

    def save_state(self, checkpoint_location: str) -> None:
        """Save only weights that are finite.

        Args:
            checkpoint_location: Folder to write.
        """
        self._finite.look()
        super().save_state(checkpoint_location)

    def on_train_end(self, state: State) -> None:
        """End with weights that are finite."""
        self._finite.look()
        super().on_train_end(state)

    def _report(self, batches: list[AtomicData]) -> None:
        """Log under fairchem's names, as often as fairchem does."""
        step = self.train_progress.num_steps_completed
        now = time.time()
        seconds, self.previous_wall_time = now - self.previous_wall_time, now
        if self.logger is None and step % self.print_every:
            return  # reading the loss would stop the GPU
        atoms = sum(int(batch.natoms.sum()) for batch in batches)
        structures = sum(len(batch.natoms) for batch in batches)
        self.last_loss = float(self.last_loss)
        log = {
            "train/loss": self.last_loss,
            "train/lr": self.scheduler.get_last_lr()[0],
            "train/step": step,
            "train/epoch": self.train_progress.num_epochs_completed
            + self.train_progress.num_steps_completed_in_epoch / self._steps_per_epoch,
            "train/samples_per_second(approx)": structures * self.dp_world_size / seconds,
            "train/atoms_per_second(approx)": atoms * self.dp_world_size / seconds,
            "train/num_atoms_on_rank": atoms,
            "train/num_samples_on_rank": structures,
        }
        if self.last_grad_norm is not None:
            self.last_grad_norm = log["train/grad_norm"] = float(self.last_grad_norm)
        if self.last_noise is not None:
            total, number = self.last_noise.tolist()
            log["train/noise_error"] = total / number if number else math.nan
        if self.scaler.is_enabled():
            log["train/loss_scale"] = self.scaler.get_scale()
        if self.logger is not None:
            self.logger.log(log, step=step, commit=True)
        if step % self.print_every == 0:
            logging.info(log)
