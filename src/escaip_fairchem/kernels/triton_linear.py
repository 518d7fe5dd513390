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

from escaip_fairchem.kernels.triton_linear_ops import norm_linear_op
from escaip_fairchem.kernels.triton_tiles import precision

if TYPE_CHECKING:
    from collections.abc import Callable

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
    x, *norm = inputs
    gelu, norm = prologue.activation is not None, norm[0] if norm else None
    return norm_linear(x, weight, bias, gelu=gelu, norm=norm, residual=residual)


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
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear map with what comes before and after it.

    residual + W rms_norm(f(x)) + bias, differentiable twice. The backward pass keeps x, weight,
    and 1 / rms; nothing else. GELU, squares, sums, bias and residual are float32.

    Args:
        x: [..., K], of a type up to float32.
        weight: [N, K]; its type is that of the products, under autocast autocast's.
        bias: [N] or None.
        gelu: Whether f is GELU or the identity.
        norm: Weights of the RMS norm, [K], or None; eps as in `rms_norm`.
        residual: [..., N] or None.

    Returns:
        [..., N], in the type of the products, or of `residual` if that is wider.
    """
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if norm is not None:
        weight = weight * norm
    residual_rows = None if residual is None else residual.flatten(0, -2)
    out, _ = norm_linear_op(
        x.flatten(0, -2), weight.to(dtype), bias, residual_rows, gelu, norm is not None
    )
    return out.view(*x.shape[:-1], len(weight))
