"""Soft k nearest neighbours (preset ``v2``) in two Triton kernels: ordered lists, envelopes.

Each program works on one atom, in blocks of a fixed size: registers do not depend on how many
candidates it has, and nothing is read on the host. No atomics. Needs triton and a GPU; on a CPU
only triton's interpreter runs it, if TRITON_INTERPRET=1 was set before the import: for tests.

Shapes: N atoms, P candidates (directed pairs), C places in a list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Places or candidates that a program works on at a time, and compares with at a time.
BLOCK, CHUNK = 64, 16


@triton.jit
def _keys(lengths, order, first, count, place, RESOLUTION: tl.constexpr):
    """Candidates at `place` of an atom, their lengths, and these as the integers to sort by."""
    valid = place < count
    candidate = tl.load(order + first + place, mask=valid, other=0)
    length = tl.load(lengths + candidate, mask=valid, other=0.0)
    return candidate, length, (length.to(tl.float64) * RESOLUTION).to(tl.int64), valid


@triton.jit
def list_kernel(
    lengths,
    order,
    starts,
    distances,
    candidates,
    width,
    RADIUS: tl.constexpr,
    RESOLUTION: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The nearest `width` candidates of an atom by length; the place of each by counting."""
    atom = tl.program_id(0).to(tl.int64)
    first = tl.load(starts + atom)
    count = (tl.load(starts + atom + 1) - first).to(tl.int32)
    row = atom * width
    for begin in range(0, count, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        candidate, length, key, valid = _keys(lengths, order, first, count, place, RESOLUTION)
        rank = tl.zeros([BLOCK], tl.int32)
        for other_begin in range(0, count, CHUNK):
            other = other_begin + tl.arange(0, CHUNK)
            _, _, other_key, counted = _keys(lengths, order, first, count, other, RESOLUTION)
            # of equal ones the first, as in a stable sort
            tie = (other_key[None, :] == key[:, None]) & (other[None, :] < place[:, None])
            before = ((other_key[None, :] < key[:, None]) | tie) & counted[None, :]
            rank += tl.sum(before.to(tl.int32), 1)
        near, kept = length <= RADIUS, valid & (rank < width)
        tl.store(distances + row + rank, tl.where(near, length, FAR), mask=kept)
        tl.store(candidates + row + rank, tl.where(near, candidate, 0), mask=kept)
    for begin in range(count, width, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        empty = place < width
        tl.store(distances + row + place, tl.full([BLOCK], FAR, lengths.dtype.element_ty), empty)
        tl.store(candidates + row + place, tl.zeros([BLOCK], tl.int64), mask=empty)


@triton.jit
def _step(x, SMOOTH: tl.constexpr):
    """`graph.smooth_step` or `graph.sine_step`, from 0 to 1 over [-pi, pi]."""
    PI: tl.constexpr = 3.141592653589793
    x = tl.minimum(tl.maximum(x, -PI), PI)
    if SMOOTH:
        t = tl.minimum(tl.maximum(x * (0.5 / PI) + 0.5, 0.0), 1.0)
        square = t * t
        return square * square * (35 + t * (-84 + t * (70 - 20 * t)))
    else:
        return 0.5 + 0.5 * tl.sin(0.5 * x)


@triton.jit
def envelope_kernel(
    distances,
    candidates,
    senders,
    log_envelope,
    width,
    K: tl.constexpr,
    CUTOFF: tl.constexpr,
    RANK_SCALE: tl.constexpr,
    ENVELOPE_SCALE: tl.constexpr,
    SMOOTH: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Ranks of an atom's neighbours in its own list and in theirs, and from them the envelope."""
    atom = tl.program_id(0).to(tl.int64)
    INVERSE: tl.constexpr = 1 / RANK_SCALE
    for begin in range(0, width, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        at = atom * width + place
        length = tl.load(distances + at, mask=place < width, other=FAR)
        near = length <= CUTOFF
        candidate = tl.load(candidates + at, mask=near, other=0)
        sender = tl.load(senders + candidate, mask=near, other=0)
        # every list begins with the atom itself, at distance 0
        own = _step(length * INVERSE, SMOOTH)
        theirs = own
        for first in range(0, width, CHUNK):
            column = first + tl.arange(0, CHUNK)
            filled = column < width
            mine = tl.load(distances + atom * width + column, mask=filled, other=FAR)
            own += tl.sum(_step((length[:, None] - mine[None, :]) * INVERSE, SMOOTH), 1)
            there = sender[:, None] * width + column[None, :]
            other = tl.load(distances + there, mask=near[:, None] & filled[None, :], other=FAR)
            theirs += tl.sum(_step((length[:, None] - other) * INVERSE, SMOOTH), 1)
        own, theirs, far = own / K, theirs / K, length / CUTOFF
        most = tl.maximum(tl.maximum(own, theirs), far)
        total = tl.exp((own - most) / ENVELOPE_SCALE) + tl.exp((theirs - most) / ENVELOPE_SCALE)
        total += tl.exp((far - most) / ENVELOPE_SCALE)
        x = most + ENVELOPE_SCALE * tl.log(total)
        exists = near & (x < 1)
        x2 = tl.where(exists, x * x, 0.0)
        value = tl.where(exists, -x2 / (1 - x2), -float("inf"))
        tl.store(log_envelope + at, value, mask=place < width)


@torch.library.custom_op("escaip_fairchem::soft_knn_lists", mutates_args=())
def soft_knn_lists(
    lengths: Tensor,
    order: Tensor,
    starts: Tensor,
    width: int,
    radius: float,
    resolution: float,
    far: float,
) -> tuple[Tensor, Tensor]:
    """Each atom's list of its nearest `width` candidates; not differentiable.

    Args:
        lengths: Of all candidates, Angstrom, [P].
        order: Candidates grouped by receiver, [P].
        starts: First place in `order` of each atom, and P, [N + 1].
        width: C.
        radius: Candidates further away are left out, Angstrom.
        resolution: Lengths times this, rounded down, are sorted; equal ones stay in order.
        far: Distance where a list has no candidate.

    Returns:
        Ascending distances and candidates (0 where there is none), [N, C] each.
    """
    n = len(starts) - 1
    distances = lengths.new_empty(n, width)
    candidates = order.new_empty(n, width)
    if n and width:
        with torch.cuda.device_of(lengths):
            list_kernel[(n,)](
                lengths.contiguous(),
                order,
                starts,
                distances,
                candidates,
                width,
                RADIUS=radius,
                RESOLUTION=resolution,
                FAR=far,
                BLOCK=BLOCK,
                CHUNK=CHUNK,
                num_warps=4,
            )
    return distances, candidates


@torch.library.custom_op("escaip_fairchem::soft_knn_log_envelope", mutates_args=())
def soft_knn_log_envelope(
    distances: Tensor,
    candidates: Tensor,
    senders: Tensor,
    k: int,
    cutoff: float,
    rank_scale: float,
    envelope_scale: float,
    smooth: bool,
    far: float,
) -> Tensor:
    """Logarithm of the weight of each place in the lists, -inf where no edge is; no derivative.

    Args:
        distances: From `soft_knn_lists`, [N, C].
        candidates: From `soft_knn_lists`, [N, C].
        senders: Neighbour of each candidate, [P].
        k: Neighbours, softly.
        cutoff: Angstrom.
        rank_scale: Softness of the ranks, Angstrom.
        envelope_scale: Softness of the maximum of ranks and length.
        smooth: The step that is three times differentiable.
        far: As in `soft_knn_lists`.

    Returns:
        [N, C].
    """
    n, width = distances.shape
    log_envelope = torch.empty_like(distances)
    if n and width:
        with torch.cuda.device_of(distances):
            envelope_kernel[(n,)](
                distances,
                candidates,
                senders.contiguous(),
                log_envelope,
                width,
                K=k,
                CUTOFF=cutoff,
                RANK_SCALE=rank_scale,
                ENVELOPE_SCALE=envelope_scale,
                SMOOTH=smooth,
                FAR=far,
                BLOCK=BLOCK,
                CHUNK=CHUNK,
                num_warps=4,
            )
    return log_envelope


@soft_knn_lists.register_fake
def _(lengths, order, starts, width, *_):
    shape = len(starts) - 1, width
    return lengths.new_empty(shape), order.new_empty(shape)


@soft_knn_log_envelope.register_fake
def _(distances, *_):
    return torch.empty_like(distances)
