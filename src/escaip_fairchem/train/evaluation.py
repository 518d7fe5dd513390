"""Evaluation that is exact: every structure counts once, over all batches and ranks."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.common import distutils
from fairchem.core.units.mlip_unit import mlip_unit
from fairchem.core.units.mlip_unit.utils import tf32_context_manager

from escaip_fairchem.data.energies import use_exact_energy
from escaip_fairchem.errors import UserError
from escaip_fairchem.train.counting import loss_counts, summed
from escaip_fairchem.train.signals import Stop

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fairchem.core.datasets.atomic_data import AtomicData
    from fairchem.core.units.mlip_unit.mlip_unit import Task
    from torch import Tensor
    from torchtnt.framework import State

    from escaip_fairchem.train.signals import Signals

#: Of OC20's EFwT: largest error of the energy, eV, and of a force component, eV/A.
ENERGY_THRESHOLD, FORCE_THRESHOLD = 0.02, 0.03


def reduced_precision(*, bf16: bool, fp16: bool) -> torch.dtype | None:
    """The precision of autocast, None for none.

    Raises:
        UserError: Both are asked for.
    """
    if bf16 and fp16:
        raise UserError("bf16 and fp16 are both true; set one of them to false")
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else None


def device_type() -> str:
    """Of this rank: ``cuda`` or ``cpu``."""
    return distutils.get_device_for_local_rank().partition(":")[0]


class EvalUnit(mlip_unit.MLIPEvalUnit):
    """fairchem's evaluation unit with exact metrics, EFwT, and reduced precision.

    fairchem's sums in float32, takes the loss of the first rank for that of all, and fails on a
    batch without labels. Here each metric is a sum over the evaluated structures, atoms or
    components in float64, divided by their number; without any, and with predictions that are not
    finite, it is NaN. The loss is the loss of the whole set taken as one batch.

    Each structure counts once with `escaip_fairchem.data.loaders.EvaluationBatchSampler`;
    fairchem's sampler repeats batches to give every rank the same number. No collective
    communication happens before the end, so ranks may have different numbers of batches.

    Args:
        job_config: fairchem's job configuration.
        model: The model, or None if `setup_train_eval_unit` gives it later.
        tasks: fairchem's tasks. An energy and a force task of one data set also give EFwT.
        bf16: Evaluate under autocast in bfloat16; geometry and heads stay in float32.
        fp16: The same in float16.
        tf32: Allow TF32 matrix products.
    """

    last_metrics: dict[str, float] | None = None
    #: Of the run; without, nothing stops an evaluation.
    signals: Signals | None = None

    def __init__(
        self,
        job_config: Any,
        model: torch.nn.Module | None,
        tasks: Sequence[Task],
        *,
        bf16: bool = False,
        fp16: bool = False,
        tf32: bool = False,
    ) -> None:
        dtype = reduced_precision(bf16=bf16, fp16=fp16)
        super().__init__(job_config, model, tasks, bf16=bf16, tf32=tf32)
        self.autocast_enabled, self.autocast_dtype = dtype is not None, dtype or torch.bfloat16
        self._summed_tasks = summed(self.tasks)

    def metric_names(self, dataset_names: Iterable[str]) -> list[str]:
        """Names of what an evaluation gives, loss apart.

        Args:
            dataset_names: Such as ``oc20.val``.

        Returns:
            ``val/{dataset},{task},{metric}`` and ``val/{dataset},efwt``.
        """
        names = []
        for dataset in dataset_names:
            for task in _tasks_of(self.tasks, dataset):
                names += [f"val/{dataset},{task.name},{metric}" for metric in task.metrics]
            if _energy_and_forces(self.tasks, dataset):
                names.append(f"val/{dataset},efwt")
        return names

    def on_eval_epoch_start(self, state: State) -> None:
        """Start sums at zero and put the model into evaluation mode."""
        self.model.eval()
        names = self.metric_names(state.eval_state.dataloader.dataset.dataset_names)
        # totals and numbers, per metric and per loss
        self._sums = {name: [0.0, 0.0] for name in [*names, *(t.name for t in self.tasks)]}
        self.total_atoms, self.total_runtime = 0, 0.0

    def eval_step(self, state: State, data: AtomicData) -> None:
        """Evaluate a batch.

        Args:
            state: torchtnt's state.
            data: fairchem's batch; left out once a signal came, as the evaluation will be void.
        """
        if self.signals and self.signals.came():
            return
        device = distutils.get_device_for_local_rank()
        data = data.to(device)
        start = time.monotonic()
        with (
            tf32_context_manager(self.tf32),
            torch.autocast(device_type(), enabled=self.autocast_enabled, dtype=self.autocast_dtype),
        ):
            predictions = self.model(data)
        use_exact_energy(data)
        self._add_losses(predictions, data)
        in_float64 = {
            task.name: {task.property: predictions[task.name][task.property].double()}
            for task in self.tasks
        }
        for dataset in sorted(set(data.dataset_name)):
            for task in _tasks_of(self.tasks, dataset):
                metrics = mlip_unit.compute_metrics(task, in_float64, data, dataset)
                for name, metric in metrics.items():
                    self._add(f"val/{dataset},{task.name},{name}", metric.total, metric.numel)
            pair = _energy_and_forces(self.tasks, dataset)
            if pair:
                within, counted = within_threshold(*pair, in_float64, data, dataset)
                self._add(f"val/{dataset},efwt", int(within.sum()), int(counted.sum()))
        self.total_atoms += int(data.natoms.sum())
        self.total_runtime += time.monotonic() - start

    def on_eval_epoch_end(self, state: State) -> dict[str, float]:
        """Add up over all ranks, keep the metrics in `last_metrics` and log them.

        Args:
            state: torchtnt's state.

        Returns:
            Values by `metric_names`, and ``val/loss``, ``val/atoms_per_second``, ``val/epoch``.

        Raises:
            Stop: A signal came on some rank; the evaluation is not whole.
        """
        device = distutils.get_device_for_local_rank()
        throughput = [self.total_atoms, self.total_runtime]
        # the ranks agree on signals by the same sum
        flags = [[flag, 0.0] for flag in self.signals.flags()] if self.signals else []
        rows = [*flags, *self._sums.values(), throughput]
        table = torch.tensor(rows, dtype=torch.float64, device=device)
        *sums, throughput = distutils.all_reduce(table).tolist()
        flags, sums = sums[: len(flags)], sums[len(flags) :]
        number = self.signals.decided([flag for flag, _ in flags]) if self.signals else None
        if number is not None:
            raise Stop("interrupted", number)
        means = {
            name: total / number if number else float("nan")
            for name, (total, number) in zip(self._sums, sums, strict=True)
        }
        # a task without any label has no part in the loss, as in training
        losses = [means.pop(task.name) for task in self.tasks]
        numbers = [number for _, number in sums[-len(losses) :]]
        loss = sum(mean for mean, number in zip(losses, numbers, strict=True) if number)
        metrics = {
            "val/loss": float(loss),
            **means,
            "val/atoms_per_second": throughput[0] / throughput[1] if throughput[1] else 0.0,
            "val/epoch": float(self.eval_progress.num_epochs_completed),
        }
        self.last_metrics = metrics
        if self.logger is not None:
            self.logger.log(metrics, commit=True)
        lines = [f"  {name}: {value:.4f}" for name, value in sorted(metrics.items())]
        logging.info("\n".join(["Evaluation:", *lines]))
        return metrics

    def _add_losses(self, predictions: dict[str, Any], data: AtomicData) -> None:
        finite = True
        masked = {}
        for task in self.tasks:
            # an unlabelled value may be anything, such as the stress of a molecule
            prediction = predictions[task.name][task.property].float()
            mask = mlip_unit.get_output_mask(data, task)[task.name]
            mask = mask.view(*mask.shape, *[1] * (prediction.ndim - mask.ndim))
            prediction = prediction.where(mask, 0.0)
            finite = finite and bool(prediction.isfinite().all())
            masked[task.name] = {task.property: prediction}
        losses = mlip_unit.compute_loss(self._summed_tasks, masked, data)
        counts = loss_counts(self._summed_tasks, data).tolist()
        for (name, loss), count in zip(losses.items(), counts, strict=True):
            # fairchem turns a loss that is not finite into zero
            self._add(name, float(loss) if finite else float("nan"), count)

    def _add(self, name: str, total: float, number: float) -> None:
        self._sums[name][0] += total
        self._sums[name][1] += number


def within_threshold(
    energy: Task,
    forces: Task,
    predictions: dict[str, dict[str, Tensor]],
    data: AtomicData,
    dataset: str,
) -> tuple[Tensor, Tensor]:
    """OC20's "energy and forces within threshold" (EFwT) of each structure.

    A structure is within if its energy is off by less than 0.02 eV and no force component of its
    atoms (the free ones, with ``eval_on_free_atoms``) by 0.03 eV/A or more. It is counted if its
    energy and the forces on all these atoms, at least one, are labelled.

    Args:
        energy: Task of the energy.
        forces: Task of the forces.
        predictions: ``predictions[task][property]`` in model units: energies [B], forces [N, 3].
        data: fairchem's batch with labels in eV and eV/A.
        dataset: Structures of this one only.

    Returns:
        Within, and counted, [B] each.
    """
    has_energy = mlip_unit.get_output_mask(data, energy)[f"{dataset}.{energy.name}"]
    has_forces = mlip_unit.get_output_mask(data, forces)[f"{dataset}.{forces.name}"]
    evaluated = torch.ones_like(has_forces)
    if forces.eval_on_free_atoms:
        evaluated = data.fixed == 0
    energy_error = (_in_units(energy, predictions, data) - data[energy.name]).abs()
    force_error = (_in_units(forces, predictions, data) - data[forces.name]).abs()
    # written so that a NaN is not within
    off = evaluated & ~(force_error < FORCE_THRESHOLD).all(1)

    def per_structure(atoms: Tensor) -> Tensor:
        zeros = torch.zeros(len(data.natoms), dtype=torch.long, device=atoms.device)
        return zeros.index_add(0, data.batch, atoms.long())

    unlabelled = per_structure(evaluated & ~has_forces) > 0
    counted = has_energy & ~unlabelled & (per_structure(evaluated) > 0)
    return counted & (energy_error < ENERGY_THRESHOLD) & (per_structure(off) == 0), counted


def _in_units(task: Task, predictions: dict[str, dict[str, Tensor]], data: AtomicData) -> Tensor:
    """Predictions in eV or eV/A, in the shape of the labels."""
    values = task.normalizer.denorm(predictions[task.name][task.property])
    if task.element_references is not None:
        values = task.element_references.undo_refs(data, values)
    return values.view_as(data[task.name])


def _tasks_of(tasks: Sequence[Task], dataset: str) -> list[Task]:
    """Tasks of a data set with its split; fairchem matches by substring."""
    return [task for task in tasks if any(name in dataset for name in task.datasets)]


def _energy_and_forces(tasks: Sequence[Task], dataset: str) -> tuple[Task, Task] | None:
    by_property = {task.property: task for task in _tasks_of(tasks, dataset)}
    if {"energy", "forces"} <= by_property.keys():
        return by_property["energy"], by_property["forces"]
    return None
