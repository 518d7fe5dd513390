"""PyTorch operators of the Triton linear maps, for autograd and torch.compile.

The two products of the backward pass are torch's: that of W's gradient sums over rows, which
are 100 times its columns, and must be split and summed again to fill a GPU; what the other one
could fold, the derivative of norm and GELU, needs sums over whole rows of its output. One
kernel between them computes that derivative and the input of the former.

Shapes: M rows, K input and N output channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from escaip_fairchem.kernels.again import asked_for
from escaip_fairchem.kernels.triton_linear_kernels import (
    norm_linear_backward_kernel,
    norm_linear_kernel,
)
from escaip_fairchem.kernels.triton_tiles import INTERPRETED, precision

EPS = torch.finfo(torch.float32).eps


@torch.library.custom_op(
    "escaip_fairchem::norm_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool gelu, bool norm)"
    " -> (Tensor, Tensor)",
)
def norm_linear_op(x, weight, bias, residual, gelu, norm):
    """`norm_linear` of rows, [M, N], with the norm's weights in `weight`; and 1 / rms, [M]."""
    out, rstd = _outputs(x, weight, residual, norm)
    if not out.numel():
        return out, rstd
    x, weight = _adjacent(x), weight.contiguous()
    residual_rows = out if residual is None else _adjacent(residual)
    m, n, k, warps, stages = _tile(*out.shape, weight, light=x.element_size() == 2)
    with torch.cuda.device_of(weight):
        norm_linear_kernel[(triton.cdiv(len(out), m) * triton.cdiv(out.shape[1], n),)](
            x,
            x.stride(0),
            weight,
            weight if bias is None else bias,
            residual_rows,
            residual_rows.stride(0),
            out,
            rstd,
            *out.shape,
            EPS=EPS,
            K=x.shape[1],
            GELU=gelu,
            NORM=norm,
            BIAS=bias is not None,
            RESIDUAL=residual is not None,
            BLOCK_M=m,
            BLOCK_N=n,
            BLOCK_K=k,
            GROUP=8,
            PRECISION=precision(),
            num_warps=warps,
            num_stages=stages,
        )
    return out, rstd


@torch.library.custom_op(
    "escaip_fairchem::norm_linear_backward",
    mutates_args=(),
    schema="(Tensor u, Tensor rstd, Tensor x, bool gelu, bool norm, bool for_weight)"
    " -> (Tensor, Tensor)",
)
def backward_op(u, rstd, x, gelu, norm, for_weight):
    """Gradient of x from that of the product's input, u = dL/dy W, [M, K].

    `for_weight`: also the product's input, [M, K] in the type of u, else [0].
    """
    d_x, z = _gradients_like(u, x, for_weight)
    if not len(x):
        return d_x, z
    u, x = _adjacent(u), _adjacent(x)
    rows, size = x.shape
    block = triton.next_power_of_2(size)
    height = max(1, 2048 // block)
    with torch.cuda.device_of(u):
        norm_linear_backward_kernel[(triton.cdiv(rows, height),)](
            u,
            x,
            rstd,
            d_x,
            z,
            u.stride(0),
            x.stride(0),
            rows,
            K=size,
            GELU=gelu,
            NORM=norm,
            Z=for_weight,
            ROWS=height,
            BLOCK=block,
            num_warps=4 if block <= 2048 else 8,
        )
    return d_x, z


def _outputs(x: Tensor, weight: Tensor, residual: Tensor | None, norm: bool):
    dtype = weight.dtype
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
    rows = x.shape[0]
    out = weight.new_empty(rows, weight.shape[0], dtype=dtype)
    return out, weight.new_empty(rows if norm else 0, dtype=torch.float32)


def _gradients_like(u: Tensor, x: Tensor, for_weight: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), u.new_empty(u.shape if for_weight else (0, 0))


@norm_linear_op.register_fake
def _(x, weight, _bias, residual, _gelu, norm):
    return _outputs(x, weight, residual, norm)


@backward_op.register_fake
def _(u, _rstd, x, _gelu, _norm, for_weight):
    return _gradients_like(u, x, for_weight)


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, residual, ctx.gelu, ctx.norm = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype


def _backward(ctx, grad, _):
    x, weight, rstd = ctx.saved_tensors
    d_bias = d_residual = None
    if ctx.bias_dtype is not None and asked_for(ctx, 2):
        d_bias = grad.sum(0, dtype=ctx.bias_dtype)
    if ctx.residual_dtype is not None:
        d_residual = grad.to(ctx.residual_dtype)
    d_x, d_weight = _gradients(
        grad.to(weight.dtype), x, weight, rstd, ctx.gelu, ctx.norm, for_weight=asked_for(ctx, 1)
    )
    return d_x, d_weight, d_bias, d_residual, None, None


norm_linear_op.register_autograd(_backward, setup_context=_setup)


def _gradients(grad, x, weight, rstd, gelu, norm, *, for_weight):
    """Gradients of x and weight (or None), from that of the output in weight's type."""
    u = grad @ weight
    if torch.is_grad_enabled():  # a second derivative will be asked for
        with torch.autocast(weight.device.type, enabled=False):
            z = _prologue(x, gelu, norm, weight.dtype)
        d_x = None
        if x.requires_grad:
            (d_x,) = torch.autograd.grad(z, x, u, create_graph=True)
    elif gelu or norm:
        d_x, z = backward_op(u, rstd, x, gelu, norm, for_weight)
    else:
        d_x, z = u.to(x.dtype), x.to(weight.dtype)
    return d_x, grad.t() @ z if for_weight else None


def _prologue(x: Tensor, gelu: bool, norm: bool, dtype: torch.dtype) -> Tensor:
    """Input of the product, by differentiable operations."""
    x = x.float()
    x = F.gelu(x) if gelu else x
    if norm:
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS)
    return x.to(dtype)


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _tile(
    rows: int, columns: int, weight: Tensor, *, light: bool
) -> tuple[int, int, int, int, int]:
    """Rows, columns and inner channels of a program, warps, stages of its pipeline.

    From registers and shared memory of compiled code, not timed. Fixed, not tuned when it runs:
    the order of sums, and so the last bits, hang on it.

    Args:
        rows: M.
        columns: N.
        weight: W.
        light: Whether x is in half precision.
    """
    if INTERPRETED.value:
        return 64, 64, 64, 4, 1
    half = weight.element_size() == 2
    if triton.cdiv(rows, 128) * triton.cdiv(columns, 128) < 128:  # too few to fill a GPU
        return 64, 64, 64 if half else 32, 4, 3
    if not half:
        return 128, 128, 32, 8, 3
    # the activation is done again for every block of columns: the wider the better
    return 128, 256 if columns % 256 == 0 else 128, 64 if light else 32, 8, 3
