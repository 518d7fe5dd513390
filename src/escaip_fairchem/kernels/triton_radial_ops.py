"""PyTorch operators of linear maps of a Gaussian basis, for autograd and torch.compile.

`expand`, `contract` and `weigh` of `triton_radial`; each one's derivative is made of the others,
up to the second by the lengths.
Shapes: U lengths, C Gaussians, O outputs.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from escaip_fairchem.kernels.again import asked_for
from escaip_fairchem.kernels.triton_radial import expand_kernel, weigh_kernel

_ROWS, _OUTPUTS, _COLUMNS = 64, 64, 16  # tile of expand and contract
_RUN, _WIDE = 16, 32  # lengths at a time and columns of a tile of weigh

_BASIS = "Tensor lengths, Tensor centers, Tensor runs, float cutoff, float sigma, int order"


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


def _saved(ctx) -> tuple[list[Tensor], tuple, tuple]:
    """What `_save` kept: tensors, the basis, and its derivative by the lengths.

    Once for each backward pass: torch's checkpointing gives saved tensors a single time.
    """
    *tensors, lengths, centers, runs = ctx.saved_tensors
    basis = lengths, centers, runs, *ctx.scales
    return tensors, (*basis, ctx.order), (*basis, ctx.order + 1)


_NO_BASIS = (None,) * 5  # gradients of what follows the lengths


def _differentiate_expand(ctx, grad):
    (weight,), basis, slope = _saved(ctx)
    wanted = ctx.needs_input_grad
    return (
        weigh_op(grad, *basis) if asked_for(ctx, 0) else None,
        grad.sum(0) if wanted[1] and asked_for(ctx, 1) else None,
        contract_op(grad, weight, *slope) if wanted[2] else None,
        *_NO_BASIS,
    )


def _differentiate_contract(ctx, v):
    (grad, weight), basis, slope = _saved(ctx)
    wanted = ctx.needs_input_grad
    return (
        v[:, None] * expand_op(weight, None, *basis) if wanted[0] else None,
        weigh_op(v[:, None] * grad, *basis) if asked_for(ctx, 1) else None,
        v * contract_op(grad, weight, *slope) if wanted[2] else None,
        *_NO_BASIS,
    )


def _differentiate_weigh(ctx, v):
    (grad,), basis, slope = _saved(ctx)
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
