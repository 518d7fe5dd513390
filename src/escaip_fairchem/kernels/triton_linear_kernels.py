"""Triton kernels of linear maps whose input is activated and normed in registers.

y = scale f(x) W^T + b + residual: f GELU or nothing, scale = 1 / rms(f(x)) where the input is
normed (the norm's weights are in W), else 1. Shapes: M rows, K inputs, N outputs. Columns are
adjacent, `x_row` and so on are strides of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from escaip_fairchem.kernels.triton_tiles import INTERPRETED


@triton.jit
def cast(x, TYPE: tl.constexpr):
    """float32 to `TYPE`, rounded to the nearest; the interpreter would cut bfloat16 off."""
    if INTERPRETED and TYPE.is_bf16():
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def normal_cdf(x):
    """Cumulative normal distribution, Phi(x) = (1 + erf(x / sqrt(2))) / 2.

    A third of the instructions of erf. Its logarithm is nearly a parabola, so that Phi(-|x|) is
    2 to the power of a polynomial (fitted to x Phi(x) for |x| < 6, error 4e-7, there and beyond).
    """
    z = tl.abs(x)
    q = 2.61612617e-05 - 1.61954781e-06 * z
    q = -1.30233468e-04 + q * z
    q = -2.54717332e-04 + q * z
    q = 7.19391784e-03 + q * z
    q = -5.25700452e-02 + q * z
    q = -4.59189319e-01 + q * z
    q = -1.15110675 + q * z
    tail = tl.exp2(q * z - 1.0)
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def _finish(
    acc,
    row,
    first,
    bias,
    residual,
    residual_row,
    out,
    M,
    N,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Add bias and residual and store, columns from `first` on."""
    column = first + tl.arange(0, acc.shape[1])
    inside = (row < M)[:, None] & (column < N)[None, :]
    if BIAS:
        acc += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        at = residual + row[:, None] * residual_row + column[None, :]
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = out + row[:, None] * N + column[None, :]
    tl.store(at, cast(acc, out.dtype.element_ty), mask=inside)


@triton.jit
def norm_linear_kernel(
    x,
    x_row,
    weight,
    bias,
    residual,
    residual_row,
    out,
    rstd,
    M,
    N,
    EPS: tl.constexpr,
    K: tl.constexpr,
    GELU: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y, [M, N], and with NORM scale, [M]."""
    LOW: tl.constexpr = weight.dtype.element_ty
    # programs that run together share rows of x and of W in the L2 cache
    row_blocks, column_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * column_blocks)
    rank = tl.program_id(0) % (GROUP * column_blocks)
    height = tl.minimum(row_blocks - group * GROUP, GROUP)
    row = (group * GROUP + rank % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = rank // height * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows and columns beyond the end repeat the last one and are not stored
    read_row = tl.minimum(row, M - 1).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    x_at = x + read_row[:, None] * x_row + inner[None, :]
    w_at = weight + (tl.minimum(column, N - 1) * K)[None, :] + inner[:, None]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            tile, w = tl.load(x_at), tl.load(w_at)
        else:
            inside = inner < K - first
            tile = tl.load(x_at, mask=inside[None, :], other=0.0)
            w = tl.load(w_at, mask=inside[:, None], other=0.0)
        tile = tile.to(tl.float32)
        if GELU:
            tile = tile * normal_cdf(tile)
        if NORM:
            square += tl.sum(tile * tile, 1)
        tile = cast(tile, LOW)
        if GELU and NORM and not INTERPRETED:
            # a barrier: the compiler would do GELU twice, as the sums and as the product want it
            PACK: tl.constexpr = 32 // LOW.primitive_bitwidth
            tile = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [tile], dtype=tile.dtype, is_pure=False, pack=PACK
            )
        if INTERPRETED and LOW.is_bf16():
            # the interpreter would multiply the bit patterns
            tile, w = tile.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(tile, w, acc, input_precision=PRECISION)
        x_at += BLOCK_K
        w_at += BLOCK_K
    if NORM:
        scale = tl.rsqrt(square / K + EPS)
        acc *= scale[:, None]
        if rank // height == 0:
            tl.store(rstd + row, scale, mask=row < M)

    begin = rank // height * BLOCK_N
    row = row.to(tl.int64)
    if RESIDUAL and BLOCK_N >= 256:
        # half by half: both at once overflow the registers
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, BLOCK_M, 2, HALF), 0, 2, 1))
        _finish(left, row, begin, bias, residual, residual_row, out, M, N, BIAS, RESIDUAL)
        _finish(right, row, begin + HALF, bias, residual, residual_row, out, M, N, BIAS, RESIDUAL)
    else:
        _finish(acc, row, begin, bias, residual, residual_row, out, M, N, BIAS, RESIDUAL)


@triton.jit
def norm_linear_backward_kernel(
    u,
    x,
    rstd,
    d_x,
    z,
    u_row,
    x_row,
    M,
    K: tl.constexpr,
    GELU: tl.constexpr,
    NORM: tl.constexpr,
    Z: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Elementwise part of the gradient, with its row sums.

    From u = (dL/dy) W, [M, K], dL/dx; with Z also what W was multiplied by, z = scale f(x).
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < M)[:, None] & (column < K)[None, :]
    value = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0)
    value = value.to(tl.float32)
    if GELU:
        cdf = normal_cdf(value)
        slope = cdf + value * tl.exp(-0.5 * value * value) * 0.3989422804014327
        value *= cdf
    if NORM:
        scale = tl.load(rstd + row, mask=row < M, other=0.0)[:, None]
        value *= scale
    if Z:
        at = z + row[:, None] * K + column[None, :]
        tl.store(at, cast(value, z.dtype.element_ty), mask=inside)
    d = tl.load(u + row[:, None] * u_row + column[None, :], mask=inside, other=0.0)
    d = d.to(tl.float32)
    if NORM:
        mean = tl.sum(d * value, 1) / K
        d = scale * (d - value * mean[:, None])
    if GELU:
        d *= slope
    at = d_x + row[:, None] * K + column[None, :]
    tl.store(at, cast(d, d_x.dtype.element_ty), mask=inside)
