"""The batches that the sampler makes: how many, how large, how fast they are read."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.check.data import atoms_of
from escaip_fairchem.errors import UserError
from escaip_fairchem.train.runner import instantiate

if TYPE_CHECKING:
    from collections.abc import Callable

    from escaip_fairchem.check.report import Report

#: Batches that are read to measure how long it takes, besides the smallest and the largest.
TIMED = 3


@dataclass(frozen=True)
class Batches:
    """The batches of a training.

    Attributes:
        dataset: Training data.
        collate: Makes a batch of structures.
        natoms: Atoms of each structure, (F,).
        indices: Structures of each batch, of all ranks.
        atoms: Atoms of each batch, (M,).
        seconds_per_atom: Time to read an atom of a batch in one process.
        smallest: The batch with fewest atoms.
        largest: The batch with most.
        ranks: Processes that share the batches.
        accumulate: Batches per step and rank.
    """

    dataset: Any
    collate: Callable[[list[Any]], Any]
    natoms: np.ndarray
    indices: list[list[int]]
    atoms: np.ndarray
    seconds_per_atom: float
    smallest: Any
    largest: Any
    ranks: int
    accumulate: int

    @property
    def batches_per_epoch(self) -> int:
        """Batches of each rank."""
        return math.ceil(len(self.indices) / self.ranks)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the optimizer."""
        return math.ceil(self.batches_per_epoch / self.accumulate)

    def first_of(self, batch: int, most_atoms: int) -> Any:
        """As many structures of a batch as have `most_atoms` atoms together, at least one."""
        chosen = sorted(self.indices[batch], key=lambda index: self.natoms[index])
        total = np.cumsum(self.natoms[chosen])
        kept = chosen[: max(1, int(np.searchsorted(total, most_atoms, side="right")))]
        return self.collate([self.dataset[index] for index in kept])


def make_batches(config: Any, dataset: Any, ranks: int, report: Report) -> Batches:
    """Make the batches of the first epoch as the training does, and read some.

    Args:
        config: The composed recipe.
        dataset: Training data.
        ranks: Processes that will share the batches.
        report: Takes sizes and problems.

    Raises:
        UserError: No structure fits into a batch, or there are fewer batches than ranks.
    """
    loader = config.runner.train_dataloader
    natoms = atoms_of(dataset)
    most = loader.batch_sampler_fn.get("max_atoms")
    if most is not None and (natoms > most).all():
        raise UserError(
            f"max_atoms {most}: no structure is so small; set max_atoms={natoms.max()} or more"
        )
    sampler = instantiate(loader.batch_sampler_fn)(dataset=dataset, num_replicas=1, rank=0)
    indices = [[int(index) for index in batch] for batch in sampler]
    if len(indices) < ranks:
        raise UserError(
            f"{len(dataset)} structures give {len(indices)} batches of up to {most} atoms for "
            f"{ranks} ranks; lower max_atoms, job.scheduler.ranks_per_node or num_nodes"
        )
    atoms = np.array([natoms[batch].sum() for batch in indices])
    collate = instantiate(loader.collate_fn)
    spread = np.linspace(0, len(indices) - 1, TIMED).astype(int)
    chosen = [int(np.argmin(atoms)), int(np.argmax(atoms)), *spread.tolist()]
    read, rates = [], []
    for batch in chosen:
        start = time.perf_counter()
        read.append(collate([dataset[index] for index in indices[batch]]))
        rates.append((time.perf_counter() - start) / atoms[batch])
    made = Batches(
        dataset,
        collate,
        natoms,
        indices,
        atoms,
        seconds_per_atom=median(rates[1:]),  # the first read warms up
        smallest=read[0],
        largest=read[1],
        ranks=ranks,
        accumulate=config.runner.train_eval_unit.get("accumulate", 1),
    )
    _report(made, most, report)
    return made


def _report(made: Batches, most: int | None, report: Report) -> None:
    atoms = made.atoms
    step = float(atoms.mean() * made.ranks * made.accumulate)
    report.record(
        "batches",
        number=len(atoms),
        smallest=int(atoms.min()),
        largest=int(atoms.max()),
        ranks=made.ranks,
        steps_per_epoch=made.steps_per_epoch,
        atoms_per_step=step,
        read_seconds=made.seconds_per_atom * float(atoms.mean()),
    )
    report.ok(
        "batches",
        f"{len(atoms):,} of {atoms.min()} to {atoms.max()} atoms; {made.ranks} ranks x "
        f"{made.accumulate} batches = {step:,.0f} atoms a step, {made.steps_per_epoch:,} steps an "
        "epoch",
    )
    fill = atoms.mean() / most if most else 1.0
    if fill < 0.6:
        report.note(
            "batches",
            f"max_atoms {most} is filled to {fill:.0%} only: a multiple of the size of the "
            "structures wastes less",
        )
    spare = made.batches_per_epoch * made.ranks / len(atoms) - 1
    if spare > 0.1:
        report.note(
            "batches",
            f"{len(atoms)} batches do not divide among {made.ranks} ranks: {spare:.0%} are "
            "shown twice an epoch",
        )
