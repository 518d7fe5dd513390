"""Triton kernel of the neighbourhood attention's second derivative.

Names as in `triton_kernels`; `g_x` is the cotangent that reached the gradient of x.
The largest kernel in registers: compiled for compute capability 9.0 (D = 64, five degrees,
bfloat16) it spills a little at 32 slots and much at 64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from escaip_fairchem.kernels.triton_tiles import (
    both_directed,
    both_ways,
    dot,
    legendre,
    load,
    load_vectors,
    outer,
    place,
    softmax,
    store,
)


@triton.jit
def double_backward_kernel(
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
    g_qkv,
    g_directions,
    g_log_envelope,
    g_cosine,
    d_grad_out,
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
    """Gradients of <g, backward's outputs> with respect to the backward's inputs.

    That sum is <grad_out, O_dot>, O_dot the tangent of O along g: along g_qkv [E, 3, A, D],
    with GEOMETRY also g_directions [E, 3] and g_log_envelope [E], with COSINE also g_cosine.
    Outputs as in `backward_kernel`, and d_grad_out [E, A, D].
    """
    LOW: tl.constexpr = q.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if LOW.is_fp64() else tl.float32
    PART: tl.constexpr = HEADS * SIZE
    head, row, valid, at_q, at_k, at = place(
        starts, counts, q_row, k_row, q_head, k_head, HEADS, SIZE, SLOTS
    )
    zero = tl.zeros([SLOTS, SLOTS], ACC)
    x, y, z = load_vectors(directions, row, valid, ACC)
    c = outer(x, y, z, x, y, z)
    both = both_directed(x, y, z, ACC)
    if GEOMETRY:
        g_x, g_y, g_z = load_vectors(g_directions, row, valid, ACC)
        c_dot = outer(g_x, g_y, g_z, x, y, z) + outer(x, y, z, g_x, g_y, g_z)

    logits, logits_dot = zero, zero
    p, p_before = both, zero
    slope, slope_before = zero, zero
    for l in tl.static_range(len(SEGMENTS)):
        if SEGMENTS[l][1] > 0:
            q_l = load(q, at_q, valid, SEGMENTS[l][0], SEGMENTS[l][1], SEGMENTS[l][2])
            k_l = load(k, at_k, valid, SEGMENTS[l][0], SEGMENTS[l][1], SEGMENTS[l][2])
            gq_l = load(g_qkv, at, valid, SEGMENTS[l][0], SEGMENTS[l][1], SEGMENTS[l][2])
            gk_l = load(g_qkv, at + PART, valid, SEGMENTS[l][0], SEGMENTS[l][1], SEGMENTS[l][2])
            m = dot(q_l, tl.trans(k_l), LOW, PRECISION)
            m_dot = dot(gq_l, tl.trans(k_l), LOW, PRECISION)
            m_dot += dot(q_l, tl.trans(gk_l), LOW, PRECISION)
            if l == 0:
                logits += m
                logits_dot += m_dot
            else:
                logits += p * m
                logits_dot += p * m_dot
                if GEOMETRY:
                    logits_dot += slope * c_dot * m
        slope, slope_before = slope_before + (2 * l + 1) * p, slope
        p, p_before = legendre(l, c, p, p_before), p
    logits, logits_dot = SCALE * logits, SCALE * logits_dot
    if COSINE:
        w, w_dot = tl.load(cosine_scale).to(ACC), tl.load(g_cosine).to(ACC)
        logits += w * c
        logits_dot += w_dot * c
    if GEOMETRY:
        if COSINE:
            logits_dot += w * c_dot
        envelope_dot = tl.load(g_log_envelope + row, mask=valid, other=0.0).to(ACC)
        logits_dot += envelope_dot[None, :]
    envelope = tl.load(log_envelope + row, mask=valid, other=-float("inf")).to(ACC)
    weights = softmax(logits + envelope[None, :], valid)

    # O_dot = A_dot v + A v_dot is the gradient of grad_out, A_dot^T grad_out that of v
    mean_dot = tl.sum(weights * logits_dot, 1)[:, None]
    weights_dot = weights * (logits_dot - mean_dot)
    v_all = load(v, row * v_row + head * v_head, valid, 0, SIZE, SIZE_BLOCK)
    gv_all = load(g_qkv, at + 2 * PART, valid, 0, SIZE, SIZE_BLOCK)
    g_all = load(grad_out, row * grad_row + head * grad_head, valid, 0, SIZE, SIZE_BLOCK)
    out_dot = dot(weights_dot, v_all, LOW, PRECISION) + dot(weights, gv_all, LOW, PRECISION)
    store(d_grad_out, (row * HEADS + head) * SIZE, out_dot.to(LOW), valid, 0, SIZE, SIZE_BLOCK)
    d_v = dot(tl.trans(weights_dot), g_all, LOW, PRECISION)
    store(d_qkv, at + 2 * PART, d_v.to(LOW), valid, 0, SIZE, SIZE_BLOCK)

    # what reaches S_dot (the gradient of S in the first backward), and S through A
    d_weights = dot(g_all, tl.trans(v_all), LOW, PRECISION)
    centred = d_weights - tl.sum(weights * d_weights, 1)[:, None]
    d_logits_dot = weights * centred
    d_logits = logits_dot * centred - d_weights * mean_dot
    d_logits += dot(g_all, tl.trans(gv_all), LOW, PRECISION)
    d_logits = weights * (d_logits - tl.sum(weights * d_logits, 1)[:, None])

    # geometry and addresses anew: the compiler would keep in registers, until here, every
    # polynomial that it has had before
    head, row, valid, at_q, at_k, at = place(
        starts, counts, q_row, k_row, q_head, k_head, HEADS, SIZE, SLOTS
    )
    x, y, z = load_vectors(directions, row, valid, ACC)
    c = outer(x, y, z, x, y, z)
    if GEOMETRY:
        g_x, g_y, g_z = load_vectors(g_directions, row, valid, ACC)
        c_dot = outer(g_x, g_y, g_z, x, y, z) + outer(x, y, z, g_x, g_y, g_z)
    p, p_before = both_directed(x, y, z, ACC), zero
    slope, slope_before = zero, zero
    for l in tl.static_range(len(SEGMENTS)):
        if SEGMENTS[l][1] > 0:
            q_l = load(q, at_q, valid, SEGMENTS[l][0], SEGMENTS[l][1], SEGMENTS[l][2])
            k_l = load(k, at_k, valid, SEGMENTS[l][0], SEGMENTS[l][1], SEGMENTS[l][2])
            gq_l = load(g_qkv, at, valid, SEGMENTS[l][0], SEGMENTS[l][1], SEGMENTS[l][2])
            gk_l = load(g_qkv, at + PART, valid, SEGMENTS[l][0], SEGMENTS[l][1], SEGMENTS[l][2])
            d_m, d_m_dot = SCALE * d_logits, SCALE * d_logits_dot
            if l > 0:
                d_m *= p
                if GEOMETRY:
                    d_m += d_m_dot * slope * c_dot
                d_m_dot *= p
            d_q = dot(d_m, k_l, LOW, PRECISION) + dot(d_m_dot, gk_l, LOW, PRECISION)
            store(d_qkv, at, d_q.to(LOW), valid, SEGMENTS[l][0], SEGMENTS[l][1], SEGMENTS[l][2])
            d_k = dot(tl.trans(d_m), q_l, LOW, PRECISION)
            d_k += dot(tl.trans(d_m_dot), gq_l, LOW, PRECISION)
            store(
                d_qkv, at + PART, d_k.to(LOW), valid, SEGMENTS[l][0], SEGMENTS[l][1], SEGMENTS[l][2]
            )
        slope, slope_before = slope_before + (2 * l + 1) * p, slope
        p, p_before = legendre(l, c, p, p_before), p

    if COSINE:
        d_w = d_logits * c
        if GEOMETRY:
            d_w += d_logits_dot * c_dot
        tl.store(d_cosine + tl.program_id(0), tl.sum(tl.sum(d_w, 1), 0))
    if GEOMETRY:
        head, row, valid, at_q, at_k, at = place(
            starts, counts, q_row, k_row, q_head, k_head, HEADS, SIZE, SLOTS
        )
        x, y, z = load_vectors(directions, row, valid, ACC)
        c = outer(x, y, z, x, y, z)
        g_x, g_y, g_z = load_vectors(g_directions, row, valid, ACC)
        c_dot = outer(g_x, g_y, g_z, x, y, z) + outer(x, y, z, g_x, g_y, g_z)
        p, p_before = both_directed(x, y, z, ACC), zero
        slope, slope_before = zero, zero
        curve, curve_before = zero, zero
        d_c, d_c_dot = zero, zero
        for l in tl.static_range(len(SEGMENTS)):
            if l > 0 and SEGMENTS[l][1] > 0:
                q_l = load(q, at_q, valid, SEGMENTS[l][0], SEGMENTS[l][1], SEGMENTS[l][2])
                k_l = load(k, at_k, valid, SEGMENTS[l][0], SEGMENTS[l][1], SEGMENTS[l][2])
                gq_l = load(g_qkv, at, valid, SEGMENTS[l][0], SEGMENTS[l][1], SEGMENTS[l][2])
                gk_l = load(g_qkv, at + PART, valid, SEGMENTS[l][0], SEGMENTS[l][1], SEGMENTS[l][2])
                m = dot(q_l, tl.trans(k_l), LOW, PRECISION)
                m_dot = dot(gq_l, tl.trans(k_l), LOW, PRECISION)
                m_dot += dot(q_l, tl.trans(gk_l), LOW, PRECISION)
                d_c += slope * (d_logits * m + d_logits_dot * m_dot)
                d_c += curve * c_dot * d_logits_dot * m
                d_c_dot += slope * m
            curve, curve_before = curve_before + (2 * l + 1) * slope, curve
            slope, slope_before = slope_before + (2 * l + 1) * p, slope
            p, p_before = legendre(l, c, p, p_before), p
        d_c, d_c_dot = SCALE * d_c, SCALE * d_c_dot
        if COSINE:
            d_c += d_logits * w + d_logits_dot * w_dot
            d_c_dot += w
        d_c_dot *= d_logits_dot
        to = d_geometry + (row * HEADS + head) * 4
        tl.store(to, both_ways(d_c, x) + both_ways(d_c_dot, g_x), mask=valid)
        tl.store(to + 1, both_ways(d_c, y) + both_ways(d_c_dot, g_y), mask=valid)
        tl.store(to + 2, both_ways(d_c, z) + both_ways(d_c_dot, g_z), mask=valid)
        tl.store(to + 3, tl.sum(d_logits, 0), mask=valid)
