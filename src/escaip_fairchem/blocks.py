"""The layers of the backbone: input block, neighbourhood attention, readouts.

Shapes: N atoms, E edges (packed), H hidden, A heads, D = H / A, L blocks.
All of it imports torch only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from escaip_fairchem.edge_attributes import EdgeAttributes
from escaip_fairchem.kernels import (
    at_least_float32,
    attention_backend,
    gather_gelu,
    linear,
    linear_backend,
    sum_backend,
)
from escaip_fairchem.layers import (
    ACTIVATIONS,
    ConcatLinear,
    FeedForward,
    Prologue,
    StochasticDepth,
    prologue_linear,
)

if TYPE_CHECKING:
    from escaip_fairchem.block_inputs import BlockInputs
    from escaip_fairchem.config import EScAIPConfig

Norm = Callable[[], nn.Module]


class Pooling(nn.Module):
    """Each atom's features from its neighbourhood, [E, H] -> [N, H].

    ``mean`` over the slots (with the published 1e-5 in the count), or ``self``: slot 0.
    """

    def __init__(self, pooling: str) -> None:
        super().__init__()
        self.pooling = pooling
        self.sum = sum_backend()

    def forward(self, edge: Tensor, x: BlockInputs) -> Tensor:
        """Features of edges [E, H] -> of atoms [N, H]; a mean is float32 at least."""
        if self.pooling == "self":
            return edge.index_select(0, x.starts)
        total = self.sum(edge, x.receivers - x.first, x.starts, x.counts)
        return total / (x.counts.to(total.dtype) + 1e-5)[:, None]


class InputBlock(nn.Module):
    """First node and edge features from the edge attributes alone."""

    def __init__(self, config: EScAIPConfig, norm: Norm, *, edge_used: bool) -> None:
        super().__init__()
        self.attributes = EdgeAttributes(config)
        self.attribute_norm = norm()
        self.ffn = FeedForward(
            config.hidden_size,
            1,
            activation=config.activation,
            dropout=config.edge_ffn_dropout,
            recompute=config.recompute,
        )
        self.node_norm = norm()
        self.edge_norm = norm() if edge_used else None
        self.residual_before_norm = config.layout == "paper"
        self.pool = Pooling(config.pooling)

    def prepare(self, x: BlockInputs) -> tuple[Tensor, ...]:
        """What `forward` reads of the whole batch."""
        return self.attributes.terms(x)

    def forward(self, prepared: tuple[Tensor, ...], x: BlockInputs) -> tuple[Tensor, Tensor | None]:
        """Node features [N, H] and, if anything reads them, edge features [E, H]."""
        terms = *prepared, *self.attributes.encoder(x)
        if self.residual_before_norm:
            residual = self.attributes.gather(x, *terms)
            normed = self.attribute_norm(residual)
        else:
            residual = normed = self.attributes.gather(x, *terms, norm=self.attribute_norm)
        edge = self.ffn(normed, residual=at_least_float32(residual))
        node = self.node_norm(self.pool(edge, x))
        return node, self.edge_norm(edge) if self.edge_norm is not None else None


class NeighborAttention(nn.Module):
    """Message formation and self-attention among each atom's neighbours.

    The message of an edge is made of its attributes, the hidden states of both atoms, and
    in preset ``v2`` the edge's own state.
    """

    def __init__(self, config: EScAIPConfig, norm: Norm) -> None:
        super().__init__()
        size = config.hidden_size
        self.attributes = EdgeAttributes(config)
        self.pair = ConcatLinear((size, size), size)
        self.edge = nn.Linear(size, size) if config.message == "pair_and_edge" else None
        self.message = nn.Linear(size * (2 if self.edge is None else 3), size)
        inner_norms = config.layout == "v2"
        self.attribute_norm = norm() if inner_norms else nn.Identity()
        self.message_norm = norm() if inner_norms else nn.Identity()
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)
        self.cosine_scale = nn.Parameter(torch.ones(())) if config.angular == "cosine" else None
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.mlp_dropout)
        self.attention_dropout = config.attention_dropout
        self.attend = attention_backend(dropout=config.attention_dropout)
        self.linear = linear_backend(prologue_linear)
        self.recompute = config.recompute
        self.heads = config.num_heads
        self.frequencies = config.frequency_list if config.angular == "legendre" else ()
        self.scale = 1.0 / math.sqrt(attention_width(config))
        self.pool = Pooling(config.pooling)

    def prepare(self, node: Tensor, x: BlockInputs) -> tuple[Tensor, ...]:
        """Terms of attributes and pairs that belong to atoms and lengths, of the whole batch.

        Args:
            node: Normed node features, [N, H].
            x: The whole batch.
        """
        sender, receiver = self.pair.weights()
        pair = linear(node, sender), linear(node, receiver, self.pair.bias)
        return *self.attributes.terms(x), *pair

    def forward(
        self,
        prepared: tuple[Tensor, ...],
        edge: Tensor | None,
        edge_norm: nn.Module | None,
        x: BlockInputs,
    ) -> tuple[Tensor, Tensor]:
        """Edge features [E, H] and their norm -> updates of nodes [N, H] and edges [E, H]."""
        attributes, inputs = self.attributes, [*prepared]
        again = {"recompute": self.recompute}
        if self.edge is not None:
            affine = self.edge.weight, self.edge.bias, Prologue(norm=edge_norm)
            inputs.append(self.linear(*affine, edge, *edge_norm.parameters(), **again))
        count = len(inputs)

        def parts(*given: Tensor) -> tuple[Tensor, ...]:
            """What the message is made of; gathers and activations are cheap to repeat."""
            terms = *given[:3], *given[last:]
            norm = {"norm": self.attribute_norm, "parameters": given[count:last]}
            states = [self.dropout(self.activation(part)) for part in given[5:count]]
            return attributes.gather(x, *terms, **norm), *states, self._pair(x, *given[3:5])

        inputs += self.attribute_norm.parameters()
        last = len(inputs)
        inputs += attributes.encoder(x)
        affine = self.message.weight, self.message.bias
        repeatable = self.recompute and not (self.training and self.dropout.p > 0)
        message = prologue_linear(*affine, parts, *inputs, recompute=repeatable)
        normed = Prologue(self.activation, norm=self.message_norm)
        affine = self.qkv.weight, self.qkv.bias, normed
        qkv = self.linear(*affine, message, *self.message_norm.parameters(), **again)
        attended = self.attend(
            qkv.unflatten(-1, (3, self.heads, -1)),
            x.attention,
            scale=self.scale,
            frequencies=self.frequencies,
            cosine_scale=self.cosine_scale,
            dropout=self.attention_dropout if self.training else 0.0,
        )
        edge_update = linear(attended.flatten(1), self.out.weight, self.out.bias)
        return self.pool(edge_update, x), edge_update

    def _pair(self, x: BlockInputs, source: Tensor, target: Tensor) -> Tensor:
        """Activated sum of a term of the neighbour and one of the atom, [E, H]."""
        if self.attributes.fused and not (self.training and self.dropout.p > 0):
            return gather_gelu(None, source, target, x.index)
        pair = source.index_select(0, x.senders).add_(target.index_select(0, x.receivers))
        return self.dropout(self.activation(pair))


def attention_width(config: EScAIPConfig) -> int:
    """Width whose root scales the dot products.

    The published ``v2`` code repeats a channel of degree l 2 l + 1 times and pads to a
    multiple of 8, and its softmax scale follows that width (320 for a head size of 64).
    """
    if config.angular != "legendre":
        return config.head_size
    width = sum(count * (2 * l + 1) for l, count in enumerate(config.frequency_list))
    return -(-width // 8) * 8


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward on nodes and edges, with residuals."""

    def __init__(self, config: EScAIPConfig, norm: Norm, *, edge_used: bool) -> None:
        """`edge_used`: whether anything after this block reads its edge features."""
        super().__init__()

        def ffn(dropout: float) -> FeedForward:
            return FeedForward(
                config.hidden_size,
                config.ffn_multiplier,
                activation=config.activation,
                dropout=dropout,
                recompute=config.recompute,
            )

        self.attention = NeighborAttention(config, norm)
        self.node_attention_norm = norm()
        self.edge_attention_norm = norm() if config.message == "pair_and_edge" else None
        self.node_ffn_norm, self.node_ffn = norm(), ffn(config.node_ffn_dropout)
        self.edge_used = edge_used
        if edge_used:
            self.edge_ffn_norm, self.edge_ffn = norm(), ffn(config.edge_ffn_dropout)
        self.drop_attention = StochasticDepth(config.stochastic_depth)
        self.drop_ffn = StochasticDepth(config.stochastic_depth)

    def prepare(self, node: Tensor, x: BlockInputs) -> tuple[Tensor, ...]:
        """What `forward` reads of the whole batch, given all node features [N, H]."""
        return self.attention.prepare(self.node_attention_norm(node), x)

    def forward(
        self, prepared: tuple[Tensor, ...], node: Tensor, edge: Tensor | None, x: BlockInputs
    ):
        """[N, H], [E, H] -> [N, H], [E, H] (None where nothing reads the edges)."""
        edge_system = x.system_idx.index_select(0, x.receivers - x.first)
        update = self.attention(prepared, edge, self.edge_attention_norm, x)
        node_update, edge_update = self.drop_attention(*update, x.system_idx, edge_system)
        node = node + node_update
        edge = edge + edge_update if self.edge_used else None
        if not self.drop_ffn.active:
            node = self.node_ffn(node, self.node_ffn_norm, residual=node)
            if self.edge_used:
                edge = self.edge_ffn(edge, self.edge_ffn_norm, residual=edge)
            return node, edge
        if not self.edge_used:
            node_ffn = self.node_ffn(node, self.node_ffn_norm)
            return node + self.drop_ffn(node_ffn, node_ffn, x.system_idx, x.system_idx)[0], None
        update = self.node_ffn(node, self.node_ffn_norm), self.edge_ffn(edge, self.edge_ffn_norm)
        node_update, edge_update = self.drop_ffn(*update, x.system_idx, edge_system)
        return node + node_update, edge + edge_update


