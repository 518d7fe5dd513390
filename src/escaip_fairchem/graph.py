"""From a batch of structures to the packed neighbourhoods that attention works on.

Shapes: N atoms, P candidate pairs, C candidates per atom, E edges (packed slots).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from escaip_fairchem.neighbors import Structures, find_pairs, refuse_overlap

if TYPE_CHECKING:
    from escaip_fairchem.config import EScAIPConfig

#: soft_knn, published form: ranks count the nearest max_neighbors + 20 atoms only.
RANK_MARGIN = 20

#: Beyond every candidate; finite, because inf - inf would poison gradients.
FAR = 1.0e4

#: Candidates are searched this much further, Angstrom, and cut by their exact lengths: the
#: search may run in reduced precision (TF32, autocast) during training.
SEARCH_MARGIN = 0.05


@dataclass
class NeighborGraph:
    """Neighbourhoods, packed: edges sorted by receiver, no padding.

    Attributes:
        senders: Neighbour of each edge, [E].
        receivers: Atom that the edge belongs to, ascending, [E].
        pairs: Row of each edge in `pair_lengths`, the same for i -> j and j -> i, [E].
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


def build_graph(structures: Structures, config: EScAIPConfig) -> NeighborGraph:
    """Neighbourhoods of every atom, as the preset defines them.

    Args:
        structures: The batch; differentiable positions and cell give differentiable edges.
        config: Reads graph, cutoff, max_neighbors, rank_scale, envelope_scale, smooth,
            use_pbc and neighbor_search.

    Returns:
        The graph. Atoms without neighbours have one edge to themselves without direction.

    Raises:
        UserError: Two atoms coincide.
    """
    if not config.use_pbc:
        structures = replace(structures, pbc=torch.zeros_like(structures.pbc))
    build = {"knn": _knn_graph, "soft_knn": _soft_knn_graph}[config.graph]
    return build(structures, config)


def _knn_graph(structures: Structures, config: EScAIPConfig) -> NeighborGraph:
    """Strictly the nearest `max_neighbors` within the cutoff, hard cut (preset ``paper``)."""
    k = config.max_neighbors
    lists = _candidates(structures, config, config.cutoff, enough=k)
    keep = lists.distances[:, :k] < FAR
    receivers = keep.nonzero()[:, 0]
    # an atom without neighbours attends to itself, as in the authors' patch_singleton_atom,
    # but without their direction (1, 0, 0), which gave it a force
    lonely = (~keep.any(1)).nonzero()[:, 0]
    return _pack(
        lists,
        candidates=lists.candidate[:, :k][keep],
        receivers=receivers,
        selves=lonely,
        self_exists=False,
        log_envelope=lists.lengths.new_zeros(len(receivers)),
    )


def _soft_knn_graph(structures: Structures, config: EScAIPConfig) -> NeighborGraph:
    """Bi-directional soft k nearest neighbours with an envelope (preset ``v2``).

    The envelope variable of an edge is a soft maximum of its rank among the neighbours of
    either end, over k, and of its length over the cutoff; edges with a value below 1 exist.
    fairchem-core 2.24 models/escaip/utils/radius_graph.py is the reference.
    """
    k = config.max_neighbors
    step = _smooth_step if config.smooth else _sine_step
    # a rank counts what is up to pi * rank_scale further away than the edge itself
    reach = config.cutoff + torch.pi * config.rank_scale
    lists = _candidates(structures, config, reach, enough=None)
    n = len(structures.positions)
    # the atom itself, at distance 0, takes part in the ranking
    distances = torch.cat([lists.distances.new_zeros(n, 1), lists.distances], dim=1)
    if not config.smooth:
        distances = distances[:, : k + RANK_MARGIN]
    own = _ranks(distances, distances, step, config.rank_scale)[:, 1:]
    near = (distances[:, 1:] <= config.cutoff) & (own < k)
    receivers = near.nonzero()[:, 0]
    candidates = lists.candidate[:, : near.shape[1]][near]
    senders = lists.senders[candidates]
    lengths = distances[:, 1:][near]
    theirs = _ranks(lengths[:, None], distances[senders], step, config.rank_scale)[:, 0]
    terms = torch.stack([own[near] / k, theirs / k, lengths / config.cutoff])
    x = config.envelope_scale * torch.logsumexp(terms / config.envelope_scale, dim=0)

    inside = (x < 1).nonzero()[:, 0]
    x2 = x[inside].square()
    return _pack(
        lists,
        candidates=candidates[inside],
        receivers=receivers[inside],
        selves=torch.arange(n, device=senders.device),
        self_exists=True,
        log_envelope=-x2 / (1 - x2),
    )


@dataclass
class _Candidates:
    """Pairs within reach, [P / 2], and each atom's list of them by distance, [N, C].

    Candidate p < P / 2 of the lists is pair p, candidate p + P / 2 the same pair seen from its
    other end. Lists are padded with distance FAR (and candidate 0).
    """

    senders: Tensor  # of every candidate, [P]
    vectors: Tensor  # of every pair, [P / 2, 3]
    lengths: Tensor  # of every pair, [P / 2]
    distances: Tensor
    candidate: Tensor


