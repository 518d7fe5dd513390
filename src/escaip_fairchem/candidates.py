"""Candidate edges: pairs within reach, seen from both ends, and each atom's list of them.

Shapes: N atoms, P candidates (directed pairs), C places in a list, M places offered, E edges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from escaip_fairchem.neighbors import (
    Pairs,
    PairSearch,
    Structures,
    count_rows,
    in_blocks,
    refuse_overlap,
)

if TYPE_CHECKING:
    from escaip_fairchem.config import EScAIPConfig

#: Beyond every candidate; finite, because inf - inf would poison gradients.
FAR = 1.0e4

#: Candidates are searched this much further, Angstrom, and cut by their exact lengths: the
#: search may run in reduced precision (TF32, autocast) during training.
SEARCH_MARGIN = 0.05


@dataclass
class Candidates:
    """Pairs within a radius, each seen from both ends.

    Candidate p < P / 2 is pair p, candidate p + P / 2 the same pair seen from its other end; a
    conservative model has vectors and lengths of all P.

    Attributes:
        senders: Neighbour, [P].
        receivers: Atom that it is a neighbour of, [P].
        distances: Angstrom, [P].
        vectors: Of every pair, from the neighbour to the atom, [P / 2, 3] (or [P, 3]).
        lengths: Of every pair, [P / 2] (or [P]).
        atoms: N.
        radius: Angstrom.
    """

    senders: Tensor
    receivers: Tensor
    distances: Tensor
    vectors: Tensor
    lengths: Tensor
    atoms: int
    radius: float

    @property
    def bits(self) -> int:
        """Of the integers that distances are sorted as; they resolve a float32 beyond overlap.

        Integers sort several times faster on a CPU, and by their size.
        """
        return 32 if self.distances.dtype == torch.float32 else 40

    @property
    def resolution(self) -> float:
        """Of the same, per Angstrom."""
        return 2.0 ** (self.bits - 1) / (self.radius + SEARCH_MARGIN)


@dataclass
class Lists:
    """Each atom's candidates by distance, [N, C]; padded with distance FAR and candidate 0."""

    distances: Tensor
    candidates: Tensor

    def with_selves(self) -> Tensor:
        """Distances, that of the atom itself first, [N, 1 + C]."""
        return torch.cat([self.distances.new_zeros(len(self.distances), 1), self.distances], dim=1)

    def flat(self) -> tuple[Tensor, Tensor]:
        """Candidate and receiver of each place, [N * C]."""
        n, width = self.candidates.shape
        receivers = torch.arange(n, device=self.candidates.device)
        return self.candidates.view(-1), receivers[:, None].expand(n, width).reshape(-1)


@dataclass
class Edges:
    """Candidates that become edges.

    Attributes:
        rows: Which of the places offered, [E].
        candidates: [E].
        receivers: Ascending, [E].
        pairs: Pair of each edge among `kept`, [E].
        kept: Pairs that have an edge, ascending, [U].
        selves: Atoms that have an edge to themselves besides, [S].
        counts: Edges of each atom, that to itself included, [N].
        num_slots: The largest of `counts`.
    """

    rows: Tensor
    candidates: Tensor
    receivers: Tensor
    pairs: Tensor
    kept: Tensor
    selves: Tensor
    counts: Tensor
    num_slots: int


def find_candidates(
    structures: Structures,
    config: EScAIPConfig,
    reach: float,
    *,
    first: float,
    enough: int | None = None,
) -> Candidates:
    """All within `reach`, or only as far as every atom has `enough`.

    The nearest neighbours are the same whatever the radius, once every atom has enough of
    them; a small `first` radius saves most of a 12 A search.
    """
    n = len(structures.positions)
    search = PairSearch(structures, config.neighbor_search)
    radius = min(first, reach)
    while True:
        pairs = search.within(radius + SEARCH_MARGIN, unordered=True)
        vectors = pairs.vectors(structures)
        lengths = vectors.square().sum(-1).sqrt()
        distances = torch.cat([lengths, lengths])
        receivers = torch.cat([pairs.receivers, pairs.senders])
        if radius >= reach:
            break
        within = count_rows(receivers, n, distances.detach() <= radius)
        if int(within.min()) >= enough:
            break
        radius = min(reach, 1.5 * radius)
    if not config.direct_forces:
        # forces differentiate Gaussians of 0.02 A, which amplifies the rounding of a length: each
        # direction has its own, as in the reference
        mirrored = Pairs(pairs.receivers, pairs.senders, -pairs.offsets)
        vectors = torch.cat([vectors, mirrored.vectors(structures)])
        lengths = distances = vectors.square().sum(-1).sqrt()
    senders = torch.cat([pairs.senders, pairs.receivers])
    return Candidates(senders, receivers, distances, vectors, lengths, n, radius)


