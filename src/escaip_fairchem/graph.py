"""From a batch of structures to the packed neighbourhoods that attention works on.

Shapes: N atoms, P candidate pairs, C candidates per atom, E edges (packed slots).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from escaip_fairchem.neighbors import Pairs, Structures, find_pairs, in_blocks, refuse_overlap

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
    lists = _candidates(structures, config, config.cutoff, first=6.0, enough=k)
    keep = lists.distances < FAR
    receivers = keep.nonzero()[:, 0]
    # an atom without neighbours attends to itself, as in the authors' patch_singleton_atom,
    # but without their direction (1, 0, 0), which gave it a force
    lonely = (~keep.any(1)).nonzero()[:, 0]
    return _pack(
        lists,
        candidates=lists.candidate[keep],
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
    k, scale = config.max_neighbors, config.rank_scale
    # a rank counts what is up to pi * rank_scale further away than the edge itself
    reach = config.cutoff + torch.pi * scale
    enough = None if config.smooth else k + RANK_MARGIN - 1
    lists = _candidates(structures, config, reach, first=reach, enough=enough)
    n, width = lists.distances.shape
    # the atom itself, at distance 0, takes part in the ranking
    distances = torch.cat([lists.distances.new_zeros(n, 1), lists.distances], dim=1)
    if config.smooth:
        ranks = _ranks(distances, distances, _smooth_step, scale)[:, 1:]
    else:
        ranks = in_blocks(partial(_sine_ranks, scale=scale), distances)[:, 1:]
    near = (lists.distances <= config.cutoff) & (ranks < k)
    ranks = ranks.reshape(-1)
    places = near.view(-1).nonzero()[:, 0]
    receivers = places // max(width, 1)
    candidates = lists.candidate.view(-1).index_select(0, places)
    senders = lists.senders.index_select(0, candidates)
    lengths = lists.distances.view(-1).index_select(0, places)
    own = ranks.index_select(0, places)
    theirs = _ranks_of_mirrors(lists, candidates, ranks)
    # atoms that the neighbour's own list is too short for
    absent = theirs.isinf().nonzero()[:, 0]
    rows = distances.index_select(0, senders.index_select(0, absent))
    found = _ranks(lengths.index_select(0, absent)[:, None], rows, _sine_step, scale)[:, 0]
    theirs = theirs.index_copy(0, absent, found)
    terms = torch.stack([own / k, theirs / k, lengths / config.cutoff])
    x = config.envelope_scale * torch.logsumexp(terms / config.envelope_scale, dim=0)

    inside = (x < 1).nonzero()[:, 0]
    x2 = x.index_select(0, inside).square()
    return _pack(
        lists,
        candidates=candidates.index_select(0, inside),
        receivers=receivers.index_select(0, inside),
        selves=torch.arange(n, device=senders.device),
        self_exists=True,
        log_envelope=-x2 / (1 - x2),
    )


@dataclass
class _Candidates:
    """Pairs within reach, [P / 2], and each atom's list of them by distance, [N, C].

    Candidate p < P / 2 of the lists is pair p, candidate p + P / 2 the same pair seen from its
    other end; a conservative model has vectors and lengths of all P. Lists are padded with
    distance FAR (and candidate 0).
    """

    senders: Tensor  # of every candidate, [P]
    vectors: Tensor  # of every pair, [P / 2, 3]
    lengths: Tensor  # of every pair, [P / 2]
    distances: Tensor
    candidate: Tensor


def _candidates(
    structures: Structures,
    config: EScAIPConfig,
    reach: float,
    *,
    first: float,
    enough: int | None,
) -> _Candidates:
    """Sorted lists of the nearest `enough` (None: of all) candidates within `reach`.

    The nearest neighbours are the same whatever the radius, once every atom has enough of
    them; a small `first` radius saves most of a 12 A search.
    """
    n = len(structures.positions)
    radius = min(first, reach)
    while True:
        pairs = find_pairs(
            structures, radius + SEARCH_MARGIN, config.neighbor_search, unordered=True
        )
        vectors = pairs.vectors(structures)
        lengths = vectors.square().sum(-1).sqrt()
        both = torch.cat([lengths, lengths])
        ends = torch.cat([pairs.receivers, pairs.senders])
        if radius >= reach:
            break
        within = torch.bincount(ends, (both.detach() <= radius).to(both.dtype), minlength=n)
        if int(within.min()) >= enough:
            break
        radius = min(reach, 1.5 * radius)
    refuse_overlap(lengths, pairs)
    if not config.direct_forces:
        # forces differentiate Gaussians of 0.02 A, which amplifies the rounding of a length: each
        # direction has its own, as in the reference
        mirrored = Pairs(pairs.receivers, pairs.senders, -pairs.offsets)
        vectors = torch.cat([vectors, mirrored.vectors(structures)])
        lengths = both = vectors.square().sum(-1).sqrt()
    counts = torch.bincount(ends, minlength=n)
    width = int(counts.max()) if enough is None else min(int(counts.max()), enough)
    # one sort by receiver, then distance, of integers (several times faster on a CPU, and by
    # their size), which resolve a float32 beyond MIN_DISTANCE; ties keep the order of the search
    bits = 32 if both.dtype == torch.float32 else 40
    scale = 2.0 ** (bits - 1) / (radius + SEARCH_MARGIN)

    def keys(end: Tensor, length: Tensor) -> Tensor:
        return (end << bits) + (length.double() * scale).long()

    order = torch.sort(in_blocks(keys, ends, both.detach()), stable=True).indices
    columns = torch.arange(width, device=order.device)
    places = (counts.cumsum(0) - counts)[:, None] + columns
    candidate = order.index_select(0, places.clamp(max=len(order) - 1).view(-1))
    distances = both.index_select(0, candidate).view(n, width)
    filled = (columns < counts[:, None]) & (distances <= radius)
    return _Candidates(
        senders=torch.cat([pairs.senders, pairs.receivers]),
        vectors=vectors,
        lengths=lengths,
        distances=torch.where(filled, distances, FAR),
        candidate=torch.where(filled, candidate.view(n, width), 0),
    )


def _ranks_of_mirrors(lists: _Candidates, candidates: Tensor, ranks: Tensor) -> Tensor:
    """`ranks` [N * C] of the same pairs in their other ends' lists, inf where not in them."""
    total, half = len(lists.senders), len(lists.senders) // 2
    filled = lists.distances.view(-1) < FAR
    # one place more for the paddings of the lists
    targets = torch.where(filled, lists.candidate.view(-1), total)
    absent = len(ranks)
    place = torch.full((total + 1,), absent, device=ranks.device)
    place.scatter_(0, targets, torch.arange(absent, device=ranks.device))
    mirrors = torch.where(candidates < half, candidates + half, candidates - half)
    ranks = torch.cat([ranks, ranks.new_full((1,), torch.inf)])
    return ranks.index_select(0, place.index_select(0, mirrors))


