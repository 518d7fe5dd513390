"""PyTorch operators of the Triton linear maps, for autograd and torch.compile.

The two products of the backward pass are torch's: that of W's gradient sums over rows, which
are 100 times its columns, and must be split and summed again to fill a GPU; what the other one
could fold, the derivative of norm and GELU, needs sums over whole rows of its output. One
kernel between them computes that derivative and the input of the former.

Shapes: M rows, K input and N output channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from escaip_fairchem.kernels.triton_linear_kernels import (
    norm_linear_backward_kernel,
    norm_linear_kernel,
)
from escaip_fairchem.kernels.triton_tiles import INTERPRETED

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_PARTS = 3
EPS = torch.finfo(torch.float32).eps


@torch.library.custom_op(
    "escaip_fairchem::norm_linear",
    mutates_args=(),
    schema="(Tensor weight, Tensor? bias, Tensor? residual, Tensor[] parts, bool gelu, bool norm)"
    " -> (Tensor, Tensor)",
)
def norm_linear_op(weight, bias, residual, parts, gelu, norm):
    """`norm_linear` of rows, [M, N], with the norm's weights in `weight`; and 1 / rms, [M]."""
    out, rstd = _outputs(weight, residual, parts, norm)
    if not out.numel():
        return out, rstd
    parts, weight = [_adjacent(part) for part in parts], weight.contiguous()
    light = len(parts) == 1 and parts[0].element_size() == 2
    sizes = [part.shape[1] for part in parts] + [0] * (MAX_PARTS - len(parts))
    parts = parts + parts[:1] * (MAX_PARTS - len(parts))
    residual_rows = out if residual is None else _adjacent(residual)
    m, n, k, warps, stages = _tile(*out.shape, weight, light=light)
    with torch.cuda.device_of(weight):
        norm_linear_kernel[(triton.cdiv(len(out), m) * triton.cdiv(out.shape[1], n),)](
            *parts,
            *(part.stride(0) for part in parts),
            weight,
            weight if bias is None else bias,
            residual_rows,
            residual_rows.stride(0),
            out,
            rstd,
            *out.shape,
            EPS=EPS,
            SIZES=tuple(sizes),
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
    schema="(Tensor u, Tensor rstd, Tensor[] parts, bool gelu, bool norm, bool for_weight)"
    " -> (Tensor[], Tensor)",
)
def backward_op(u, rstd, parts, gelu, norm, for_weight):
    """Gradients of the parts from that of the product's input, u = dL/dy W, [M, K].

    `for_weight`: also the product's input, [M, K] in the type of u, else [0].
    """
    u = _adjacent(u)
    grads = [part.new_empty(part.shape) for part in parts]
    z = _input_like(u, for_weight)
    first = 0
    rows_of = [_adjacent(part) for part in parts]
    for index, (part, grad) in enumerate(zip(rows_of, grads, strict=True)):
        rows, size = part.shape
        if not rows:
            break
        block = triton.next_power_of_2(size)
        height = max(1, 2048 // block)
        with torch.cuda.device_of(u):
            norm_linear_backward_kernel[(triton.cdiv(rows, height),)](
                u[:, first:],
                part,
                rstd,
                grad,
                z[:, first:] if for_weight else z,
                u.stride(0),
                part.stride(0),
                u.shape[1],
                rows,
                SIZE=size,
                GELU=gelu,
                NORM=norm and index == 0,
                Z=for_weight,
                ROWS=height,
                BLOCK=block,
                num_warps=4 if block <= 2048 else 8,
            )
        first += size
    return grads, z


def _outputs(weight: Tensor, residual: Tensor | None, parts: Sequence[Tensor], norm: bool):
    dtype = weight.dtype
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
    rows = parts[0].shape[0]
    out = weight.new_empty(rows, weight.shape[0], dtype=dtype)
    return out, weight.new_empty(rows if norm else 0, dtype=torch.float32)


def _input_like(u: Tensor, wanted: bool) -> Tensor:
    return u.new_empty(u.shape) if wanted else u.new_empty(0, 0)


@norm_linear_op.register_fake
def _(weight, bias, residual, parts, gelu, norm):
    return _outputs(weight, residual, parts, norm)


@backward_op.register_fake
def _(u, rstd, parts, gelu, norm, for_weight):
    return [part.new_empty(part.shape) for part in parts], _input_like(u, for_weight)


def _setup(ctx, inputs, output) -> None:
    weight, bias, residual, parts, ctx.gelu, ctx.norm = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight, output[1], *parts)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype


def _backward(ctx, grad, _):
    weight, rstd, *parts = ctx.saved_tensors
    found = gradients(
        grad.to(weight.dtype), weight, rstd, parts, ctx.gelu, ctx.norm, for_weight=asked(ctx)
    )
    d_bias = bias_gradient(ctx, grad)
    d_residual = None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype)
    return found[0], d_bias, d_residual, found[1], None, None


norm_linear_op.register_autograd(_backward, setup_context=_setup)


def asked(ctx, index: int = 0) -> bool:
    """Whether this backward pass wants the gradient of the first (weight) or second (bias) tensor.

    Forces differentiate by positions alone. `ctx.needs_input_grad` does not know, and a third
    of the backward pass would go to gradients of weights that nobody reads. The engine does not
    say it of leaves, therefore `norm_linear` gives none.
    """
    node = ctx.next_functions[index][0]
    return node is not None and torch._C._will_engine_execute_node(node)


def bias_gradient(ctx, grad: Tensor) -> Tensor | None:
    """Gradient of the bias, of type `ctx.bias_dtype` (None without a bias), if it is wanted."""
    if ctx.bias_dtype is None or not asked(ctx, 1):
        return None
    return grad.sum(0, dtype=ctx.bias_dtype)


def gradients(grad, weight, rstd, parts, gelu, norm, *, for_weight):
    """Gradients of weight (or None) and parts, from that of the output in weight's type."""
    u = grad @ weight
    if torch.is_grad_enabled():  # a second derivative will be asked for
        with torch.autocast(weight.device.type, enabled=False):
            inputs = _prologue(parts, gelu, norm, weight.dtype)
        wanted = [index for index, part in enumerate(parts) if part.requires_grad]
        grads: list[Tensor | None] = [None] * len(parts)
        shares = u.split([part.shape[1] for part in parts], dim=1)
        for index in wanted:
            (grads[index],) = torch.autograd.grad(
                inputs[index], parts[index], shares[index], create_graph=True
            )
        z = torch.cat(inputs, dim=1) if for_weight else None
    elif gelu or norm or len(parts) > 1:
        grads, z = backward_op(u, rstd, parts, gelu, norm, for_weight)
    else:
        grads, z = [u.to(parts[0].dtype)], parts[0].to(weight.dtype)
    return grad.t() @ z if for_weight else None, grads


def _prologue(parts, gelu: bool, norm: bool, dtype: torch.dtype) -> list[Tensor]:
    """Inputs of the product, by differentiable operations."""
    wide = [part.float() for part in parts]
    wide = [F.gelu(part) for part in wide] if gelu else wide
    if norm:
        wide[0] = wide[0] * torch.rsqrt(wide[0].square().mean(1, keepdim=True) + EPS)
    return [part.to(dtype) for part in wide]


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def precision() -> str:
    """How float32 is multiplied."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


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
        light: Whether x is one part in half precision.
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
