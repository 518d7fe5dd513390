"""Losses as sums with their counts apart, so that one mean can span batches, ranks and data sets.

fairchem's `DDPMTLoss` divides by the count of the batch at hand, over all ranks. A mean over
several batches needs the count of them all before the first backward pass, which labels alone
decide.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.modules.loss import DDPMTLoss
from fairchem.core.units.mlip_unit.mlip_unit import Task, get_output_mask

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fairchem.core.datasets.atomic_data import AtomicData
    from torch import Tensor


class SummedLoss(DDPMTLoss):
    """`DDPMTLoss` that leaves the division to its caller and does not talk to other ranks.

    A loss that is not finite stays so; fairchem's becomes zero, as if there were nothing to learn.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As of `DDPMTLoss`."""
        super().forward(*args, **kwargs)
        return self.coefficient * self._reduced

    def _reduction(self, *args: Any) -> Tensor:
        self._reduced = super()._reduction(*args)
        return self._reduced

    def _ddp_mean(self, num_samples: int, loss: Tensor) -> Tensor:
        return loss


def summed(tasks: Sequence[Task]) -> list[Task]:
    """Copy tasks, with losses that are sums.

    Args:
        tasks: Tasks with fairchem's `DDPMTLoss`.

    Raises:
        UserError: A task has another loss, whose counts are unknown.
    """
    copies = []
    for task in tasks:
        loss = task.loss_fn
        if type(loss) is not DDPMTLoss:
            raise UserError(
                f"task {task.name}: loss_fn is {type(loss).__name__}; it must be "
                "fairchem.core.modules.loss.DDPMTLoss, which takes any loss as its loss_fn"
            )
        # Hydra hands tasks over as configurations that look like them
        values = {field.name: getattr(task, field.name) for field in fields(Task)}
        values["loss_fn"] = SummedLoss(loss.loss_fn, loss.reduction, loss.coefficient)
        copies.append(Task(**values))
    return copies


def loss_counts(tasks: Sequence[Task], batch: AtomicData) -> Tensor:
    """What the summed losses of a batch are to be divided by, [tasks].

    Labelled structures, labelled (free) atoms, or structures with such atoms, as the reduction
    of each loss says; 1 for sums. fairchem leaves structures out whose error is exactly zero;
    here a count depends on labels only.

    Args:
        tasks: Tasks.
        batch: fairchem's batch.
    """
    counts = []
    for task in tasks:
        mask = get_output_mask(batch, task)[task.name]
        if task.level == "atom" and task.train_on_free_atoms:
            mask = mask & (batch.fixed == 0)
        if task.loss_fn.reduction == "per_structure":
            labelled = mask.new_zeros(len(batch.natoms), dtype=torch.long)
            count = (labelled.index_add(0, batch.batch, mask.long()) > 0).sum()
        elif task.loss_fn.reduction == "mean":
            count = mask.sum()
        else:
            count = torch.ones_like(mask.sum())
        counts.append(count)
    return torch.stack(counts).double()


def loss_weights(tasks: Sequence[Task], counts: Tensor, ranks: int) -> Tensor:
    """Factors of the summed losses, [tasks].

    With them the gradients that all ranks have summed over their batches, averaged over ranks,
    are those of the means over everything. Sums are averaged over ranks, as by fairchem.

    Args:
        tasks: Tasks.
        counts: `loss_counts` summed over batches and ranks.
        ranks: Number of ranks.
    """
    sums = [task.loss_fn.reduction == "sum" for task in tasks]
    means = ranks / counts.clamp(min=1)
    return torch.where(torch.tensor(sums, device=counts.device), 1.0, means).float()
