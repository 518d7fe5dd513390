"""Attention among the neighbours of each atom, in PyTorch with hand-written derivatives.

The same function as `reference.neighbor_attention`. It keeps q, k, v and the weights for the
backward pass, and moves rows between the packed and the padded layout by one gather each way.
First and second derivative are closed forms in tiles of K x K.

Shapes as in the reference: N atoms, K slots, E edges, A heads, D channels per head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import Function

if TYPE_CHECKING:
    from escaip_fairchem.kernels.reference import AttentionGeometry


def packed_attention(
    qkv: Tensor,
    geometry: AttentionGeometry,
    *,
    scale: float,
    frequencies: tuple[int, ...] = (),
    cosine_scale: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Multi-head self-attention among the edges of each atom.

    Args:
        qkv: Queries, keys and values, [E, 3, A, D].
        geometry: See `AttentionGeometry`.
        scale: Factor of the dot products.
        frequencies: Channels of each l, summing to D; empty for plain dot products.
        cosine_scale: Learnable factor of the angle bias (preset ``paper``), scalar.
        dropout: Probability of dropping an attention weight.

    Returns:
        [E, A, D].
    """
    bias, keep = geometry.bias, None
    if cosine_scale is not None:
        bias = bias + cosine_scale * geometry.cosines
    if dropout:
        (n, k), heads = geometry.shape, qkv.shape[2]
        keep = torch.full((n, heads, k, k), 1 - dropout, dtype=bias.dtype, device=bias.device)
        keep = keep.bernoulli().div_(1 - dropout)
    tiles = _Tiles.of(geometry, qkv, scale, frequencies)
    polynomials = geometry.polynomials[1:] if frequencies else ()  # P_0 = 1
    return _Attention.apply(tiles, keep, qkv, bias, *polynomials)


@dataclass
class _Tiles:
    """Constants of one call: shapes, scale, channels of each l, and where rows go.

    Attributes:
        gather: Row of packed q, k, v for each padded one, [3 * N * A * K]; any in empty slots.
        scatter: Padded row of each packed one, [E * A].
        scatter_qkv: The same for q, k, v together, [E * 3 * A].
    """

    shape: tuple[int, int, int, int]
    scale: float
    sizes: tuple[int, ...]
    gather: Tensor
    scatter: Tensor
    scatter_qkv: Tensor

    @classmethod
    def of(cls, geometry, qkv: Tensor, scale: float, frequencies: tuple[int, ...]) -> _Tiles:
        (n, k), (heads, size) = geometry.shape, qkv.shape[2:]
        if heads not in geometry.rows:
            geometry.rows[heads] = _rows(geometry.slots, n, k, heads)
        return cls((n, heads, k, size), scale, frequencies or (size,), *geometry.rows[heads])

    def pad_qkv(self, packed: Tensor) -> Tensor:
        """[E, 3, A, D] -> [3, N, A, K, D]."""
        size = self.shape[-1]
        return packed.reshape(-1, size).index_select(0, self.gather).view(3, *self.shape)

    def pad(self, packed: Tensor) -> Tensor:
        """[E, A, D] -> [N, A, K, D], zero in empty slots."""
        n, heads, k, size = self.shape
        padded = packed.new_zeros(n * heads * k, size)
        return padded.index_copy(0, self.scatter, packed.reshape(-1, size)).view(self.shape)

    def unpad(self, padded: Tensor) -> Tensor:
        """[N, A, K, D] -> [E, A, D]."""
        heads, size = self.shape[1], self.shape[-1]
        return padded.reshape(-1, size).index_select(0, self.scatter).view(-1, heads, size)

    def unpad_qkv(self, padded: Tensor) -> Tensor:
        """[3, N, A, K, D] -> [E, 3, A, D]."""
        heads, size = self.shape[1], self.shape[-1]
        rows = padded.view(-1, size).index_select(0, self.scatter_qkv)
        return rows.view(-1, 3, heads, size)

    def segments(self, *padded: Tensor):
        """Channels of each l of several [N, A, K, D], without empty ones: (l, part, ...)."""
        parts = zip(*(x.split(self.sizes, dim=-1) for x in padded), strict=True)
        return [(l, *part) for l, part in enumerate(parts) if self.sizes[l]]


