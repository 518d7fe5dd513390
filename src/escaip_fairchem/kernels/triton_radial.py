"""Linear maps of a Gaussian basis of sorted lengths, whose basis is never in memory, in Triton.

With phi_c(d) = exp(-(d - center_c)^2 / (2 sigma^2)) and phi^(n) its n-th derivative by d:
`expand` is sum_c phi_c^(n)(d_u) W_oc (+ bias), `contract` its product with rows g_uo, and `weigh`
is sum_u g_uo phi_c^(n)(d_u). Derivatives of each are made of the other two, so three kernels
serve every derivative. No sum is atomic: the same input gives the same bits.

A Gaussian is nothing a few widths away, so a tile of consecutive lengths reads a band of columns
and a tile of columns a run of lengths. Bands and runs are found on the device.
Products are exact float32 (or float64), whatever autocast or TF32 settings say: this is geometry.

Shapes: U lengths, C Gaussians, O outputs.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _OUTPUTS, _COLUMNS = 64, 64, 16  # tile of expand and contract
_RUN, _WIDE = 16, 32  # lengths at a time and columns of a tile of weigh

_BASIS = "Tensor lengths, Tensor centers, Tensor runs, float cutoff, float sigma, int order"


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


def runs_of(lengths: Tensor, centers: Tensor, reach: float) -> Tensor:
    """First and last (exclusive) of the sorted lengths that each tile of columns sees, [2, tiles].

    Args:
        lengths: Ascending, [U].
        centers: Of the Gaussians, ascending, [C].
        reach: Beyond it a Gaussian is nothing.
    """
    last = torch.arange(_WIDE - 1, len(centers) + _WIDE - 1, _WIDE, device=centers.device)
    ends = centers[::_WIDE] - reach, centers[last.clamp(max=len(centers) - 1)] + reach
    return torch.searchsorted(lengths, torch.stack(ends))


def reach_of(sigma: float, dtype: torch.dtype) -> float:
    """Distance from its centre at which a Gaussian is lost in rounding."""
    return sigma * math.sqrt(-2 * math.log(1e-2 * torch.finfo(dtype).eps))


@torch.library.custom_op(
    "escaip_fairchem::gaussian_expand",
    mutates_args=(),
    schema=f"(Tensor weight, Tensor? bias, {_BASIS}) -> Tensor",
)
def expand_op(weight, bias, lengths, centers, runs, cutoff, sigma, order):
    """`expand`, [U, O]."""
    out = lengths.new_empty(len(lengths), len(weight))
    _launch(weight, bias, None, lengths, centers, cutoff, sigma, order, out)
    return out


@torch.library.custom_op(
    "escaip_fairchem::gaussian_contract",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor weight, {_BASIS}) -> Tensor",
)
def contract_op(grad, weight, lengths, centers, runs, cutoff, sigma, order):
    """`contract`, [U]."""
    shares = lengths.new_empty(triton.cdiv(len(weight), _OUTPUTS), len(lengths))
    _launch(weight, None, grad, lengths, centers, cutoff, sigma, order, shares)
    return shares.sum(0)


@torch.library.custom_op(
    "escaip_fairchem::gaussian_weigh",
    mutates_args=(),
    schema=f"(Tensor grad, {_BASIS}) -> Tensor",
)
def weigh_op(grad, lengths, centers, runs, cutoff, sigma, order):
    """`weigh`, [O, C]."""
    count, outputs = grad.shape
    # pieces keep a GPU busy where most lengths fall into few runs
    pieces = min(max(count // 2048, 1), 16)
    shares = grad.new_empty(pieces, outputs, len(centers))
    grid = runs.shape[1], triton.cdiv(outputs, _OUTPUTS), pieces
    with torch.cuda.device_of(grad):
        weigh_kernel[grid](
            grad.contiguous(),
            lengths,
            centers,
            runs,
            shares,
            runs.shape[1],
            OUTPUTS=outputs,
            SIZE=len(centers),
            SIGMA=sigma,
            ORDER=order,
            PIECES=pieces,
            RUN=_RUN,
            WIDTH=_OUTPUTS,
            COLUMNS=_WIDE,
            num_warps=4,
        )
    return shares.sum(0)


def _launch(weight, bias, grad, lengths, centers, cutoff, sigma, order, out) -> None:
    if order > 2:
        raise NotImplementedError("the radial basis has no third derivative")
    outputs, count = len(weight), len(lengths)
    if not count:
        return
    with torch.cuda.device_of(lengths):
        expand_kernel[triton.cdiv(count, _ROWS), triton.cdiv(outputs, _OUTPUTS)](
            lengths,
            centers,
            weight.t().contiguous(),
            weight if bias is None else bias,
            lengths if grad is None else grad.contiguous(),
            out,
            count,
            OUTPUTS=outputs,
            SIZE=len(centers),
            CUTOFF=cutoff,
            SIGMA=sigma,
            REACH=reach_of(sigma, lengths.dtype),
            ORDER=order,
            BIAS=bias is not None,
            CONTRACT=grad is not None,
            ROWS=_ROWS,
            WIDTH=_OUTPUTS,
            COLUMNS=_COLUMNS,
            num_warps=4,
        )


@expand_op.register_fake
def _(weight, _bias, lengths, *_args):
    return lengths.new_empty(lengths.shape[0], weight.shape[0])


@contract_op.register_fake
def _(_grad, _weight, lengths, *_args):
    return lengths.new_empty(lengths.shape)


@weigh_op.register_fake
def _(grad, _lengths, centers, *_args):
    return grad.new_empty(grad.shape[1], centers.shape[0])


def _save(ctx, tensors, basis) -> None:
    lengths, centers, runs, *ctx.scales, ctx.order = basis
    ctx.save_for_backward(*tensors, lengths, centers, runs)


def _bases(ctx) -> tuple[tuple, tuple]:
    """The basis that an operator was given, and its derivative by the lengths."""
    tensors = *ctx.saved_tensors[-3:], *ctx.scales
    return (*tensors, ctx.order), (*tensors, ctx.order + 1)


_NO_BASIS = (None,) * 5  # gradients of what follows the lengths


def _differentiate_expand(ctx, grad):
    weight = ctx.saved_tensors[0]
    basis, slope = _bases(ctx)
    wanted = ctx.needs_input_grad
    return (
        weigh_op(grad, *basis) if wanted[0] else None,
        grad.sum(0) if wanted[1] else None,
        contract_op(grad, weight, *slope) if wanted[2] else None,
        *_NO_BASIS,
    )


def _differentiate_contract(ctx, v):
    grad, weight = ctx.saved_tensors[:2]
    basis, slope = _bases(ctx)
    wanted = ctx.needs_input_grad
    return (
        v[:, None] * expand_op(weight, None, *basis) if wanted[0] else None,
        weigh_op(v[:, None] * grad, *basis) if wanted[1] else None,
        v * contract_op(grad, weight, *slope) if wanted[2] else None,
        *_NO_BASIS,
    )


def _differentiate_weigh(ctx, v):
    grad = ctx.saved_tensors[0]
    basis, slope = _bases(ctx)
    return (
        expand_op(v, None, *basis) if ctx.needs_input_grad[0] else None,
        contract_op(grad, v, *slope) if ctx.needs_input_grad[1] else None,
        *_NO_BASIS,
    )


expand_op.register_autograd(
    _differentiate_expand,
    setup_context=lambda ctx, inputs, output: _save(ctx, inputs[:1], inputs[2:]),
)
contract_op.register_autograd(
    _differentiate_contract,
    setup_context=lambda ctx, inputs, output: _save(ctx, inputs[:2], inputs[2:]),
)
weigh_op.register_autograd(
    _differentiate_weigh,
    setup_context=lambda ctx, inputs, output: _save(ctx, inputs[:1], inputs[1:]),
)
