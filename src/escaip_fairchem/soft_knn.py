"""Soft k nearest neighbours (preset ``v2``): ranks, the soft maximum, and which edges exist.

Shapes: N atoms, C places in a list, E edges.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from escaip_fairchem.candidates import FAR, Candidates, Edges, Lists, choose, sorted_lists
from escaip_fairchem.neighbors import in_blocks

if TYPE_CHECKING:
    from escaip_fairchem.config import EScAIPConfig

#: Published form: ranks count the nearest max_neighbors + 20 atoms only.
RANK_MARGIN = 20


def torch_soft_knn(given: Candidates, config: EScAIPConfig) -> tuple[Edges, Tensor]:
    """Edges that exist, and the logarithms of their envelopes, [E]."""
    k, scale = config.max_neighbors, config.rank_scale
    lists = sorted_lists(given, _list_size(config))
    width = lists.distances.shape[1]
    distances = lists.with_selves()
    if config.smooth:
        ranks = _ranks(distances, distances, _smooth_step, scale)[:, 1:]
    else:
        ranks = in_blocks(partial(_sine_ranks, scale=scale), distances)[:, 1:]
    near = (lists.distances <= config.cutoff) & (ranks < k)
    ranks = ranks.reshape(-1)
    places = near.view(-1).nonzero()[:, 0]
    receivers = places // max(width, 1)
    candidates = lists.candidates.view(-1).index_select(0, places)
    lengths = lists.distances.view(-1).index_select(0, places)
    own = ranks.index_select(0, places)
    theirs = _ranks_of_mirrors(lists, len(given.senders), candidates, ranks)
    # atoms that the neighbour's own list is too short for
    absent = theirs.isinf().nonzero()[:, 0]
    senders = given.senders.index_select(0, candidates.index_select(0, absent))
    rows = distances.index_select(0, senders)
    found = _ranks(lengths.index_select(0, absent)[:, None], rows, _sine_step, scale)[:, 0]
    theirs = theirs.index_copy(0, absent, found)
    x = _soft_maximum(own, theirs, lengths, config)
    edges = choose(given, x < 1, candidates, receivers, lonely=False)
    return edges, _log_envelope(x.index_select(0, edges.rows))


def fused_soft_knn(given: Candidates, config: EScAIPConfig) -> tuple[Edges, Tensor]:
    """The same from Triton kernels.

    Where distances need a gradient the kernels only choose the edges; the envelopes of these are
    computed again by differentiable operations.
    """
    from escaip_fairchem.kernels.triton_graph import soft_knn_lists, soft_knn_log_envelope

    receivers, order = torch.sort(given.receivers.int(), stable=True)
    atoms = torch.arange(given.atoms + 1, dtype=torch.int32, device=order.device)
    starts = torch.searchsorted(receivers, atoms)
    width = _list_size(config)
    if width is None:
        width = int(starts.diff().max())
    sizes = width, given.radius, given.resolution, FAR
    lists = Lists(*soft_knn_lists(given.distances.detach(), order, starts, *sizes))
    scales = config.cutoff, config.rank_scale, config.envelope_scale
    log_envelope = soft_knn_log_envelope(
        lists.distances,
        lists.candidates,
        given.senders,
        config.max_neighbors,
        *scales,
        config.smooth,
        FAR,
    ).view(-1)
    edges = choose(given, log_envelope > -torch.inf, *lists.flat(), lonely=False)
    if given.distances.requires_grad:
        return edges, _differentiable(given, lists, edges, config)
    return edges, log_envelope.index_select(0, edges.rows)


def _differentiable(given: Candidates, lists: Lists, edges: Edges, config: EScAIPConfig) -> Tensor:
    """Logarithms of the envelopes of given edges, as a function of the distances, [E]."""
    listed = given.distances.index_select(0, lists.candidates.view(-1))
    listed = torch.where(lists.distances < FAR, listed.view_as(lists.distances), FAR)
    distances = Lists(listed, lists.candidates).with_selves()
    lengths = given.distances.index_select(0, edges.candidates)
    senders = given.senders.index_select(0, edges.candidates)
    step = _smooth_step if config.smooth else _sine_step
    own, theirs = (
        _ranks(lengths[:, None], distances.index_select(0, end), step, config.rank_scale)[:, 0]
        for end in (edges.receivers, senders)
    )
    # what its rounding may put at 1 or above has no weight, by the kernel's rounding as well
    return _log_envelope(_soft_maximum(own, theirs, lengths, config).clamp(max=1 - 2**-20))


def _list_size(config: EScAIPConfig) -> int | None:
    """Candidates in a list, the atom itself not counted; None: all."""
    return None if config.smooth else config.max_neighbors + RANK_MARGIN - 1


def _soft_maximum(own: Tensor, theirs: Tensor, lengths: Tensor, config: EScAIPConfig) -> Tensor:
    """Of both ranks over k and the length over the cutoff, [E]."""
    k, scale = config.max_neighbors, config.envelope_scale
    terms = torch.stack([own / k, theirs / k, lengths / config.cutoff])
    return scale * torch.logsumexp(terms / scale, dim=0)


def _log_envelope(x: Tensor) -> Tensor:
    x2 = x.square()
    return -x2 / (1 - x2)


def _ranks_of_mirrors(lists: Lists, total: int, candidates: Tensor, ranks: Tensor) -> Tensor:
    """`ranks` [N * C] of the same pairs in their other ends' lists, inf where not in them."""
    half = total // 2
    filled = lists.distances.view(-1) < FAR
    # one place more for the paddings of the lists
    targets = torch.where(filled, lists.candidates.view(-1), total)
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