def _rows(slots: Tensor, n: int, k: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    edges, device = len(slots), slots.device
    head = torch.arange(heads, device=device)
    edge_of_slot = torch.zeros(n * k, dtype=torch.long, device=device)
    edge_of_slot[slots] = torch.arange(edges, device=device)
    part = torch.arange(3, device=device)
    gather = edge_of_slot.view(1, n, 1, k) * 3 + part.view(3, 1, 1, 1)
    gather = gather * heads + head.view(1, 1, heads, 1)
    atom, slot = slots // k, slots % k
    scatter = (atom[:, None] * heads + head) * k + slot[:, None]
    scatter_qkv = scatter[:, None] + part[:, None] * (n * heads * k)
    return gather.flatten(), scatter.flatten(), scatter_qkv.flatten()


class _Attention(Function):
    @staticmethod
    def forward(ctx, tiles, keep, qkv, bias, *polynomials):
        ctx.tiles = tiles
        q, k, v = tiles.pad_qkv(qkv)
        weights = _weights(tiles, q, k, bias, polynomials)
        ctx.save_for_backward(keep, weights, qkv, bias, *polynomials)
        return tiles.unpad((weights if keep is None else weights * keep).to(v.dtype) @ v)

    @staticmethod
    def backward(ctx, grad):
        keep, weights, *inputs = ctx.saved_tensors
        geometry = any(ctx.needs_input_grad[3:])
        grads = _AttentionGrad.apply(ctx.tiles, geometry, keep, weights, grad, *inputs)
        return None, None, *(grads if geometry else [*grads, *[None] * (len(inputs) - 1)])


class _AttentionGrad(Function):
    """First derivative: cotangent of the output -> gradients of q, k, v and the geometry.

    With S the logits, A = softmax(S), dO the cotangent: dA = dO v^T, dS = A (dA - rowsum(A dA)),
    dv = A^T dO, dq_l = scale (dS P_l) k_l, dk_l = scale (dS P_l)^T q_l,
    dP_l = scale sum_heads dS q_l k_l^T.
    """

    @staticmethod
    def forward(ctx, tiles, geometry, keep, weights, grad, qkv, bias, *polynomials):
        ctx.tiles, ctx.geometry = tiles, geometry
        ctx.save_for_backward(keep, weights, grad, qkv, bias, *polynomials)
        q, k, v = padded = tiles.pad_qkv(qkv)
        grad = tiles.pad(grad)
        attended, _, _, slope = _softmax_parts(keep, weights, grad, v)
        dq, dk, dv = grads = torch.empty_like(padded)
        torch.matmul(attended.to(v.dtype).transpose(-1, -2), grad, out=dv)
        scaled = slope * tiles.scale
        for l, q_l, k_l, dq_l, dk_l in tiles.segments(q, k, dq, dk):
            tile = (scaled * polynomials[l - 1] if l else scaled).to(q.dtype)
            dq_l.copy_(tile @ k_l)
            dk_l.copy_(tile.transpose(-1, -2) @ q_l)
        grad_qkv = tiles.unpad_qkv(grads)
        if not geometry:
            return (grad_qkv,)
        products = _polynomial_grads(tiles, scaled, q, k, polynomials)
        return grad_qkv, slope.sum_to_size(bias.shape), *products

    @staticmethod
    def backward(ctx, grad_qkv, grad_bias=None, *grad_polynomials):
        """Second derivative; the letters are those of the class and of the comments."""
        tiles = ctx.tiles
        keep, weights, grad, qkv, bias, *polynomials = ctx.saved_tensors
        q, k, v = padded = tiles.pad_qkv(qkv)
        gq, gk, gv = tiles.pad_qkv(grad_qkv)
        grad = tiles.pad(grad)
        attended, dA, D, dS = _softmax_parts(keep, weights, grad, v)
        # G, the cotangent of dS
        G = torch.zeros_like(dS) if grad_bias is None else grad_bias.expand_as(dS).clone()
        for l, q_l, k_l, gq_l, gk_l in tiles.segments(q, k, gq, gk):
            product = gq_l @ k_l.transpose(-1, -2) + q_l @ gk_l.transpose(-1, -2)
            G.add_(product * polynomials[l - 1] if l else product, alpha=tiles.scale)
            if l and ctx.geometry and grad_polynomials[l - 1] is not None:
                product = q_l @ k_l.transpose(-1, -2)
                G.add_(product * grad_polynomials[l - 1], alpha=tiles.scale)
        r = (weights * G).sum(-1, keepdim=True)
        H = weights * (G - r)
        kept = H if keep is None else H * keep
        E = G * (dA - D) - dA * r
        values = grad @ gv.transpose(-1, -2)
        E = E + (values if keep is None else values * keep)
        T = weights * (E - (weights * E).sum(-1, keepdim=True))  # cotangent of S
        # products are those of the forward pass: under autocast in half precision
        kept = kept.to(v.dtype)
        to_grad = kept @ v + attended.to(v.dtype) @ gv
        to_q, to_k, to_v = to_padded = torch.empty_like(padded)
        torch.matmul(kept.transpose(-1, -2), grad, out=to_v)
        to_polynomials: list[Tensor | None] = [None] * len(polynomials)
        needs_geometry = any(ctx.needs_input_grad[6:])
        for l, q_l, k_l, gq_l, gk_l, to_q_l, to_k_l in tiles.segments(q, k, gq, gk, to_q, to_k):
            first, second = T, dS
            if l:
                first, second = T * polynomials[l - 1], dS * polynomials[l - 1]
                if ctx.geometry and grad_polynomials[l - 1] is not None:
                    first = first + dS * grad_polynomials[l - 1]
            first, second = first.to(q.dtype), second.to(q.dtype)
            to_q_l.copy_(first @ k_l + second @ gk_l).mul_(tiles.scale)
            first, second = first.transpose(-1, -2), second.transpose(-1, -2)
            to_k_l.copy_(first @ q_l + second @ gq_l).mul_(tiles.scale)
            if l and needs_geometry:
                product = T * (q_l @ k_l.transpose(-1, -2))
                cross = gq_l @ k_l.transpose(-1, -2) + q_l @ gk_l.transpose(-1, -2)
                total = product.addcmul_(dS, cross).sum(1, keepdim=True)
                to_polynomials[l - 1] = total.mul_(tiles.scale)
        to_bias = T.sum_to_size(bias.shape) if needs_geometry else None
        to_qkv = tiles.unpad_qkv(to_padded)
        return *[None] * 4, tiles.unpad(to_grad), to_qkv, to_bias, *to_polynomials


def _weights(tiles: _Tiles, q: Tensor, k: Tensor, bias: Tensor, polynomials) -> Tensor:
    """softmax(scale sum_l P_l q_l k_l^T + bias), [N, A, K, K], in the bias's precision."""
    logits = bias
    for l, q_l, k_l in tiles.segments(q, k):
        product = (q_l @ k_l.transpose(-1, -2)).to(bias.dtype).mul_(tiles.scale)
        logits = logits + (product.mul_(polynomials[l - 1]) if l else product)
    return logits.softmax(-1)


def _softmax_parts(keep: Tensor | None, weights: Tensor, grad: Tensor, v: Tensor):
    """A with dropout, dA, rowsum(A dA), dS."""
    attended = weights if keep is None else weights * keep
    d_weights = (grad @ v.transpose(-1, -2)).to(weights.dtype)
    if keep is not None:
        d_weights = d_weights * keep
    mean = (weights * d_weights).sum(-1, keepdim=True)
    return attended, d_weights, mean, weights * (d_weights - mean)


def _polynomial_grads(tiles: _Tiles, scaled: Tensor, q: Tensor, k: Tensor, polynomials):
    grads = [torch.zeros_like(p) for p in polynomials]
    for l, q_l, k_l in tiles.segments(q, k):
        if l:
            product = scaled * (q_l @ k_l.transpose(-1, -2))
            grads[l - 1] = product.sum(1, keepdim=True)
    return grads