def _candidates(
    structures: Structures, config: EScAIPConfig, reach: float, enough: int | None
) -> _Candidates:
    """Sorted candidate lists within `reach`, or shorter ones that hold `enough` everywhere.

    The nearest `enough` neighbours are the same whatever the radius, once every atom has
    that many; a small first radius saves most of a 12 A search.
    """
    n = len(structures.positions)
    radius = reach if enough is None else min(reach, 6.0)
    while True:
        pairs = find_pairs(structures, radius + SEARCH_MARGIN, config.neighbor_search).unordered()
        vectors = pairs.vectors(structures)
        lengths = vectors.square().sum(-1).sqrt()
        inside = lengths <= radius
        ends = torch.cat([pairs.receivers[inside], pairs.senders[inside]])
        counts = torch.bincount(ends, minlength=n)
        if radius >= reach or int(counts.min()) >= enough:
            break
        radius = min(reach, 1.5 * radius)
    refuse_overlap(lengths, pairs)
    pairs, vectors, lengths = pairs.select(inside), vectors[inside], lengths[inside]
    width = int(counts.max())
    both = torch.cat([lengths, lengths])
    # stable sorts by distance, then by receiver: ties keep the order of the search
    by_length = torch.sort(both.detach(), stable=True).indices
    order = by_length[torch.sort(ends[by_length], stable=True).indices]
    rows = ends[order]
    columns = torch.arange(len(order), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    place = rows * width + columns
    distances = both.new_full((n * width,), FAR).index_copy(0, place, both.index_select(0, order))
    candidate = torch.zeros(n * width, dtype=torch.long, device=rows.device)
    candidate[place] = order
    senders = torch.cat([pairs.senders, pairs.receivers])
    shape = (n, width)
    return _Candidates(senders, vectors, lengths, distances.view(shape), candidate.view(shape))


def _ranks(lengths: Tensor, distances: Tensor, step, scale: float) -> Tensor:
    """How many of each row of `distances` [R, C] lie below each of `lengths` [R, M], softly.

    In chunks that bound memory, and on a CPU stay in its cache.
    """
    width = distances.shape[1]
    size = 2**18 if distances.device.type == "cpu" else 2**26
    chunk = max(1, size // (lengths.shape[1] * width))
    parts = [
        step((a[:, :, None] - b[:, None, :]) * (1 / scale)).sum(-1)
        for a, b in zip(lengths.split(chunk), distances.split(chunk), strict=True)
    ]
    return torch.cat(parts)


def _sine_step(x: Tensor) -> Tensor:
    """Step from 0 to 1 over [-pi, pi], once differentiable (as published)."""
    return 0.5 + 0.5 * torch.sin(0.5 * x.clamp(-torch.pi, torch.pi))


def _smooth_step(x: Tensor) -> Tensor:
    """Step from 0 to 1 over [-pi, pi], three times differentiable."""
    t = (x / (2 * torch.pi) + 0.5).clamp(0, 1)
    return t**4 * (35 + t * (-84 + t * (70 - 20 * t)))


def _pack(
    lists: _Candidates,
    *,
    candidates: Tensor,
    receivers: Tensor,
    selves: Tensor,
    self_exists: bool,
    log_envelope: Tensor,
) -> NeighborGraph:
    """The chosen candidates of ascending receivers, with a self edge before those of `selves`."""
    atoms, half = len(lists.distances), len(lists.lengths)
    pair = candidates % half if half else candidates
    used = torch.zeros(half, dtype=torch.bool, device=pair.device)
    used[pair] = True
    row_of_pair = used.cumsum(0) - 1
    lengths = lists.lengths[used]
    units = lists.vectors[used] / lengths[:, None]
    # one row more: the self edge, without length and direction
    lengths = torch.cat([lengths, lengths.new_zeros(1)])
    units = torch.cat([units, -units, units.new_zeros(1, 3)])
    rows = row_of_pair[pair]
    turned = rows + (candidates >= half) * (len(lengths) - 1)

    order = torch.sort(torch.cat([selves, receivers]), stable=True).indices

    def packed(self_value: Tensor, edge_value: Tensor) -> Tensor:
        values = torch.cat([self_value.expand(len(selves)), edge_value])
        return values.index_select(0, order)

    receivers = torch.cat([selves, receivers]).index_select(0, order)
    counts = torch.bincount(receivers, minlength=atoms)
    zero = lengths.new_zeros(1)
    last = torch.tensor([len(lengths) - 1], device=pair.device)
    return NeighborGraph(
        senders=torch.cat([selves, lists.senders[candidates]]).index_select(0, order),
        receivers=receivers,
        pairs=packed(last, rows),
        pair_lengths=lengths,
        directions=units.index_select(0, packed(2 * last, turned)),
        log_envelope=packed(zero, log_envelope),
        exists=packed(zero + float(self_exists), torch.ones_like(log_envelope)),
        counts=counts,
        num_slots=int(counts.max()),
    )
