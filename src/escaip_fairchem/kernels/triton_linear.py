"""Linear maps whose norm, activation and residual cost no pass over memory, in Triton.

An RMS norm before a linear map is a scale of its output, 1 / rms(x) for each row, if the norm's
weights g are in the map's: W diag(g). So the kernel sums the squares of the x that it multiplies.
Needs triton (ImportError without it) and a GPU, or triton's interpreter: see triton_attention.

Shapes: M rows, K input and N output channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from escaip_fairchem.kernels.triton_linear_ops import (
    asked,
    bias_gradient,
    gradients,
    norm_linear_op,
    precision,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from escaip_fairchem.layers import Prologue


def triton_linear(
    plain: Callable[..., Tensor],
    weight: Tensor,
    bias: Tensor | None,
    prologue: Prologue,
    *inputs: Tensor,
    recompute: bool,
    residual: Tensor | None = None,
) -> Tensor:
    """`plain`, which is `layers.prologue_linear`, by the kernel where that covers the prologue."""
    if not _covers(prologue, weight):
        return plain(weight, bias, prologue, *inputs, recompute=recompute, residual=residual)
    given, norm = prologue.split(inputs)
    gelu, norm = prologue.activation is not None, norm[0] if norm else None
    if prologue.gather is None:
        return norm_linear(given, weight, bias, gelu=gelu, norm=norm, residual=residual)
    # a compiler decides by itself what to compute again
    if not recompute or torch.compiler.is_compiling():
        with torch.autocast(weight.device.type, enabled=False):
            parts = prologue.gather(*given)
        return norm_linear(parts, weight, bias, gelu=gelu, norm=norm, residual=residual)
    weight, bias = _folded(weight, bias, norm)
    out = _Gathered.apply(prologue.gather, gelu, norm is not None, weight, bias, *given)
    return out if residual is None else residual + out


def _covers(prologue: Prologue, weight: Tensor) -> bool:
    """Whether the kernel has this prologue, in this precision.

    Full float32 without tensor cores is left to the libraries, except to test the kernel.
    """
    device = weight.device.type
    tensor_cores = torch.is_autocast_enabled(device) or weight.element_size() == 2
    if device == "cuda" and not tensor_cores and precision() != "tf32":
        return False
    dropout, norm = prologue.dropout, prologue.norm
    return (
        weight.dtype != torch.float64
        and prologue.activation in (None, F.gelu)
        and not (dropout is not None and dropout.training and dropout.p > 0)
        and (
            isinstance(norm, (type(None), torch.nn.Identity))
            or (isinstance(norm, torch.nn.RMSNorm) and norm.eps is None)
        )
    )


def norm_linear(
    parts: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear map of a concatenation, with what comes before and after it.

    residual + W [rms_norm(f(parts[0])), f(parts[1]), ...] + bias, differentiable twice. The
    backward pass keeps parts, weight, and 1 / rms; nothing else. GELU, squares, sums, bias and
    residual are float32.

    Args:
        parts: One to three, [..., K_i], of types up to float32.
        weight: [N, sum of K_i]; its type is that of the products, under autocast autocast's.
        bias: [N] or None.
        gelu: Whether f is GELU or the identity.
        norm: Weights of the RMS norm of the first part, [K_0], or None; eps as in `rms_norm`.
        residual: [..., N] or None.

    Returns:
        [..., N], in the type of the products, or of `residual` if that is wider.
    """
    weight, bias = _folded(weight, bias, norm)
    shape = (*parts[0].shape[:-1], len(weight))
    rows = [part.flatten(0, -2) for part in parts]
    residual = None if residual is None else residual.flatten(0, -2)
    return norm_linear_op(weight, bias, residual, rows, gelu, norm is not None)[0].view(shape)


def _folded(
    weight: Tensor, bias: Tensor | None, norm: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W diag(norm) in the type of the products, and the bias; no leaves, see `asked`."""
    dtype, device = weight.dtype, weight.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if norm is not None:
        first, rest = weight.split([len(norm), weight.shape[1] - len(norm)], dim=1)
        weight = torch.cat([first * norm, rest], dim=1) if rest.numel() else first * norm
    weight = weight.to(dtype)
    return weight.view_as(weight), None if bias is None else bias.view_as(bias)


class _Gathered(Function):
    """`norm_linear_op` of parts that are gathered, and gathered again in the backward pass."""

    @staticmethod
    def forward(ctx, gather, gelu, norm, weight, bias, *inputs):
        with torch.autocast(weight.device.type, enabled=False):
            parts = gather(*inputs)
            out, rstd = norm_linear_op(weight, bias, None, list(parts), gelu, norm)
        ctx.save_for_backward(weight, rstd, *inputs)
        ctx.gather, ctx.gelu, ctx.norm = gather, gelu, norm
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx, grad):
        weight, rstd, *inputs = ctx.saved_tensors
        again, needed = torch.is_grad_enabled(), ctx.needs_input_grad[5:]
        if not again:
            inputs = [
                x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)
            ]
        with torch.enable_grad():
            parts = ctx.gather(*inputs)
        given = parts if again else [part.detach() for part in parts]
        d_weight, d_parts = gradients(
            grad, weight, rstd, given, ctx.gelu, ctx.norm, for_weight=asked(ctx)
        )
        pairs = [(p, d) for p, d in zip(parts, d_parts, strict=True) if p.requires_grad]
        wanted = [index for index, need in enumerate(needed) if need]
        found = torch.autograd.grad(
            [part for part, _ in pairs],
            [inputs[index] for index in wanted],
            [d for _, d in pairs],
            create_graph=again,
        )
        d_inputs: list[Tensor | None] = [None] * len(inputs)
        for index, value in zip(wanted, found, strict=True):
            d_inputs[index] = value
        d_bias = bias_gradient(ctx, grad)
        return None, None, None, d_weight, d_bias, *d_inputs
