"""Predict whole data sets by the ``fairchem`` command: on one CPU, many GPUs, or a SLURM array."""

from __future__ import annotations

import logging
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from fairchem.core.common import distutils
from fairchem.core.components.runner import Runner
from fairchem.core.launchers.api import SchedulerType

from escaip_fairchem.data.loaders import get_dataloader
from escaip_fairchem.describe import describe_task, find_checkpoint, load_safely
from escaip_fairchem.errors import UserError
from escaip_fairchem.predict.data import (
    Structures,
    batches_of,
    collate,
    describe_splits,
    join,
    sha256_of,
    to_numpy,
)
from escaip_fairchem.predict.parts import Plan, missing, write_part
from escaip_fairchem.predict.references import choose_task, energy_references, require_known
from escaip_fairchem.train.evaluation import device_type, reduced_precision
from escaip_fairchem.train.runner import share_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from fairchem.core.datasets.atomic_data import AtomicData
    from torch import Tensor

    from escaip_fairchem.predict.data import Arrays

    #: From a batch to its predictions by properties, on the device.
    Predict = Callable[[AtomicData], dict[str, Tensor]]


class PredictRunner(Runner):
    """Predicts every structure of some data sets once, into `escaip_fairchem.predict.parts`.

    They lie in ``job.run_dir/job.timestamp_id/results``. Array jobs and ranks share out those
    that are not there yet, so after a kill the same command goes on. Batches are made inside a
    part, in the order of its rows: a prediction does not depend on who makes it.

    Args:
        checkpoint: Inference checkpoint, its folder, or the folder of a run (its newest is taken).
        splits: Folder or file of each data set, or several, by the name of its split; None leaves
            one out.
        part_rows: Structures of a part: what a kill loses at most, on each rank.
        max_atoms: Atoms of a batch.
        bf16: Predict under autocast in bfloat16; geometry and heads stay in float32.
        fp16: The same in float16.
        tf32: Allow TF32 matrix products.
        float64: Predict in double precision.
        num_workers: Processes of each rank that load data.
        task: Data set of the checkpoint whose tasks are predicted, if it knows several.
        allow_unknown_elements: Predict elements that the checkpoint has no reference energy for;
            their energies mean nothing.
    """

    def __init__(
        self,
        checkpoint: str | None,
        splits: Mapping[str, str | Sequence[str] | None],
        *,
        part_rows: int = 1000,
        max_atoms: int = 2000,
        bf16: bool = False,
        fp16: bool = False,
        tf32: bool = False,
        float64: bool = False,
        num_workers: int = 0,
        task: str | None = None,
        allow_unknown_elements: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.splits = {name: src for name, src in splits.items() if src is not None}
        self.part_rows = part_rows
        self.settings = {"max_atoms": max_atoms, "bf16": bf16, "fp16": fp16, "tf32": tf32}
        # a plan in single precision is as it was before there was another
        self.settings |= {"float64": True} if float64 else {}
        self.dtype = torch.float64 if float64 else torch.float32
        self.num_workers = num_workers
        self.task = task
        self.allow_unknown_elements = allow_unknown_elements

    @property
    def folder(self) -> Path:
        """Folder of the predictions."""
        return Path(self.job_config.metadata.results_dir)

    def run(self) -> None:
        """Predict what is missing of this rank's parts.

        Raises:
            UserError: No such checkpoint or data, the folder holds other predictions, or a
                structure has elements that the checkpoint does not know.
        """
        share_cores()
        if self.checkpoint is None:
            raise UserError("no checkpoint; add checkpoint=RUN/checkpoints/final/inference_ckpt.pt")
        path = find_checkpoint(Path(self.checkpoint))
        tasks = [describe_task(task) for task in load_safely(path).tasks_config]
        task = choose_task(tasks, self.task)
        structures = Structures(self.splits, task, self.dtype)
        if distutils.is_master():
            self._plan(path, task, structures).write(self.folder)
        distutils.synchronize()
        plan = Plan.read(self.folder)
        mine = self._share(plan)
        if not mine:
            return
        references, _ = energy_references(tasks, task)
        batches = [batches_of(structures, plan, *part) for part in mine]
        loader = get_dataloader(
            structures, lambda **_: [b for part in batches for b in part], collate, self.num_workers
        )
        predict = self._predictor(path, task)
        loaded = self._known(loader, references)
        start, done = time.monotonic(), 0
        for part, of_part in zip(mine, batches, strict=True):
            # all of them before any copy waits for the GPU
            pieces = list(self.outcomes(predict, islice(loaded, len(of_part))))
            arrays = join([_to_arrays(*piece) for piece in pieces])
            write_part(self.folder, *part, _without_empty(arrays))
            done += len(arrays["row"])
            rate = done / (time.monotonic() - start)
            logging.info(
                f"rank {distutils.get_rank()}: wrote part {part[1]} of {part[0]}; {done} "
                f"structures, {rate:.1f}/s"
            )

    def save_state(self, _location: str, _is_preemption: bool = False) -> bool:
        """Nothing to do: parts are the state."""
        return True

    def load_state(self, _location: str | None) -> None:
        """Nothing to do: parts are the state."""

    def _plan(self, path: Path, task: str, structures: Structures) -> Plan:
        return Plan.make(
            checkpoint=str(path),
            checkpoint_sha256=sha256_of(path),
            task=task,
            part_rows=self.part_rows,
            settings=self.settings,
            splits=describe_splits(structures, self.splits),
        )

    def _share(self, plan: Plan) -> list[tuple[str, int]]:
        """Missing parts for this rank of this array job."""
        scheduler = self.job_config.scheduler
        jobs = scheduler.num_array_jobs if scheduler.mode == SchedulerType.SLURM else 1
        # array jobs start at any time, so which parts are theirs must not depend on what is there
        of_job = set(plan.parts()[self.job_config.metadata.array_job_num :: jobs])
        todo = [part for part in missing(self.folder) if part in of_job]
        distutils.synchronize()  # no rank writes before all have looked
        return todo[distutils.get_rank() :: distutils.get_world_size()]

    def _predictor(self, path: Path, task: str) -> Predict:
        """From a batch to its predictions by property, on the device."""
        from fairchem.core.units.mlip_unit import InferenceSettings, load_predict_unit

        device = device_type()
        dtype = reduced_precision(bf16=self.settings["bf16"], fp16=self.settings["fp16"])
        unit = load_predict_unit(
            path,
            device=device,
            inference_settings=InferenceSettings(
                compile=False, tf32=self.settings["tf32"], base_precision_dtype=self.dtype
            ),
        )
        names = {each.property: each.name for each in unit.dataset_to_tasks[task]}

        def predict(data: AtomicData) -> dict[str, Tensor]:
            with torch.autocast(device, dtype, enabled=dtype is not None):
                predicted = predict_batch(unit, data)
            return {prop: predicted[name].detach() for prop, name in names.items()}

        return predict

    def _known(self, loader: Any, references: np.ndarray) -> Iterator[tuple[AtomicData, Arrays]]:
        """Batches of elements that the checkpoint knows, and the arrays of their structures."""
        for data, arrays in loader:
            if not self.allow_unknown_elements:
                require_known(references, *(arrays[k] for k in ("numbers", "natoms", "sid")))
            yield data, arrays

    def outcomes(
        self, predict: Predict, batches: Iterable[tuple[AtomicData, Arrays]]
    ) -> Iterator[tuple[dict[str, Tensor], Arrays]]:
        """What becomes of the batches of a part: predictions, and the arrays of the structures."""
        for data, arrays in batches:
            yield predict(data), arrays


def predict_batch(unit: Any, data: AtomicData) -> dict[str, Tensor]:
    """Predictions by names of tasks, for all structures of a batch at once.

    fairchem's own method then takes them apart and joins them again, structure by structure.
    """
    return type(unit).predict.__wrapped__(unit, data, True)


def _to_arrays(predicted: Mapping[str, Tensor], arrays: Arrays) -> Arrays:
    return {**arrays, **{name: to_numpy(value, name) for name, value in predicted.items()}}


def _without_empty(arrays: Arrays) -> Arrays:
    """Leave out labels that no structure has, and subsets without a name."""
    return {
        name: array
        for name, array in arrays.items()
        if not (name == "subset" and not (array != "").any())
        and not (name.endswith("_label") and not np.isfinite(array).any())
    }
