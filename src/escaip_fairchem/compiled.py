"""The model behind its graph as one compiled function: the backbone's key `compile`.

Everything from edges to features is traced as a whole. Numbers of atoms, edges, slots and pairs
are symbols in it, so that all batches share a graph; training and evaluation have one each.

A conservative model needs derivatives of a derivative in training, which AOTAutograd does not
have. There the function computes energies and their derivatives by the edges' geometry itself
(`torch.func.vjp`, traced too), and a single derivative of that is left to do.

Shapes: N atoms, E edges, U distinct lengths, K slots.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from escaip_fairchem.graph import NeighborGraph

if TYPE_CHECKING:
    from collections.abc import Callable

    from escaip_fairchem.backbone import EScAIPBackbone
    from escaip_fairchem.heads import EnergyHead

#: Graphs of one model at most: training and evaluation, with and without gradients, of each
#: precision.
MODES = 32


@dataclass
class Edges:
    """What the features of a batch are computed from.

    Attributes:
        graph: Neighbourhoods.
        species: Atomic numbers, [N].
        system_idx: Structure of each atom, [N].
        forces: Forces that are an input, [N, 3], or None.
        autocast: Precision that autocast sets for the blocks, or None.
    """

    graph: NeighborGraph
    species: Tensor
    system_idx: Tensor
    forces: Tensor | None
    autocast: torch.dtype | None

    @property
    def geometry(self) -> tuple[Tensor, Tensor, Tensor]:
        """What depends on positions: lengths [U], directions [E, 3], log-envelopes [E]."""
        return self.graph.pair_lengths, self.graph.directions, self.graph.log_envelope

    @property
    def others(self) -> tuple[Tensor | None, ...]:
        """The tensors besides `geometry`; the last but one has K rows."""
        graph = self.graph
        slots = torch.arange(graph.num_slots, device=graph.counts.device)
        indices = graph.senders, graph.receivers, graph.pairs, graph.exists, graph.counts
        return *indices, self.species, self.system_idx, slots, self.forces

    @classmethod
    def of(cls, geometry: tuple[Tensor, ...], others: tuple, autocast) -> Edges:
        """From `geometry` and `others`."""
        lengths, directions, log_envelope = geometry
        senders, receivers, pairs, exists, counts, species, system_idx, slots, forces = others
        graph = NeighborGraph(
            senders=senders,
            receivers=receivers,
            pairs=pairs,
            pair_lengths=lengths,
            directions=directions,
            log_envelope=log_envelope,
            exists=exists,
            counts=counts,
            num_slots=len(slots),
        )
        return cls(graph, species, system_idx, forces, autocast)


def _features(backbone: EScAIPBackbone, geometry, others, autocast):
    return backbone.encode(Edges.of(geometry, others, autocast))


def _derivatives(backbone: EScAIPBackbone, head: EnergyHead, geometry, others, autocast, shares):
    def energies(*geometry: Tensor) -> Tensor:
        node, _ = backbone.encode(Edges.of(geometry, others, autocast))
        return head.atomic_energies(node)

    values, pull_back = torch.func.vjp(energies, *geometry)
    return values, pull_back(shares.to(values.dtype))


class Compiled:
    """The compiled functions of a model; copies of the model share them.

    If they cannot be compiled, for want of a compiler say, a line in the log says so, and the
    functions return None from then on.

    Args:
        backend: Of `torch.compile`.
    """

    def __init__(self, backend: str | Callable = "inductor") -> None:
        self.backend, self.failed = backend, False
        options = {
            "fullgraph": True,
            "backend": backend,
            "isolate_recompiles": True,
            "recompile_limit": MODES,
        }
        self._features = torch.compile(_features, **options)
        self._derivatives = torch.compile(_derivatives, **options)

    def __deepcopy__(self, memo: dict) -> Compiled:
        """Itself, because weights are arguments."""
        return self

    def __reduce__(self) -> tuple:
        """Compiled functions are not pickled but made again."""
        return Compiled, (self.backend,)

    def features(self, backbone: EScAIPBackbone, edges: Edges) -> tuple | None:
        """Node features [N, H] and edge features [E, H] or None."""
        return self._call(self._features, edges, backbone, edges.geometry)

    def derivatives(
        self, backbone: EScAIPBackbone, head: EnergyHead, edges: Edges, shares: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Atomic energies, and the derivatives of a sum of them by `Edges.geometry`.

        Differentiable in the weights, in training only.

        Args:
            backbone: The backbone.
            head: What makes energies of node features.
            edges: The batch.
            shares: Factor of each atomic energy in the sum, [N].

        Returns:
            [N], and [U], [E, 3], [E].
        """
        geometry = tuple(x.detach() for x in edges.geometry)
        with torch.set_grad_enabled(head.training):
            return self._call(self._derivatives, edges, backbone, head, geometry, shares=shares)

    def _call(self, function: Callable, edges: Edges, *arguments: Any, **more: Tensor):
        graph = edges.graph
        # a size of 1 would have a graph of its own
        sizes = len(graph.counts), len(graph.pair_lengths), graph.num_slots
        if self.failed or min(sizes) < 2:
            return None
        *modules, geometry = arguments
        others = edges.others
        for tensor in (*geometry, *others, *more.values()):
            if tensor is not None:
                torch._dynamo.mark_dynamic(tensor, 0)
        try:
            # DDP would cut the graph into pieces, for its communication to begin earlier
            with torch._dynamo.config.patch(optimize_ddp=False):
                return function(*modules, geometry, others, edges.autocast, **more)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.failed = True
            reason = str(error).strip().splitlines()[0]
            logging.getLogger(__name__).warning("compile: %s; going on without", reason)
            return None
