"""Optimizer states shared out among ranks (stage 1 of ZeRO, Rajbhandari et al., arXiv 1910.02054).

Each rank keeps the states of its part of the parameters, moves that part, and sends it to the
others. States are saved by parameter name, so a checkpoint is the same file content whatever the
number of ranks. `torch.distributed.optim.ZeroRedundancyOptimizer` does the same step, but can be
saved only after every state has been sent to one rank, and cannot hold an optimizer that makes
its own parameter groups, as Muon does. fairchem's FSDP reaches none of this model's layers.
"""

from __future__ import annotations

import heapq
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from fairchem.core.common import distutils

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


def sharded(optimizer_fn: partial) -> partial:
    """Make an optimizer whose states are shared out among the ranks.

    Args:
        optimizer_fn: A `functools.partial` of an optimizer class, as Hydra makes it. The class
            must treat each parameter by itself in all that it keeps.

    Returns:
        The same of a subclass.

    Raises:
        UserError: It is not a partial of a class.
    """
    kind = getattr(optimizer_fn, "func", None)
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise UserError("shard_optimizer needs an optimizer class with _partial_: true")
    subclass = type(f"Sharded{kind.__name__}", (_Sharded, kind), {})
    return partial(subclass, *optimizer_fn.args, **optimizer_fn.keywords)


def owners(sizes: list[int], ranks: int) -> list[int]:
    """The rank that owns each parameter: the largest first, to the rank with the least so far.

    Args:
        sizes: Number of elements of each parameter.
        ranks: Number of ranks.

    Raises:
        UserError: There are more ranks than parameters.
    """
    if ranks > len(sizes):
        raise UserError(
            f"shard_optimizer: {ranks} ranks cannot share {len(sizes)} parameters; set it to false"
        )
    loads = [(0, rank) for rank in range(ranks)]  # a heap; ties go to the lowest rank
    chosen = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        load, rank = loads[0]
        chosen[index] = rank
        heapq.heapreplace(loads, (load + sizes[index], rank))
    return chosen


class _Sharded:
    """Mixin for optimizers; parameter groups stay whole except while a step is taken."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        parts = self._parts()
        with self._own(parts[distutils.get_rank()]):
            loss = super().step(closure)
        if len(parts) > 1:
            _send(parts)
        return loss

    def _parts(self) -> list[list[Tensor]]:
        """Parameters of each rank."""
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        ranks = distutils.get_world_size()
        parts: list[list[Tensor]] = [[] for _ in range(ranks)]
        for param, rank in zip(params, owners([p.numel() for p in params], ranks), strict=True):
            parts[rank].append(param)
        return parts

    @contextmanager
    def _own(self, params: list[Tensor]) -> Iterator[None]:
        """Show the optimizer these parameters only."""
        mine = set(params)
        whole = [group["params"] for group in self.param_groups]
        for group in self.param_groups:
            group["params"] = [p for p in group["params"] if p in mine]
        try:
            yield
        finally:
            for group, group_params in zip(self.param_groups, whole, strict=True):
                group["params"] = group_params


@torch.no_grad()
def _send(parts: list[list[Tensor]]) -> None:
    """Overwrite each part by what its owner holds."""
    vectors = [torch.cat([p.flatten() for p in part]) for part in parts]
    sent = [dist.broadcast(vector, rank, async_op=True) for rank, vector in enumerate(vectors)]
    for rank, (part, vector, work) in enumerate(zip(parts, vectors, sent, strict=True)):
        work.wait()
        if rank != distutils.get_rank():
            pieces = vector.split([p.numel() for p in part])
            shaped = [piece.view_as(p) for piece, p in zip(pieces, part, strict=True)]
            torch._foreach_copy_(part, shaped)
