"""The model behind its graph as one compiled function: the backbone's key `compile`.

Everything from edges to features is traced as a whole. Numbers of atoms, edges, slots and pairs
are symbols in it, so that all batches share a graph; training and evaluation have one each.

A conservative model needs derivatives of a derivative in training, which AOTAutograd does not
have. So what is compiled there are energies together with their derivatives by the geometry of
the edges: `torch.autograd.grad` is traced too, and a single derivative of both is left to do.

In evaluation a GPU can replay what it was told once (CUDA graphs), if batches have sizes that
repeat. That pays where a batch is so small that launching its kernels takes longer than running
them: dynamics of some thousand atoms.

Shapes: N atoms, E edges, U distinct lengths, K slots.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from escaip_fairchem.shapes import Edges, Shapes

if TYPE_CHECKING:
    from collections.abc import Callable

    from escaip_fairchem.backbone import EScAIPBackbone
    from escaip_fairchem.heads import EnergyHead

#: Graphs of one model at most: training and evaluation, with and without gradients, of each
#: precision.
MODES = 32


def _features(backbone: EScAIPBackbone, geometry, others, autocast):
    return backbone.encode(Edges.of(geometry, others, autocast))


def _derivatives(backbone: EScAIPBackbone, head: EnergyHead, geometry, others, autocast, shares):
    with torch.enable_grad():
        node, _ = backbone.encode(Edges.of(geometry, others, autocast))
        values = head.atomic_energies(node)
        wanted = [x for x in geometry if x.requires_grad]
        shares = shares.to(values.dtype)
        slopes = torch.autograd.grad(values, wanted, shares, create_graph=head.training)
    return (values if head.training else values.detach()), slopes


class Compiled:
    """The compiled functions of a model; copies of the model share them.

    If they cannot be compiled, for want of a compiler say, a line in the log says so, and the
    functions return None from then on.

    Args:
        backend: Of `torch.compile`.
        slots: Slots of an atom, as a rule: in evaluation batches are padded to few `Shapes`, and
            a GPU replays the kernels of each as a CUDA graph. None: neither.
    """

    def __init__(self, backend: str | Callable = "inductor", slots: int | None = None) -> None:
        self.backend, self.slots, self.failed = backend, slots, False
        self.shapes = None if slots is None else Shapes(slots)
        options = {
            "fullgraph": True,
            "backend": backend,
            "isolate_recompiles": True,
            "recompile_limit": MODES,
        }
        functions = {"features": _features, "derivatives": _derivatives}
        self._functions = {k: torch.compile(f, **options) for k, f in functions.items()}
        if slots is not None and backend == "inductor":
            options["mode"] = "reduce-overhead"  # CUDA graphs
        self._replayed = {k: torch.compile(f, **options) for k, f in functions.items()}

    def __deepcopy__(self, memo: dict) -> Compiled:
        """Itself, because weights are arguments."""
        return self

    def __reduce__(self) -> tuple:
        """Compiled functions are not pickled but made again."""
        return Compiled, (self.backend, self.slots)

    def features(self, backbone: EScAIPBackbone, edges: Edges) -> tuple | None:
        """Node features [N, H] and edge features [E, H] or None."""
        padded = self._padded(edges, training=torch.is_grad_enabled())
        found = self._call("features", padded, padded.geometry, backbone)
        if found is None or padded is edges:
            return found
        node, edge = found
        return node[: len(edges.species)], edge if edge is None else edge[
            : len(edges.graph.senders)
        ]

    def derivatives(
        self, backbone: EScAIPBackbone, head: EnergyHead, edges: Edges, shares: Tensor
    ) -> tuple[Tensor, list[Tensor], tuple[Tensor, ...]] | None:
        """Atomic energies, and the derivatives of a sum of them by the geometry of the edges.

        Differentiable in the weights, in training only.

        Args:
            backbone: The backbone.
            head: What makes energies of node features.
            edges: The batch.
            shares: Factor of each atomic energy in the sum, [N].

        Returns:
            Energies [N], tensors that depend on positions, and the derivatives by these.
        """
        padded = self._padded(edges, training=head.training)
        atoms = len(edges.species)
        shares = torch.cat([shares, shares.new_zeros(len(padded.species) - atoms)])
        geometry = [x.detach().requires_grad_(x.requires_grad) for x in padded.geometry]
        with torch.set_grad_enabled(head.training):
            found = self._call("derivatives", padded, geometry, backbone, head, shares=shares)
        if found is None:
            return None
        # a hard cut has no slope
        return found[0][:atoms], [x for x in padded.geometry if x.requires_grad], found[1]

    def _padded(self, edges: Edges, *, training: bool) -> Edges:
        return edges if self.shapes is None or training else self.shapes.pad(edges)

    def _call(self, name: str, edges: Edges, geometry, *modules: nn.Module, **more: Tensor):
        graph = edges.graph
        # a size of 1 would have a graph of its own
        sizes = len(graph.counts), len(graph.pair_lengths), graph.num_slots
        if self.failed or min(sizes) < 2:
            return None
        others = edges.others
        for tensor in (*geometry, *others, *more.values()):
            if tensor is not None:
                torch._dynamo.mark_dynamic(tensor, 0)
        functions = self._functions
        if self.shapes is not None and not torch.is_grad_enabled():
            functions = self._replayed
            torch.compiler.cudagraph_mark_step_begin()  # what the last step gave is not needed
        # DDP would cut the graph into pieces, for its communication to begin earlier
        options = {"optimize_ddp": False, "trace_autograd_ops": True}
        try:
            with torch._dynamo.config.patch(options):
                return functions[name](*modules, tuple(geometry), others, edges.autocast, **more)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.failed = True
            cause = getattr(error, "inner_exception", error)
            lines = str(cause).strip().splitlines() or [""]
            log = logging.getLogger(__name__)
            log.warning("not compiled: %s: %s", type(cause).__name__, lines[0])
            return None
