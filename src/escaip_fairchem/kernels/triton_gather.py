"""Triton kernels: gather terms of an edge, add, GELU, RMS norm, and derivatives of that.

The pre-activation of edge e is z = distance[row] + source[sender] + target[receiver] (the
first term optional), a = gelu(z), and the output a, or y = r w a with r = (mean(a^2) + eps)^-1/2.
Nothing is kept: what a derivative needs is gathered and computed again.
The derivatives run one program per atom: its edges are adjacent (ascending receivers), so the
sums over them, for `target` and `weight`, end in one row each. `d_x` is the gradient of x.

Shapes: E edges, H = SIZE channels. Sums and activations are float32, or float64 for float64.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu(z):
    """GELU, its slope and its curvature."""
    cumulative = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
    return z * cumulative, cumulative + z * density, density * (2.0 - z * z)


@triton.jit
def load_rows(table, row, valid, column, inside, SIZE: tl.constexpr, ACC: tl.constexpr):
    """Rows of a table [..., SIZE], zero where not `valid` or not `inside`."""
    at = row.to(tl.int64)[:, None] * SIZE + column[None, :]
    return tl.load(table + at, mask=valid[:, None] & inside[None, :], other=0.0).to(ACC)


@triton.jit
def load_terms(
    distance,
    source,
    rows,
    senders,
    edge,
    valid,
    column,
    inside,
    SIZE: tl.constexpr,
    DISTANCE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Terms of edges that hang on more than their receiver, [edges, SIZE]."""
    sender = tl.load(senders + edge, mask=valid, other=0)
    total = load_rows(source, sender, valid, column, inside, SIZE, ACC)
    if DISTANCE:
        row = tl.load(rows + edge, mask=valid, other=0)
        total += load_rows(distance, row, valid, column, inside, SIZE, ACC)
    return total


@triton.jit
def inverse_norm(a, SIZE: tl.constexpr, EPS: tl.constexpr):
    """The factor r of each edge, [edges]."""
    return 1.0 / tl.sqrt(tl.sum(a * a, 1) / SIZE + EPS)


