"""Triton kernels: linear maps of a Gaussian basis of sorted lengths that is never in memory.

With phi_c(d) = exp(-(d - center_c)^2 / (2 sigma^2)) and phi^(n) its n-th derivative by d:
`expand` is sum_c phi_c^(n)(d_u) W_oc (+ bias), `contract` its product with rows g_uo, and `weigh`
is sum_u g_uo phi_c^(n)(d_u). Derivatives of each are made of these three again (operators in
`triton_radial_ops`), so no derivative has a kernel of its own. No sum is atomic: the same input
gives the same bits.

A Gaussian is nothing a few widths away, so a tile of consecutive lengths reads a band of columns
and a tile of columns a run of lengths. Bands and runs are found on the device.
Products are exact float32 (or float64), whatever autocast or TF32 settings say: this is geometry.

Shapes: U lengths, C Gaussians, O outputs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gaussian(x, SIGMA: tl.constexpr, ORDER: tl.constexpr):
    """phi^(n) at distances x from its centre."""
    inverse: tl.constexpr = 1.0 / (SIGMA * SIGMA)
    value = tl.exp(x * x * (-0.5 * inverse))
    if ORDER == 1:
        value = -inverse * x * value
    if ORDER == 2:
        value = inverse * (inverse * x * x - 1.0) * value
    return value


@triton.jit
def expand_tile(
    d,
    low,
    high,
    centers,
    weight,
    output,
    inside,
    OUTPUTS: tl.constexpr,
    SIZE: tl.constexpr,
    CUTOFF: tl.constexpr,
    SIGMA: tl.constexpr,
    REACH: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum over the band of columns of lengths `d` from `low` to `high`, [ROWS, WIDTH]."""
    per_length: tl.constexpr = (SIZE - 1) / CUTOFF
    first = tl.floor((low - REACH) * per_length)
    end = tl.floor((high + REACH) * per_length) + 2
    first = tl.minimum(tl.maximum(first, 0), SIZE).to(tl.int32)
    end = tl.minimum(tl.maximum(end, 0), SIZE).to(tl.int32)
    total = tl.zeros([ROWS, WIDTH], d.dtype)
    for begin in range(first, end, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        center = tl.load(centers + column, mask=column < end, other=0.0)
        basis = gaussian(d[:, None] - center[None, :], SIGMA, ORDER)
        mask = (column < end)[:, None] & inside[None, :]
        w = tl.load(weight + column[:, None] * OUTPUTS + output[None, :], mask=mask, other=0.0)
        total += tl.dot(basis, w, input_precision="ieee")
    return total


@triton.jit
def expand_kernel(
    lengths,
    centers,
    weight,
    bias,
    grad,
    out,
    count,
    OUTPUTS: tl.constexpr,
    SIZE: tl.constexpr,
    CUTOFF: tl.constexpr,
    SIGMA: tl.constexpr,
    REACH: tl.constexpr,
    ORDER: tl.constexpr,
    BIAS: tl.constexpr,
    CONTRACT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`expand`, [U, O]; with CONTRACT each tile's share of `contract`, [tiles of O, U].

    `weight` is transposed, [C, O], so that a band can begin at any column.
    """
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    output = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    valid, inside = row < count, output < OUTPUTS
    total = expand_tile(
        tl.load(lengths + row, mask=valid, other=0.0),
        tl.load(lengths + first),
        tl.load(lengths + tl.minimum(first + ROWS, count) - 1),
        centers,
        weight,
        output,
        inside,
        OUTPUTS,
        SIZE,
        CUTOFF,
        SIGMA,
        REACH,
        ORDER,
        ROWS,
        WIDTH,
        COLUMNS,
    )
    at = row.to(tl.int64)[:, None] * OUTPUTS + output[None, :]
    mask = valid[:, None] & inside[None, :]
    if CONTRACT:
        share = tl.sum(total * tl.load(grad + at, mask=mask, other=0.0), 1)
        tl.store(out + tl.program_id(1).to(tl.int64) * count + row, share, mask=valid)
    else:
        if BIAS:
            total += tl.load(bias + output, mask=inside, other=0.0)[None, :]
        tl.store(out + at, total, mask=mask)


@triton.jit
def weigh_kernel(
    grad,
    lengths,
    centers,
    runs,
    out,
    tiles,
    OUTPUTS: tl.constexpr,
    SIZE: tl.constexpr,
    SIGMA: tl.constexpr,
    ORDER: tl.constexpr,
    PIECES: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One piece's share of `weigh`, [PIECES, O, C]: a part of the run of a tile of columns."""
    tile, piece = tl.program_id(0), tl.program_id(2)
    output = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside, known = output < OUTPUTS, column < SIZE
    center = tl.load(centers + column, mask=known, other=0.0)
    begin, end = tl.load(runs + tile), tl.load(runs + tiles + tile)
    length = (end - begin + PIECES - 1) // PIECES
    begin += piece * length
    end = tl.minimum(end, begin + length)
    total = tl.zeros([WIDTH, COLUMNS], lengths.dtype.element_ty)
    for first in range(begin, end, RUN):
        row = first + tl.arange(0, RUN).to(tl.int64)
        valid = row < end
        d = tl.load(lengths + row, mask=valid, other=0.0)
        basis = gaussian(d[:, None] - center[None, :], SIGMA, ORDER)
        mask = valid[:, None] & inside[None, :]
        g = tl.load(grad + row[:, None] * OUTPUTS + output[None, :], mask=mask, other=0.0)
        total += tl.dot(tl.trans(g), basis, input_precision="ieee")
    at = (piece * OUTPUTS + output)[:, None] * SIZE + column[None, :]
    tl.store(out + at, total, mask=inside[:, None] & known[None, :])
