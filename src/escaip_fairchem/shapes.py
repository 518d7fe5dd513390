"""What features are computed from, as it is and padded to sizes that repeat.

Shapes: N atoms, E edges, U distinct lengths, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from escaip_fairchem.graph import NeighborGraph


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


class Shapes:
    """Sizes that batches are padded to, so that a whole trajectory has one or two.

    Atoms that nothing else sees take the edges that are missing: at least one each, at most K.
    There are as many of them as the number of edges may vary by without another size. A size
    that was used is used again where a batch fits.

    Args:
        slots: K, until a batch needs more.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.sizes: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def pad(self, edges: Edges) -> Edges:
        """The batch with atoms, edges and lengths added behind its own."""
        graph = edges.graph
        self.slots = max(self.slots, graph.num_slots)
        atoms, count, lengths = map(len, (graph.counts, graph.senders, graph.pair_lengths))
        span = max(64, 1 << (count // 16).bit_length())
        ghosts = -(-span // (self.slots - 1))
        sizes = self.sizes.setdefault((atoms, span), [])
        for size in sizes:
            if ghosts <= size[0] - count <= ghosts * self.slots and lengths <= size[1]:
                break
        else:
            part = span // 4  # of the span is left on either side
            size = tuple((n // part + 2) * part for n in (count + ghosts, lengths))
            sizes.append(size)
        return self._padded(edges, ghosts, size[0] - count, size[1] - lengths)

    def _padded(self, edges: Edges, ghosts: int, added: int, lengths: int) -> Edges:
        graph, device = edges.graph, edges.species.device
        new = torch.arange(ghosts, device=device)
        counts = added // ghosts + (new < added % ghosts).long()
        own = torch.repeat_interleave(new + len(graph.counts), counts, output_size=added)

        def behind(tensor: Tensor, value: float | Tensor) -> Tensor:
            """`tensor` and rows of `value`."""
            if not isinstance(value, Tensor):
                value = tensor.new_full((added, *tensor.shape[1:]), value)
            return torch.cat([tensor, value])

        # the last length stays the last: that of edges of an atom to itself
        last = len(graph.pair_lengths) - 1
        own_lengths, self_length = graph.pair_lengths.split([last, 1])
        moved = torch.where(graph.pairs == last, last + lengths, graph.pairs)
        padded = NeighborGraph(
            senders=behind(graph.senders, own),
            receivers=behind(graph.receivers, own),
            pairs=behind(moved, last + lengths),
            pair_lengths=torch.cat([own_lengths, self_length.new_ones(lengths), self_length]),
            directions=behind(graph.directions, 0.0),
            log_envelope=behind(graph.log_envelope, 0.0),
            exists=behind(graph.exists, 0.0),
            counts=behind(graph.counts, counts),
            num_slots=self.slots,
        )
        species = torch.cat([edges.species, edges.species[:1].expand(ghosts)])
        system_idx = torch.cat([edges.system_idx, edges.system_idx[-1:].expand(ghosts)])
        forces = edges.forces
        if forces is not None:
            forces = torch.cat([forces, forces.new_zeros(ghosts, 3)])
        return Edges(padded, species, system_idx, forces, edges.autocast)