@triton.jit
def forward_kernel(
    distance,
    source,
    target,
    weight,
    rows,
    senders,
    receivers,
    out,
    count,
    SIZE: tl.constexpr,
    DISTANCE: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The output, [E, H]; a program works on EDGES edges."""
    ACC: tl.constexpr = tl.float64 if source.dtype.element_ty.is_fp64() else tl.float32
    edge = tl.program_id(0).to(tl.int64) * EDGES + tl.arange(0, EDGES)
    column = tl.arange(0, BLOCK)
    valid, inside = edge < count, column < SIZE
    z = load_terms(
        distance, source, rows, senders, edge, valid, column, inside, SIZE, DISTANCE, ACC
    )
    receiver = tl.load(receivers + edge, mask=valid, other=0)
    z += load_rows(target, receiver, valid, column, inside, SIZE, ACC)
    y, _, _ = gelu(z)
    if NORM:
        w = tl.load(weight + column, mask=inside, other=0.0).to(ACC)
        y = y * inverse_norm(y, SIZE, EPS)[:, None] * w[None, :]
    at = edge[:, None] * SIZE + column[None, :]
    mask = valid[:, None] & inside[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    distance,
    source,
    target,
    weight,
    rows,
    senders,
    starts,
    counts,
    grad,
    d_z,
    d_target,
    d_weight,
    SIZE: tl.constexpr,
    DISTANCE: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of z [E, H] and of `target` [N, H]; with NORM an atom's share of the weight's."""
    ACC: tl.constexpr = tl.float64 if source.dtype.element_ty.is_fp64() else tl.float32
    atom = tl.program_id(0).to(tl.int64)
    begin, count = tl.load(starts + atom), tl.load(counts + atom)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    own = tl.load(target + atom * SIZE + column, mask=inside, other=0.0).to(ACC)
    sum_z = tl.zeros([EDGES, BLOCK], ACC)
    if NORM:
        w = tl.load(weight + column, mask=inside, other=0.0).to(ACC)
        sum_w = tl.zeros([EDGES, BLOCK], ACC)
    for first in range(0, count, EDGES):
        slot = first + tl.arange(0, EDGES)
        edge, valid = begin + slot, slot < count
        z = load_terms(
            distance, source, rows, senders, edge, valid, column, inside, SIZE, DISTANCE, ACC
        )
        a, slope, _ = gelu(z + own[None, :])
        d_a = load_rows(grad, edge, valid, column, inside, SIZE, ACC)
        if NORM:
            r = inverse_norm(a, SIZE, EPS)
            sum_w += d_a * a * r[:, None]
            d_a *= w[None, :]
            m = tl.sum(d_a * a, 1) / SIZE
            d_a = r[:, None] * d_a - (r * r * r * m)[:, None] * a
        d = d_a * slope
        sum_z += d
        at = edge.to(tl.int64)[:, None] * SIZE + column[None, :]
        mask = valid[:, None] & inside[None, :]
        tl.store(d_z + at, d.to(d_z.dtype.element_ty), mask=mask)
    to = atom * SIZE + column
    tl.store(d_target + to, tl.sum(sum_z, 0).to(d_target.dtype.element_ty), mask=inside)
    if NORM:
        tl.store(d_weight + to, tl.sum(sum_w, 0), mask=inside)


@triton.jit
def double_backward_kernel(
    distance,
    source,
    target,
    weight,
    rows,
    senders,
    starts,
    counts,
    grad,
    c_distance,
    c_source,
    c_target,
    c_weight,
    d_grad,
    d_z,
    d_target,
    d_weight,
    SIZE: tl.constexpr,
    DISTANCE: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of <c, gradients>, c the cotangents of the gradients of tables and weight.

    With g = w grad, c gathered as the terms of z are, q = c gelu'(z), and means over channels
    A = <q g>, B = <q a>, m = <a g>: <c, d_z> = H (r A - r^3 m B).
    """
    ACC: tl.constexpr = tl.float64 if source.dtype.element_ty.is_fp64() else tl.float32
    atom = tl.program_id(0).to(tl.int64)
    begin, count = tl.load(starts + atom), tl.load(counts + atom)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    to = atom * SIZE + column
    own = tl.load(target + to, mask=inside, other=0.0).to(ACC)
    c_own = tl.load(c_target + to, mask=inside, other=0.0).to(ACC)
    sum_z = tl.zeros([EDGES, BLOCK], ACC)
    if NORM:
        w = tl.load(weight + column, mask=inside, other=0.0).to(ACC)
        c_w = tl.load(c_weight + column, mask=inside, other=0.0).to(ACC)
        sum_w = tl.zeros([EDGES, BLOCK], ACC)
    for first in range(0, count, EDGES):
        slot = first + tl.arange(0, EDGES)
        edge, valid = begin + slot, slot < count
        z = load_terms(
            distance, source, rows, senders, edge, valid, column, inside, SIZE, DISTANCE, ACC
        )
        c = load_terms(
            c_distance, c_source, rows, senders, edge, valid, column, inside, SIZE, DISTANCE, ACC
        )
        c += c_own[None, :]
        a, slope, curve = gelu(z + own[None, :])
        g = load_rows(grad, edge, valid, column, inside, SIZE, ACC)
        q = c * slope
        if NORM:
            r = inverse_norm(a, SIZE, EPS)
            r3 = r * r * r
            cross = c_w[None, :] * g
            n = tl.sum(cross * a, 1) / SIZE
            jq = r[:, None] * q - (r3 * (tl.sum(q * a, 1) / SIZE))[:, None] * a
            sum_w += g * jq
            to_grad = w[None, :] * jq + (c_w[None, :] * a) * r[:, None]
            g *= w[None, :]
            big_a, big_b = tl.sum(q * g, 1) / SIZE, tl.sum(q * a, 1) / SIZE
            m = tl.sum(a * g, 1) / SIZE
            along_a = 3 * r3 * r * r * m * big_b - r3 * (big_a + n)
            d_a = along_a[:, None] * a - (r3 * big_b)[:, None] * g - (r3 * m)[:, None] * q
            d_a += r[:, None] * cross
            g = r[:, None] * g - (r3 * m)[:, None] * a
            d = d_a * slope + c * g * curve
        else:
            to_grad = q
            d = c * g * curve
        sum_z += d
        at = edge.to(tl.int64)[:, None] * SIZE + column[None, :]
        mask = valid[:, None] & inside[None, :]
        tl.store(d_grad + at, to_grad.to(d_grad.dtype.element_ty), mask=mask)
        tl.store(d_z + at, d.to(d_z.dtype.element_ty), mask=mask)
    tl.store(d_target + to, tl.sum(sum_z, 0).to(d_target.dtype.element_ty), mask=inside)
    if NORM:
        tl.store(d_weight + to, tl.sum(sum_w, 0), mask=inside)


@triton.jit
def sum_rows(values, order, begin, end, column, inside, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Sum of the rows order[begin:end] of `values`, [columns]."""
    ACC: tl.constexpr = tl.float64 if values.dtype.element_ty.is_fp64() else tl.float32
    total = tl.zeros([ROWS, column.shape[0]], ACC)
    for first in range(begin, end, ROWS):
        place = first + tl.arange(0, ROWS)
        valid = place < end
        row = tl.load(order + place, mask=valid, other=0)
        total += load_rows(values, row, valid, column, inside, SIZE, ACC)
    return tl.sum(total, 0)


@triton.jit
def segment_sum_kernel(
    values,
    order,
    ends,
    out,
    SIZE: tl.constexpr,
    FEW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of rows of `values` [E, H] by segment, [S, H]; rows order[ends[s]:ends[s + 1]]."""
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    begin, end = tl.load(ends + segment), tl.load(ends + segment + 1)
    # most lengths belong to one or two edges, but one length to all self edges
    if end - begin <= FEW:
        total = sum_rows(values, order, begin, end, column, inside, SIZE, FEW)
    else:
        total = sum_rows(values, order, begin, end, column, inside, SIZE, ROWS)
    tl.store(out + segment * SIZE + column, total.to(out.dtype.element_ty), mask=inside)
