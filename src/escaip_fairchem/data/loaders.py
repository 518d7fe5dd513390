"""Data loaders: workers that start fast, and an evaluation sampler that shows each frame once."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.util
import os
import signal
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.common import distutils
from torch.utils.data import DataLoader, Sampler

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch.utils.data import Dataset


def get_dataloader(
    dataset: Dataset,
    batch_sampler_fn: Callable[..., Any],
    collate_fn: Callable[[list[Any]], Any],
    num_workers: int,
) -> DataLoader:
    """Make the data loader of this rank, as fairchem does, with workers that start fast.

    Several ranks on one machine are spawned, and so are their workers by default: each would
    import torch and fairchem again at every epoch and evaluation, which takes longer than an epoch
    of a small data set. Here one process per rank imports them, and workers are forked from it.

    Args:
        dataset: The data set.
        batch_sampler_fn: Makes a batch sampler from ``dataset``, ``num_replicas`` and ``rank``.
        collate_fn: Makes a batch of a list of structures.
        num_workers: Processes that load data; 0 loads it where it is used.

    Raises:
        UserError: There are fewer batches than ranks.
    """
    ranks = distutils.get_world_size()
    try:
        sampler = batch_sampler_fn(dataset=dataset, num_replicas=ranks, rank=distutils.get_rank())
    except AssertionError as error:
        if "less batches" not in str(error):
            raise
        raise UserError(
            f"{len(dataset)} structures give fewer batches than there are ranks ({ranks}); "
            "lower max_atoms or job.scheduler.ranks_per_node"
        ) from None
    used = sum(len(batch) for batch in getattr(sampler, "all_batches", []))
    if 0 < used < len(dataset):
        logging.warning(
            f"{len(dataset) - used} of {len(dataset)} structures have more than max_atoms atoms "
            "and are not trained on"
        )
    if num_workers:
        # before multiprocessing asks its children by SIGTERM to end, and waits for ever
        multiprocessing.util.Finalize(None, _end_workers, exitpriority=0)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate_fn,
        num_workers=num_workers,
        pin_memory="cuda" in distutils.get_device_for_local_rank(),
        multiprocessing_context=_worker_context() if num_workers else None,
        worker_init_fn=ignore_signals,
        # an iterator draws from it; from torch's own, an evaluation would change the dropout after
        generator=torch.Generator(),
    )


def ignore_signals(_worker: int) -> None:
    """Leave signals to the process that a worker loads data for.

    SLURM and terminals send them to all processes. A worker that ended would fail the training
    before it could save. Workers end with their data loader, or with its process.
    """
    own = getattr(signal, "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, own):
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _worker_context() -> Any:
    """How workers are started: by default, or forked from a server instead of spawned."""
    if multiprocessing.get_start_method(allow_none=True) != "spawn":
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["escaip_fairchem.data.datasets"])
    return context


def pack(natoms: Iterable[int], max_atoms: int) -> list[list[int]]:
    """Batches of consecutive structures; one of more than ``max_atoms`` has a batch of its own.

    Args:
        natoms: Atoms of each structure.
        max_atoms: Atoms of a batch.

    Returns:
        Indices of the structures of each batch.
    """
    batches: list[list[int]] = []
    atoms = 0
    for index, n in enumerate(natoms):
        if not batches or atoms + n > max_atoms:
            batches.append([])
            atoms = 0
        batches[-1].append(index)
        atoms += n
    return batches


class EvaluationBatchSampler(Sampler[list[int]]):
    """Batches of up to ``max_atoms`` atoms in the order of the data set, each on one rank.

    fairchem's sampler leaves out structures above ``max_atoms`` and repeats batches until every
    rank has the same number. Here a larger structure makes a batch of its own, and a rank may have
    a batch less than another, or none.

    Args:
        dataset: Has ``get_metadata("natoms", indices)``.
        max_atoms: Atoms of a batch.
        num_replicas: Ranks.
        rank: This rank.
    """

    def __init__(self, dataset: Any, max_atoms: int, num_replicas: int, rank: int) -> None:
        natoms = dataset.get_metadata("natoms", list(range(len(dataset))))
        self._batches = pack(natoms, max_atoms)[rank::num_replicas]

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        """Indices of the structures of each batch."""
        return iter(self._batches)