def sorted_lists(given: Candidates, enough: int | None) -> Lists:
    """The nearest `enough` (None: all) candidates of each atom; ties keep the search's order."""
    n, distances, bits, resolution = given.atoms, given.distances, given.bits, given.resolution
    counts = count_rows(given.receivers, n)
    width = int(counts.max()) if enough is None else min(int(counts.max()), enough)

    # one sort by receiver, then distance
    def keys(receivers: Tensor, lengths: Tensor) -> Tensor:
        return (receivers << bits) + (lengths.double() * resolution).long()

    values = in_blocks(keys, given.receivers, distances.detach())
    order = torch.sort(values, stable=True).indices
    columns = torch.arange(width, device=order.device)
    places = (counts.cumsum(0) - counts)[:, None] + columns
    candidates = order.index_select(0, places.clamp(max=len(order) - 1).view(-1))
    listed = distances.index_select(0, candidates).view(n, width)
    filled = (columns < counts[:, None]) & (listed <= given.radius)
    return Lists(
        distances=torch.where(filled, listed, FAR),
        candidates=torch.where(filled, candidates.view(n, width), 0),
    )


def choose(
    given: Candidates, chosen: Tensor, candidates: Tensor, receivers: Tensor, *, lonely: bool
) -> Edges:
    """Keep some of the candidates offered, and decide which atoms have an edge to themselves.

    All numbers that the host needs are read at once: each read makes it wait for a GPU.

    Args:
        given: All candidates.
        chosen: Which to keep, [M].
        candidates: Offered, [M].
        receivers: Of these, ascending, [M].
        lonely: Only atoms without a neighbour have an edge to themselves, instead of all.

    Raises:
        UserError: Two atoms coincide.
    """
    n, half = given.atoms, len(given.lengths)
    neighbors = count_rows(receivers, n, chosen)
    selves = neighbors == 0 if lonely else torch.ones_like(neighbors, dtype=torch.bool)
    counts = neighbors + selves
    pairs = torch.where(candidates < half, candidates, candidates - half)
    used = torch.zeros(half + 1, dtype=torch.bool, device=pairs.device)
    used[torch.where(chosen, pairs, half)] = True
    used = used[:half]
    shortest = torch.cat([given.lengths.detach(), given.lengths.new_full((1,), FAR)]).min()
    numbers = chosen.sum(), used.sum(), selves.sum(), counts.max(), shortest
    *sizes, shortest = torch.stack([number.double() for number in numbers]).tolist()
    refuse_overlap(shortest, given.lengths, given.senders, given.receivers)
    num_edges, num_used, num_selves, num_slots = map(int, sizes)
    rows = rows_where(chosen, num_edges)
    row_of_pair = used.cumsum(0) - 1
    return Edges(
        rows=rows,
        candidates=candidates.index_select(0, rows),
        receivers=receivers.index_select(0, rows),
        pairs=row_of_pair.index_select(0, pairs.index_select(0, rows)),
        kept=rows_where(used, num_used),
        selves=rows_where(selves, num_selves),
        counts=counts,
        num_slots=num_slots,
    )


def rows_where(mask: Tensor, count: int) -> Tensor:
    """Where `mask` [M] is true, in order; `count` is how often, [count]."""
    if mask.device.type == "cpu":
        return mask.nonzero()[:, 0]
    return torch.nonzero_static(mask, size=count)[:, 0]  # does not wait for the GPU
