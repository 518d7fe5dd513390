"""Triton kernels of the neighbourhood attention: forward and backward.

One program per (atom, head). Neither cosines nor weights leave it: what a pass needs of another
it computes again. Letters: M_l = q_l k_l^T, P_l a Legendre polynomial of the cosines c with
derivative `slope` and second derivative `curve`, S = scale sum_l P_l M_l + w c + b the logits
(w the cosine scale, b the log-envelope of the keys), A = softmax(S), O = A v. `d_x` is the
gradient of x, `x_dot` a tangent.

Shapes: E edges, A heads, D channels per head. `q_row` and `q_head` are strides of q, channels
are adjacent; the arrays that the kernels write, and the cotangents, are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from escaip_fairchem.kernels.triton_tiles import (
    attention_weights,
    both_directed,
    both_ways,
    dot,
    legendre,
    load,
    load_vectors,
    outer,
    place,
    store,
)


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    q_row,
    k_row,
    v_row,
    q_head,
    k_head,
    v_head,
    directions,
    log_envelope,
    cosine_scale,
    starts,
    counts,
    out,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SLOTS: tl.constexpr,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """O, [E, A, D]."""
    LOW: tl.constexpr = q.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if LOW.is_fp64() else tl.float32
    head, row, valid, at_q, at_k, _ = place(
        starts, counts, q_row, k_row, q_head, k_head, HEADS, SIZE, SLOTS
    )
    x, y, z = load_vectors(directions, row, valid, ACC)
    weights = attention_weights(
        q,
        k,
        at_q,
        at_k,
        row,
        valid,
        outer(x, y, z, x, y, z),
        both_directed(x, y, z, ACC),
        log_envelope,
        cosine_scale,
        SCALE,
        SEGMENTS,
        SLOTS,
        COSINE,
        ACC,
        PRECISION,
    )
    v_all = load(v, row * v_row + head * v_head, valid, 0, SIZE, SIZE_BLOCK)
    result = dot(weights, v_all, LOW, PRECISION)
    store(out, (row * HEADS + head) * SIZE, result.to(LOW), valid, 0, SIZE, SIZE_BLOCK)


@triton.jit
def backward_kernel(
    q,
    k,
    v,
    grad_out,
    q_row,
    k_row,
    v_row,
    grad_row,
    q_head,
    k_head,
    v_head,
    grad_head,
    directions,
    log_envelope,
    cosine_scale,
    starts,
    counts,
    d_qkv,
    d_geometry,
    d_cosine,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SLOTS: tl.constexpr,
    COSINE: tl.constexpr,
    GEOMETRY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of q, k and v, [E, 3, A, D].

    With GEOMETRY also this head's share of those of directions and log-envelope,
    [E, A, 4]; with COSINE its share of that of the cosine scale, [N, A].
    """
    LOW: tl.constexpr = q.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if LOW.is_fp64() else tl.float32
    PART: tl.constexpr = HEADS * SIZE
    head, row, valid, at_q, at_k, at = place(
        starts, counts, q_row, k_row, q_head, k_head, HEADS, SIZE, SLOTS
    )
    x, y, z = load_vectors(directions, row, valid, ACC)
    c = outer(x, y, z, x, y, z)
    p = both_directed(x, y, z, ACC)
    weights = attention_weights(
        q,
        k,
        at_q,
        at_k,
        row,
        valid,
        c,
        p,
        log_envelope,
        cosine_scale,
        SCALE,
        SEGMENTS,
        SLOTS,
        COSINE,
        ACC,
        PRECISION,
    )
    v_all = load(v, row * v_row + head * v_head, valid, 0, SIZE, SIZE_BLOCK)
    g_all = load(grad_out, row * grad_row + head * grad_head, valid, 0, SIZE, SIZE_BLOCK)
    d_weights = dot(g_all, tl.trans(v_all), LOW, PRECISION)
    d_logits = weights * (d_weights - tl.sum(weights * d_weights, 1)[:, None])
    d_v = dot(tl.trans(weights), g_all, LOW, PRECISION)
    store(d_qkv, at + 2 * PART, d_v.to(LOW), valid, 0, SIZE, SIZE_BLOCK)

    # geometry and addresses anew: the compiler would keep in registers, until here, every
    # polynomial that it has had before
    head, row, valid, at_q, at_k, at = place(
        starts, counts, q_row, k_row, q_head, k_head, HEADS, SIZE, SLOTS
    )
    x, y, z = load_vectors(directions, row, valid, ACC)
    c = outer(x, y, z, x, y, z)
    p, p_before = both_directed(x, y, z, ACC), tl.zeros([SLOTS, SLOTS], ACC)
    slope, slope_before = p_before, p_before
    d_c = p_before
    for l in tl.static_range(len(SEGMENTS)):
        if SEGMENTS[l][1] > 0:
            q_l = load(q, at_q, valid, SEGMENTS[l][0], SEGMENTS[l][1], SEGMENTS[l][2])
            k_l = load(k, at_k, valid, SEGMENTS[l][0], SEGMENTS[l][1], SEGMENTS[l][2])
            d_m = SCALE * d_logits
            if l > 0:
                d_m *= p
            d_q = dot(d_m, k_l, LOW, PRECISION)
            store(d_qkv, at, d_q.to(LOW), valid, SEGMENTS[l][0], SEGMENTS[l][1], SEGMENTS[l][2])
            d_k = dot(tl.trans(d_m), q_l, LOW, PRECISION)
            store(
                d_qkv, at + PART, d_k.to(LOW), valid, SEGMENTS[l][0], SEGMENTS[l][1], SEGMENTS[l][2]
            )
            if GEOMETRY and l > 0:
                d_c += slope * dot(q_l, tl.trans(k_l), LOW, PRECISION)
        slope, slope_before = slope_before + (2 * l + 1) * p, slope
        p, p_before = legendre(l, c, p, p_before), p

    if COSINE:
        tl.store(d_cosine + tl.program_id(0), tl.sum(tl.sum(d_logits * c, 1), 0))
    if GEOMETRY:
        d_c = SCALE * d_c
        if COSINE:
            d_c += tl.load(cosine_scale).to(ACC)
        d_c *= d_logits
        to = d_geometry + (row * HEADS + head) * 4
        tl.store(to, both_ways(d_c, x), mask=valid)
        tl.store(to + 1, both_ways(d_c, y), mask=valid)
        tl.store(to + 2, both_ways(d_c, z), mask=valid)
        tl.store(to + 3, tl.sum(d_logits, 0), mask=valid)
