"""Matrix products by the faster of the libraries that torch has on board. Imports torch only.

On CPUs torch multiplies float32 matrices with MKL, which leaves half of an AVX-512 core idle if
AMD made it; oneDNN, which torch has for other purposes, does not.
"""

from __future__ import annotations

import os
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from escaip_fairchem.kernels.again import asked_for

#: Multiplications, and sides of a matrix, below which oneDNN's overhead exceeds its gain.
_FEW_PRODUCTS, _SHORT_SIDE = 2**21, 16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, differentiable any number of times.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out] or None.

    Returns:
        [..., out].
    """
    if not _pays(x, weight):
        return F.linear(x, weight, bias)
    return _OneDNN.apply(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product a b, [m, k] [k, n] -> [m, n], differentiable any number of times."""
    if not _pays(a, b.t()):
        return a @ b
    # oneDNN copies a left factor that is not contiguous: let it be the smaller one
    if not a.is_contiguous() and b.numel() < a.numel():
        return linear(b.t(), a).t()
    return linear(a, b.t())


def _pays(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() * len(weight) >= _FEW_PRODUCTS
        and min(weight.shape) >= _SHORT_SIDE
        and _has_slow_default()
        and not torch.is_autocast_enabled("cpu")
    )


@lru_cache
def _has_slow_default() -> bool:
    """Whether this CPU is one that MKL does not use to the full and oneDNN does."""
    if os.environ.get("ESCAIP_KERNELS") == "reference":
        return False
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
    return bool(known and cpu.get("avx512_f") and cpu.get("cpu_name", "").startswith("AMD"))


class _OneDNN(Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, _adjacent(weight), bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        return (
            linear(grad, weight.t()) if asked_for(ctx, 0) else None,
            product(rows.t(), x.flatten(0, -2)) if asked_for(ctx, 1) else None,
            rows.sum(0) if asked_for(ctx, 2) else None,
        )


def _adjacent(weight: Tensor) -> Tensor:
    """`weight` without gaps: with the columns of a larger one oneDNN is a thousand times slower."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()
