"""What the tests of Triton kernels share: derivatives, deviations, and which operators ran."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# without a GPU triton's interpreter runs the kernels, see conftest.py
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def derivatives(function, leaves: dict, cotangents: list, *, second: bool = True) -> dict:
    """Output, gradients of all inputs, and those of their products with cotangents."""
    out = function(**leaves)
    upstream = cotangents[0].to(out.dtype).requires_grad_()
    inputs = list(leaves.values())
    first = torch.autograd.grad(out, inputs, upstream, create_graph=second)
    found = {"out": out, **{f"d {n}": g for n, g in zip(leaves, first, strict=True)}}
    if second:
        products = [c.to(g.dtype) for c, g in zip(cotangents[1:], first, strict=True)]
        names, ask = [*leaves, "upstream"], {"allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad(first, [*inputs, upstream], products, **ask)
        found |= {f"dd {n}": g for n, g in zip(names, grads, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def errors(result: dict, expected: dict, order: float = torch.inf) -> dict[str, float]:
    """Norm of the deviation of each array, relative to its own; of the largest elements."""

    def size(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(x.detach().double(), order)

    return {n: float(size(result[n] - x) / size(x).clamp(min=1e-12)) for n, x in expected.items()}


class Calls(TorchDispatchMode):
    """Records the package's operators that run, and their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "escaip_fairchem":
            self.seen.append((func.name().partition("::")[2], args))
        return func(*args, **kwargs or {})
