"""Linear maps and norms that keep little for the backward pass. Imports torch only.

Every function here is differentiable twice: its backward pass consists of differentiable
operations, recorded when forces are trained through their derivatives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from escaip_fairchem.kernels.again import asked_for, recomputed
from escaip_fairchem.kernels.dense import linear, product

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def recomputed_linear(
    prologue: Callable[..., Tensor | tuple[Tensor, ...]],
    weight: Tensor,
    bias: Tensor | None,
    *inputs: Tensor,
) -> Tensor:
    """A linear map of the concatenation of ``prologue(*inputs)``.

    Autograd would keep what the prologue computes: activations, norms, gathered rows. Here
    the backward pass computes it again from the inputs, and the concatenation is never formed.

    Args:
        prologue: Cheap function of `inputs`, deterministic, to one part or several, [..., size_i].
            Everything that needs a gradient must come in by `inputs`.
        weight: [out, sum of size_i].
        bias: [out] or None.
        *inputs: Tensors.

    Returns:
        [..., out]; under autocast in its precision, with the prologue in that of its inputs.
    """
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return _RecomputedLinear.apply(prologue, weight, bias, *inputs)


class _RecomputedLinear(Function):
    @staticmethod
    def forward(ctx, prologue, weight, bias, *inputs):
        ctx.prologue, ctx.has_bias = prologue, bias is not None
        ctx.save_for_backward(weight, *inputs)
        with torch.autocast(weight.device.type, enabled=False):
            parts = _parts(prologue, inputs, weight)
            weights = _weights_of(parts, weight)
            out = linear(parts[0], weights[0], bias)
            for part, w in zip(parts[1:], weights[1:], strict=True):
                out.add_(linear(part, w))
        return out

    @staticmethod
    def backward(ctx, grad):
        weight, *inputs = ctx.saved_tensors
        again = torch.is_grad_enabled()  # a second derivative will be asked for
        before = 1 + ctx.has_bias
        needed = [asked_for(ctx, before + i, 2 - ctx.has_bias) for i in range(len(inputs))]
        if not again:
            inputs = [
                x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)
            ]
        with torch.enable_grad():
            parts = _parts(ctx.prologue, inputs, weight)
        rows = grad.flatten(0, -2)
        grad_weight = grad_bias = None
        if asked_for(ctx, 0, 1):
            flat = [part.flatten(0, -2) for part in parts]
            shares = [product(rows.t(), part if again else part.detach()) for part in flat]
            grad_weight = torch.cat(shares, dim=1) if len(shares) > 1 else shares[0]
        if ctx.has_bias and asked_for(ctx, 1, 1):
            grad_bias = rows.sum(0)
        grad_inputs: list[Tensor | None] = [None] * len(inputs)
        wanted = [index for index, need in enumerate(needed) if need]
        if wanted:
            weights = _weights_of(parts, weight)
            shares = [(p, w) for p, w in zip(parts, weights, strict=True) if p.requires_grad]
            found = torch.autograd.grad(
                [part for part, _ in shares],
                [inputs[index] for index in wanted],
                [linear(grad, w.t()) for _, w in shares],
                create_graph=again,
            )
            for index, value in zip(wanted, found, strict=True):
                grad_inputs[index] = value
        return None, grad_weight, grad_bias, *grad_inputs


def _parts(prologue, inputs: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
    parts = prologue(*inputs)
    parts = parts if isinstance(parts, tuple) else (parts,)
    return tuple(part.to(weight.dtype) for part in parts)


def _weights_of(parts: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
    """Columns of `weight` that belong to each part."""
    return weight.split([part.shape[-1] for part in parts], dim=1)


def banded_linear(
    blocks: Sequence[Tensor],
    starts: Sequence[int],
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """A linear map of rows that are zero outside of a band of columns.

    Args:
        blocks: Non-zero columns of consecutive groups of rows, [rows_b, columns_b] each.
        starts: First column of each block.
        weight: [out, columns].
        bias: [out].

    Returns:
        [all rows, out].
    """
    if torch.compiler.is_compiling():
        (block,) = blocks
        with torch.autocast(block.device.type, enabled=False):
            return F.linear(block, weight, bias)
    return _BandedLinear.apply(tuple(starts), weight, bias, *blocks)


class _BandedLinear(Function):
    @staticmethod
    def forward(ctx, starts, weight, bias, *blocks):
        ctx.starts = starts
        ctx.save_for_backward(weight, *blocks)
        out = blocks[0].new_empty(sum(len(b) for b in blocks), len(weight))
        rows = out.split([len(b) for b in blocks])
        for block, start, row in zip(blocks, starts, rows, strict=True):
            row.copy_(linear(block, weight[:, start : start + block.shape[1]], bias))
        return out

    @staticmethod
    def backward(ctx, grad):
        weight, *blocks = ctx.saved_tensors
        grads = grad.split([len(b) for b in blocks])
        spans = [(s, s + b.shape[1]) for s, b in zip(ctx.starts, blocks, strict=True)]
        grad_weight, grad_blocks = None, [None] * len(blocks)
        if asked_for(ctx, 0, 1):
            if torch.is_grad_enabled():
                grad_weight = sum(
                    F.pad(product(g.t(), b), (low, weight.shape[1] - high))
                    for g, b, (low, high) in zip(grads, blocks, spans, strict=True)
                )
            else:
                grad_weight = torch.zeros_like(weight)
                for g, b, (low, high) in zip(grads, blocks, spans, strict=True):
                    grad_weight[:, low:high] += product(g.t(), b)
        if any(asked_for(ctx, 2 + index, 1) for index in range(len(blocks))):
            grad_blocks = [
                product(g, weight[:, low:high]) for g, (low, high) in zip(grads, spans, strict=True)
            ]
        grad_bias = grad.sum(0) if asked_for(ctx, 1, 1) else None
        return None, grad_weight, grad_bias, *grad_blocks


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Root-mean-square norm: x / sqrt(mean(x^2) + eps) * weight, eps as in torch.nn.RMSNorm.

    torch's own takes five passes over memory on a CPU and keeps three copies for the
    backward pass; this one keeps `x` and one number per row. Half precisions are summed in
    float32.
    """
    if torch.compiler.is_compiling():  # which fuses it, and decides itself what is kept
        wide = x.to(weight.dtype)
        mean = wide.square().mean(-1, keepdim=True)
        return (wide * torch.rsqrt(mean + torch.finfo(wide.dtype).eps) * weight).to(x.dtype)
    return _RMSNorm.apply(x, weight)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx, x, weight):
        inverse = _inverse(x, weight)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        of_weight = asked_for(ctx, 1)
        if torch.is_grad_enabled():

            def gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
                return _norm_gradients(grad, x, weight, _inverse(x, weight), of_weight)

            found = recomputed(gradients, grad, x, weight)
        else:
            found = _norm_gradients(grad, x, weight, inverse, of_weight)
        return found if of_weight else (*found, None)


def _norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, of_weight: bool
) -> tuple[Tensor, ...]:
    """Of x and, if asked for, the weight; differentiable if `inverse` depends on x."""
    product = (grad * x).to(weight.dtype)
    mean = (product @ weight)[..., None] * inverse.pow(3) / x.shape[-1]
    grad_x = ((grad * weight).mul_(inverse).addcmul_(x, mean, value=-1)).to(x.dtype)
    if not of_weight:
        return (grad_x,)
    return grad_x, product.flatten(0, -2).t() @ inverse.flatten()


def _inverse(x: Tensor, weight: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=weight.dtype)
    return torch.rsqrt(norm.square() / x.shape[-1] + torch.finfo(norm.dtype).eps)