class Readout(nn.Module):
    """Readouts of the input block and of every block, concatenated and projected.

    The concatenation is never formed: each block's share is added to the projection, and
    the norm over the concatenation (preset ``paper``) becomes a scale at the end.
    """

    def __init__(self, config: EScAIPConfig, norm: Norm) -> None:
        super().__init__()
        size, parts = config.hidden_size, config.num_layers + 1
        self.norms = nn.ModuleList(norm() for _ in range(parts))
        self.ffns = nn.ModuleList(
            FeedForward(
                size,
                config.readout_multiplier,
                activation=config.activation,
                dropout=config.mlp_dropout,
                recompute=config.recompute,
            )
            for _ in range(parts)
        )
        self.projection = ConcatLinear((size,) * parts, size)
        concat_norm = config.layout == "paper" and config.norm == "rmsnorm"
        self.concat_norm = nn.RMSNorm(size * parts) if concat_norm else None
        self.output_norm = norm()
        self.activation = ACTIVATIONS[config.activation]

    def add(self, total: tuple[Tensor, Tensor] | None, index: int, x: Tensor):
        """Add block `index`'s readout of features [..., H] to the running projection."""
        readout = self.ffns[index](x, self.norms[index], residual=x)
        square = None
        if self.concat_norm is not None:
            square = readout.square().sum(-1, keepdim=True)
            readout = readout * self.concat_norm.weight.chunk(len(self.ffns))[index]
        share = at_least_float32(linear(readout, self.projection.weights()[index]))
        if total is None:
            return share, square
        return total[0] + share, None if square is None else total[1] + square

    def finish(self, total: tuple[Tensor, Tensor]) -> Tensor:
        """The projected readout, [..., H]."""
        projected, square = total
        if self.concat_norm is not None:
            eps = torch.finfo(square.dtype).eps
            projected = projected * torch.rsqrt(square / self.projection.in_features + eps)
        return self.output_norm(self.activation(projected + self.projection.bias))