def _sine_ranks(distances: Tensor, scale: float) -> Tensor:
    """`_ranks` of each row of ascending `distances` [N, C] in itself, for `_sine_step`.

    The step is 0 or 1 outside of a window of the row, and inside of it sin(a - b) =
    sin(a) cos(b) - cos(a) sin(b) turns the sum into differences of cumulative sums, which are
    double because they cancel.
    """
    values = distances.detach().double()
    lower = torch.searchsorted(values, values - torch.pi * scale)
    upper = torch.searchsorted(values, values + torch.pi * scale)
    phase = distances.double() * (0.5 / scale)
    sin, cos = phase.sin(), phase.cos()

    def window(terms: Tensor) -> Tensor:
        sums = torch.nn.functional.pad(terms.cumsum(1), (1, 0))
        return sums.gather(1, upper) - sums.gather(1, lower)

    ranks = 0.5 * (lower + upper) + 0.5 * (sin * window(cos) - cos * window(sin))
    return ranks.to(distances.dtype)


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
    pair = torch.where(candidates < half, candidates, candidates - half)
    used = torch.zeros(half, dtype=torch.bool, device=pair.device)
    used[pair] = True
    row_of_pair = used.cumsum(0) - 1
    kept = used.nonzero()[:, 0]
    lengths = lists.lengths.index_select(0, kept)
    units = lists.vectors.index_select(0, kept) / lengths[:, None]
    # one row more: the self edge, without length and direction
    lengths = torch.cat([lengths, lengths.new_zeros(1)])
    units = torch.cat([units, -units, units.new_zeros(1, 3)])
    rows = row_of_pair.index_select(0, pair)
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
        senders=packed(selves, lists.senders.index_select(0, candidates)),
        receivers=receivers,
        pairs=packed(last, rows),
        pair_lengths=lengths,
        directions=units.index_select(0, packed(2 * last, turned)),
        log_envelope=packed(zero, log_envelope),
        exists=packed(zero + float(self_exists), torch.ones_like(log_envelope)),
        counts=counts,
        num_slots=int(counts.max()),
    )
