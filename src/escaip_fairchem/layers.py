"""Small layers: feed-forward, linear of a concatenation, norms, activations, dropping."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from escaip_fairchem.kernels import linear, linear_backend, recomputed_linear, rms_norm

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


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last axis, in fewer passes over memory."""

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """[..., size] -> [..., size]; `weight` stands in for the norm's own."""
        return rms_norm(x, self.weight if weight is None else weight)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last axis."""

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None):
        """[..., size] -> [..., size]; `weight` and `bias` stand in for the norm's own."""
        if weight is None:
            weight, bias = self.weight, self.bias
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def norm_factory(name: str, size: int) -> Callable[[], nn.Module]:
    """A constructor of the named norm over `size` channels.

    A norm takes its input and, optionally, its own parameters, so that `prologue_linear` can
    hand them over.
    """
    return {
        "rmsnorm": partial(RMSNorm, size),
        "layernorm": partial(LayerNorm, size),
        "skip": nn.Identity,
    }[name]


@dataclass(frozen=True)
class Prologue:
    """What the input of a linear map goes through first, cheap enough to be done again.

    Attributes:
        activation: First.
        dropout: After the activation.
        norm: Last. Its parameters are further inputs.
    """

    activation: Callable[[Tensor], Tensor] | None = None
    dropout: nn.Dropout | None = None
    norm: nn.Module | None = None

    def __call__(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """[..., size] -> [..., size], with `parameters` in place of the norm's own."""
        if self.activation is not None:
            x = self.activation(x)
        if self.dropout is not None:
            x = self.dropout(x)
        return x if self.norm is None else self.norm(x, *parameters)


def prologue_linear(
    weight: Tensor,
    bias: Tensor | None,
    prologue: Callable[..., Tensor | tuple[Tensor, ...]],
    *inputs: Tensor,
    recompute: bool,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear map of the concatenation of ``prologue(*inputs)``, which is never formed.

    This is the plain form; modules call what `linear_backend` chose of its implementations.

    Args:
        weight: Of the linear map.
        bias: Of the linear map.
        prologue: Activations, norms, gathers: cheap enough to be done again in the backward
            pass. Whatever needs a gradient must be among `inputs`.
        *inputs: Tensors.
        recompute: Repeat the prologue in the backward pass instead of keeping its parts; one
            that drops out cannot be repeated. A compiler decides on that itself.
        residual: Added to the result.
    """
    if residual is not None:
        return residual + prologue_linear(weight, bias, prologue, *inputs, recompute=recompute)
    if recompute and not torch.compiler.is_compiling():
        return recomputed_linear(prologue, weight, bias, *inputs)
    parts = prologue(*inputs)
    if not isinstance(parts, tuple):
        return linear(parts, weight, bias)
    weights = weight.split([part.shape[-1] for part in parts], dim=1)
    total = linear(parts[0], weights[0], bias)
    for part, share in zip(parts[1:], weights[1:], strict=True):
        total = total + linear(part, share)
    return total


class ConcatLinear(nn.Linear):
    """A linear map of a concatenation that can be applied to each part by itself.

    W [a, b, ...] + bias = W_a a + W_b b + ... + bias, so that the parts which belong to
    atoms are multiplied once per atom and gathered to edges afterwards.
    """

    def __init__(self, sizes: Sequence[int], out_features: int) -> None:
        super().__init__(sum(sizes), out_features)
        self.sizes = tuple(sizes)

    def weights(self) -> tuple[Tensor, ...]:
        """The share of each part in the weight, [out_features, sizes[i]]."""
        return self.weight.split(self.sizes, dim=1)


class FeedForward(nn.Module):
    """Two linear layers with an activation between and dropout after each."""

    def __init__(
        self, size: int, multiplier: int, *, activation: str, dropout: float, recompute: bool
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.up = nn.Linear(size, multiplier * size)
        self.down = nn.Linear(multiplier * size, size)
        self.activation = ACTIVATIONS[activation]
        self.dropout = nn.Dropout(dropout)
        self.linear = linear_backend(prologue_linear)

    def forward(
        self, x: Tensor, norm: nn.Module | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """[..., size] -> [..., size]; of ``norm(x)`` if a norm is given; plus `residual`."""
        if norm is None:
            hidden = linear(x, self.up.weight, self.up.bias)
        else:
            up = self.up.weight, self.up.bias, Prologue(norm=norm)
            hidden = self.linear(*up, x, *norm.parameters(), recompute=self.recompute)
        down = self.down.weight, self.down.bias, Prologue(self.activation, self.dropout)
        if not (self.training and self.dropout.p > 0):
            return self.linear(*down, hidden, recompute=self.recompute, residual=residual)
        out = self.dropout(self.linear(*down, hidden, recompute=False))
        return out if residual is None else residual + out


class StochasticDepth(nn.Module):
    """Drop a residual branch per structure with probability p, scaled by 1 / (1 - p).

    Huang et al., arXiv 1603.09382.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    @property
    def active(self) -> bool:
        """Whether anything is dropped."""
        return self.training and self.p > 0

    def forward(self, node: Tensor, edge: Tensor, system: Tensor, edge_system: Tensor):
        """Drop independently for nodes [N, H] and edges [E, H], given their structures."""
        if not self.active:
            return node, edge
        return self._drop(node, system), self._drop(edge, edge_system)

    def _drop(self, x: Tensor, system: Tensor) -> Tensor:
        # one for each row is enough for all structures; how many there are would have to be read
        keep = torch.full((len(system), 1), 1.0 - self.p, dtype=x.dtype, device=x.device)
        keep = keep.bernoulli()
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
