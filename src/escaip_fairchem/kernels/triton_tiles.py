"""Parts of the Triton kernels: tiles, cosines and Legendre polynomials, softmax.

One program works on the K = `SLOTS` slots of one atom (padded to a power of two) and one head.
`SEGMENTS` holds (first channel, channels, tile width) of each degree. The width is the next
power of two, at least 16 as a matrix product demands, and the tile's tail is zero: so no
channel crosses into another degree, and it is less work than a product of all D channels,
masked, for each degree.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def precision() -> str:
    """How kernels multiply float32, which is `PRECISION` in them."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def dot(a, b, LOW: tl.constexpr, PRECISION: tl.constexpr):
    """Product of tiles in the inputs' type, accumulated in float32 (float64 for float64)."""
    a, b = a.to(LOW), b.to(LOW)
    if INTERPRETED and LOW.is_bf16():
        # the interpreter would multiply the bit patterns
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def place(
    starts,
    counts,
    q_row,
    k_row,
    q_head,
    k_head,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """What the program works on, as offsets.

    Returns its head, the rows of its atom's edges [K], which slots hold one [K], and where
    those rows begin in q, in k and in contiguous arrays [E, 3, A, D].
    """
    # the heads of an atom are neighbours in the grid: they share the cache lines of its rows
    head = tl.program_id(0) % HEADS
    atom = tl.program_id(0) // HEADS
    slot = tl.arange(0, SLOTS)
    row = tl.load(starts + atom).to(tl.int64) + slot
    valid = slot < tl.load(counts + atom)
    at_q, at_k = row * q_row + head * q_head, row * k_row + head * k_head
    return head, row, valid, at_q, at_k, (row * (3 * HEADS) + head) * SIZE


@triton.jit
def load(pointer, at, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Channels of a segment of the rows that begin `at`, zero elsewhere, [K, width]."""
    column = tl.arange(0, BLOCK)
    mask = valid[:, None] & (column < WIDTH)[None, :]
    return tl.load(pointer + at[:, None] + (column + FIRST)[None, :], mask=mask, other=0.0)


@triton.jit
def store(pointer, at, tile, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse of `load`."""
    column = tl.arange(0, BLOCK)
    mask = valid[:, None] & (column < WIDTH)[None, :]
    tl.store(pointer + at[:, None] + (column + FIRST)[None, :], tile, mask=mask)


@triton.jit
def load_vectors(pointer, row, valid, ACC: tl.constexpr):
    """Components of 3-vectors, [K] each, zero in empty slots."""
    x = tl.load(pointer + row * 3, mask=valid, other=0.0).to(ACC)
    y = tl.load(pointer + row * 3 + 1, mask=valid, other=0.0).to(ACC)
    z = tl.load(pointer + row * 3 + 2, mask=valid, other=0.0).to(ACC)
    return x, y, z


@triton.jit
def outer(x1, y1, z1, x2, y2, z2):
    """Dot products of two sets of vectors, [K, K]; exact, as a matrix product may not be."""
    return x1[:, None] * x2[None, :] + y1[:, None] * y2[None, :] + z1[:, None] * z2[None, :]


@triton.jit
def both_ways(tile, x):
    """(tile + tile^T) x for a vector x, [K]."""
    return tl.sum(tile * x[None, :], 1) + tl.sum(tile * x[:, None], 0)


@triton.jit
def both_directed(x, y, z, ACC: tl.constexpr):
    """P_0 as the recurrence needs it: 0 where either edge has no direction, [K, K].

    Every later polynomial and derivative then vanishes there too (homogeneous form); the
    term of l = 0 itself takes no polynomial and keeps those edges.
    """
    directed = (x != 0) | (y != 0) | (z != 0)
    return (directed[:, None] & directed[None, :]).to(ACC)


@triton.jit
def legendre(l: tl.constexpr, c, p, p_before):
    """P_(l+1) from P_l and P_(l-1) (Bonnet's recurrence)."""
    return ((2 * l + 1) / (l + 1)) * c * p - (l / (l + 1)) * p_before


@triton.jit
def softmax(logits, valid):
    """Over the keys; zero for queries in empty slots."""
    exponential = tl.exp(logits - tl.max(logits, 1)[:, None])
    return tl.where(valid[:, None], exponential / tl.sum(exponential, 1)[:, None], 0.0)


@triton.jit
def attention_weights(
    q,
    k,
    at_q,
    at_k,
    row,
    valid,
    c,
    both,
    log_envelope,
    cosine_scale,
    SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SLOTS: tl.constexpr,
    COSINE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Softmax of the logits, [K, K]."""
    LOW: tl.constexpr = q.dtype.element_ty
    logits = tl.zeros([SLOTS, SLOTS], ACC)
    p, p_before = both, tl.zeros([SLOTS, SLOTS], ACC)
    for l in tl.static_range(len(SEGMENTS)):
        if SEGMENTS[l][1] > 0:
            q_l = load(q, at_q, valid, SEGMENTS[l][0], SEGMENTS[l][1], SEGMENTS[l][2])
            k_l = load(k, at_k, valid, SEGMENTS[l][0], SEGMENTS[l][1], SEGMENTS[l][2])
            m = dot(q_l, tl.trans(k_l), LOW, PRECISION)
            if l == 0:
                logits += m
            else:
                logits += p * m
        p, p_before = legendre(l, c, p, p_before), p
    logits = SCALE * logits
    if COSINE:
        logits += tl.load(cosine_scale).to(ACC) * c
    envelope = tl.load(log_envelope + row, mask=valid, other=-float("inf")).to(ACC)
    return softmax(logits + envelope[None, :], valid)
