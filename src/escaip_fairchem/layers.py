"""Small layers: feed-forward, linear of a concatenation, norms, activations, dropping."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def _smelu(x: Tensor, beta: float = 2.0) -> Tensor:
    """Smooth ReLU (Shamir et al., arXiv 2202.06499)."""
    return torch.where(x.abs() <= beta, (x + beta).square() / (4 * beta), F.relu(x))


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _star_relu(x: Tensor) -> Tensor:
    """Squared ReLU of zero mean and unit variance (Yu et al., arXiv 2210.13452)."""
    return 0.8944 * F.relu(x).square() - 0.4472


#: Activation functions by the names of the authors' code.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "squared_relu": _squared_relu,
    "star_relu": _star_relu,
    "smelu": _smelu,
}


def norm_factory(name: str, size: int) -> Callable[[], nn.Module]:
    """A constructor of the named norm over `size` channels."""
    return {
        "rmsnorm": partial(nn.RMSNorm, size),
        "layernorm": partial(nn.LayerNorm, size),
        "skip": nn.Identity,
    }[name]


class ConcatLinear(nn.Linear):
    """A linear map of a concatenation that can be applied to each part by itself.

    W [a, b, ...] + bias = W_a a + W_b b + ... + bias, so that the parts which belong to
    atoms are multiplied once per atom and gathered to edges afterwards.
    """

    def __init__(self, sizes: Sequence[int], out_features: int) -> None:
        super().__init__(sum(sizes), out_features)
        self.sizes = tuple(sizes)

    def part(self, index: int, x: Tensor, *, bias: bool = False) -> Tensor:
        """The share of part `index`: [..., sizes[index]] -> [..., out_features]."""
        start = sum(self.sizes[:index])
        weight = self.weight[:, start : start + self.sizes[index]]
        return F.linear(x, weight, self.bias if bias else None)


class FeedForward(nn.Module):
    """Two linear layers with an activation between and dropout after each."""

    def __init__(self, size: int, multiplier: int, *, activation: str, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(size, multiplier * size)
        self.down = nn.Linear(multiplier * size, size)
        self.activation = ACTIVATIONS[activation]
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return self.dropout(self.down(self.dropout(self.activation(self.up(x)))))


class StochasticDepth(nn.Module):
    """Drop a residual branch per structure with probability p, scaled by 1 / (1 - p).

    Huang et al., arXiv 1603.09382.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, node: Tensor, edge: Tensor, system: Tensor, edge_system: Tensor):
        """Drop independently for nodes [N, H] and edges [E, H], given their structures."""
        if not self.training or self.p == 0.0:
            return node, edge
        return self._drop(node, system), self._drop(edge, edge_system)

    def _drop(self, x: Tensor, system: Tensor) -> Tensor:
        size = int(system.max()) + 1 if system.numel() else 0
        keep = torch.full((size, 1), 1.0 - self.p, dtype=x.dtype, device=x.device).bernoulli()
        return x * keep[system] / (1.0 - self.p)


def names_without_decay(module: nn.Module) -> set[str]:
    """Parameters that weight decay must leave alone: all but the weights of linear layers.

    As in the reference: embeddings, norms, biases; learnable scalars are added here.
    """
    decayed = {
        f"{prefix}.weight" if prefix else "weight"
        for prefix, part in module.named_modules()
        if isinstance(part, nn.Linear)
    }
    return {name for name, _ in module.named_parameters()} - decayed
