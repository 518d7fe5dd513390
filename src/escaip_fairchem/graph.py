"""From a batch of structures to the packed neighbourhoods that attention works on.

Shapes: N atoms, E edges (packed slots).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from escaip_fairchem.candidates import (
    FAR,
    Candidates,
    Edges,
    choose,
    find_candidates,
    sorted_lists,
)
from escaip_fairchem.soft_knn import fused_soft_knn, torch_soft_knn

if TYPE_CHECKING:
    from escaip_fairchem.config import EScAIPConfig
    from escaip_fairchem.neighbors import Structures


@dataclass
class NeighborGraph:
    """Neighbourhoods, packed: edges sorted by receiver, no padding.

    Attributes:
        senders: Neighbour of each edge, [E].
        receivers: Atom that the edge belongs to, ascending, [E].
        pairs: Row of each edge in `pair_lengths`; of a direct model the same for i -> j and
            j -> i, [E].
        pair_lengths: Distances, Angstrom; one 0 for all self edges, [U].
        directions: Unit vectors from the neighbour to the atom; zero for a self edge, [E, 3].
        log_envelope: Logarithm of the edge's weight, 0 for a hard cut, [E].
        exists: 1.0, or 0.0 for an edge that stands for "no neighbour", [E].
        counts: Edges of each atom, [N].
        num_slots: Size K of the largest neighbourhood.
    """

    senders: Tensor
    receivers: Tensor
    pairs: Tensor
    pair_lengths: Tensor
    directions: Tensor
    log_envelope: Tensor
    exists: Tensor
    counts: Tensor
    num_slots: int

    @property
    def lengths(self) -> Tensor:
        """Distance of each edge, Angstrom, [E]."""
        return self.pair_lengths.index_select(0, self.pairs)

    @property
    def starts(self) -> Tensor:
        """First edge of each atom, [N]; with ``soft_knn`` it is the atom itself (slot 0)."""
        return self.counts.cumsum(0) - self.counts

    @property
    def envelope(self) -> Tensor:
        """Weight of each edge, 1 for a self edge or a hard cut, [E]."""
        return self.log_envelope.exp()

    @property
    def slots(self) -> Tensor:
        """Position of each edge in a padded [N * K] layout, [E]."""
        edge = torch.arange(len(self.receivers), device=self.receivers.device)
        return self.receivers * self.num_slots + edge - self.starts[self.receivers]


def build_graph(
    structures: Structures, config: EScAIPConfig, *, fused: bool = False
) -> NeighborGraph:
    """Neighbourhoods of every atom, as the preset defines them.

    Args:
        structures: The batch; differentiable positions and cell give differentiable edges.
        config: Reads graph, cutoff, max_neighbors, rank_scale, envelope_scale, smooth,
            use_pbc and neighbor_search.
        fused: Lists, ranks and envelopes of ``soft_knn`` from Triton kernels.

    Returns:
        The graph. Atoms without neighbours have one edge to themselves without direction.

    Raises:
        UserError: Two atoms coincide.
    """
    if not config.use_pbc:
        structures = replace(structures, pbc=torch.zeros_like(structures.pbc))
    if config.graph == "knn":
        return _knn_graph(structures, config)
    return _soft_knn_graph(structures, config, fused=fused)


def _knn_graph(structures: Structures, config: EScAIPConfig) -> NeighborGraph:
    """Strictly the nearest `max_neighbors` within the cutoff, hard cut (preset ``paper``)."""
    k = config.max_neighbors
    given = find_candidates(structures, config, config.cutoff, first=6.0, enough=k)
    lists = sorted_lists(given, k)
    # an atom without neighbours attends to itself, as in the authors' patch_singleton_atom,
    # but without their direction (1, 0, 0), which gave it a force
    edges = choose(given, lists.distances.view(-1) < FAR, *lists.flat(), lonely=True)
    log_envelope = given.lengths.new_zeros(len(edges.rows))
    return _pack(given, edges, log_envelope, self_exists=False)


def _soft_knn_graph(structures: Structures, config: EScAIPConfig, *, fused: bool) -> NeighborGraph:
    """Bi-directional soft k nearest neighbours with an envelope (preset ``v2``).

    The envelope variable of an edge is a soft maximum of its rank among the neighbours of
    either end, over k, and of its length over the cutoff; edges with a value below 1 exist.
    fairchem-core 2.24 models/escaip/utils/radius_graph.py is the reference.
    """
    # a rank counts what is up to pi * rank_scale further away than the edge itself
    reach = config.cutoff + torch.pi * config.rank_scale
    given = find_candidates(structures, config, reach, first=reach)
    edges, log_envelope = (fused_soft_knn if fused else torch_soft_knn)(given, config)
    return _pack(given, edges, log_envelope, self_exists=True)


def _pack(
    given: Candidates, edges: Edges, log_envelope: Tensor, *, self_exists: bool
) -> NeighborGraph:
    """The edges, an atom's edge to itself before its others."""
    lengths = given.lengths.index_select(0, edges.kept)
    units = given.vectors.index_select(0, edges.kept) / lengths[:, None]
    # one row more: the self edge, without length and direction
    lengths = torch.cat([lengths, lengths.new_zeros(1)])
    units = torch.cat([units, -units, units.new_zeros(1, 3)])
    seen_from_other_end = edges.candidates >= len(given.lengths)
    turned = edges.pairs + seen_from_other_end * (len(lengths) - 1)

    selves, count = edges.selves, len(edges.selves)
    total, device = count + len(edges.rows), selves.device
    starts = edges.counts.cumsum(0) - edges.counts
    before = torch.zeros_like(starts).index_fill(0, selves, 1).cumsum(0)
    places = torch.arange(len(edges.rows), device=device) + before.index_select(0, edges.receivers)
    places = torch.cat([starts.index_select(0, selves), places])
    order = torch.empty_like(places).scatter_(0, places, torch.arange(total, device=device))

    def packed(self_value: Tensor, edge_value: Tensor) -> Tensor:
        values = torch.cat([self_value.expand(count), edge_value])
        return values.index_select(0, order)

    zero = lengths.new_zeros(1)
    last = torch.full((1,), len(lengths) - 1, device=device)
    return NeighborGraph(
        senders=packed(selves, given.senders.index_select(0, edges.candidates)),
        receivers=packed(selves, edges.receivers),
        pairs=packed(last, edges.pairs),
        pair_lengths=lengths,
        directions=units.index_select(0, packed(2 * last, turned)),
        log_envelope=packed(zero, log_envelope),
        exists=packed(zero + float(self_exists), torch.ones_like(log_envelope)),
        counts=edges.counts,
        num_slots=edges.num_slots,
    )
