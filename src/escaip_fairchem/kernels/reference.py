"""Attention among the neighbours of each atom: plain PyTorch, differentiable twice.

Shapes: N atoms, K slots (the largest neighbourhood of the batch), E edges in packed order,
A heads, D channels per head. Imports torch only.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from escaip_fairchem.features import legendre


@dataclass
class AttentionGeometry:
    """What attention needs of a batch's geometry, computed once and used by every layer.

    Attributes:
        directions: Unit vectors, zero for an edge without direction, [E, 3].
        log_envelope: Logarithm of each edge's weight, [E].
        starts: First edge of each atom, [N].
        counts: Edges of each atom, [N].
        slots: Position of each edge in the padded [N * K] layout, [E].
        shape: (N, K).
        bias: Added to the logits of a key: log-envelope, -inf in empty slots, [N, 1, 1, K].
        cosines: Cosines between the edges of an atom, [N, 1, K, K]; None if unused.
        polynomials: P_l(cosines) for l = 0..lmax with P_l = 0 where an edge has no
            direction and l > 0, [N, 1, K, K] each; empty if unused.
        rows: Index tensors by number of heads, kept for the next layer.
    """

    directions: Tensor
    log_envelope: Tensor
    starts: Tensor
    counts: Tensor
    slots: Tensor
    shape: tuple[int, int]
    bias: Tensor
    cosines: Tensor | None
    polynomials: list[Tensor]
    rows: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        directions: Tensor,
        log_envelope: Tensor,
        counts: Tensor,
        slots: Tensor,
        num_slots: int,
        *,
        angular: str,
        lmax: int,
    ) -> AttentionGeometry:
        """Pad the edges of each atom and form the angles between them.

        Args:
            directions: Unit vectors, zero for an edge without direction, [E, 3].
            log_envelope: Logarithm of each edge's weight, [E].
            counts: See the class.
            slots: See the class.
            num_slots: K.
            angular: ``none``, ``cosine`` or ``legendre``.
            lmax: Highest degree for ``legendre``.
        """
        n, k = shape = len(counts), num_slots
        bias = log_envelope.new_full((n * k,), -torch.inf).index_copy(0, slots, log_envelope)
        cosines, polynomials = None, []
        if angular != "none":
            padded = directions.new_zeros(n * k, 3).index_copy(0, slots, directions).view(n, k, 3)
            # written out, because a matrix product may run in TF32 or be autocast
            cosines = (padded[:, :, None] * padded[:, None]).sum(-1).unsqueeze(1)
        if angular == "legendre":
            directed = (padded != 0).any(-1)
            both = (directed[:, :, None] & directed[:, None, :]).unsqueeze(1)
            # homogeneous form: P_l(0 vector) is 0 for l > 0, though P_2(cos = 0) is -1/2
            polynomials = [p * both if l else p for l, p in enumerate(legendre(cosines, lmax))]
        starts = counts.cumsum(0) - counts
        edges = directions, log_envelope, starts, counts, slots
        return cls(*edges, shape, bias.view(n, 1, 1, k), cosines, polynomials)

    def chunk(self, atoms: slice, edges: slice) -> AttentionGeometry:
        """The part that belongs to consecutive atoms and their edges."""
        k = self.shape[1]
        return replace(
            self,
            directions=self.directions[edges],
            log_envelope=self.log_envelope[edges],
            starts=self.starts[atoms] - edges.start,
            counts=self.counts[atoms],
            slots=self.slots[edges] - atoms.start * k,
            shape=(atoms.stop - atoms.start, k),
            bias=self.bias[atoms],
            cosines=None if self.cosines is None else self.cosines[atoms],
            polynomials=[polynomial[atoms] for polynomial in self.polynomials],
            rows={},
        )


def neighbor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: AttentionGeometry,
    *,
    scale: float,
    frequencies: tuple[int, ...] = (),
    cosine_scale: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Multi-head self-attention among the edges of each atom.

    logits_ij = scale * sum_l P_l(cos_ij) q_i^(l).k_j^(l) + cosine_scale cos_ij + bias_j,
    where (l) is the l-th segment of channels; without segments P_0 = 1 on all channels.

    Args:
        q: Queries, [E, A, D].
        k: Keys, [E, A, D].
        v: Values, [E, A, D].
        geometry: See `AttentionGeometry`.
        scale: Factor of the dot products.
        frequencies: Channels of each l, summing to D; empty for plain dot products.
        cosine_scale: Learnable factor of the angle bias (preset ``paper``), scalar.
        dropout: Probability of dropping an attention weight.

    Returns:
        [E, A, D].
    """
    n, slots = geometry.shape
    heads, size = q.shape[1:]

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(n * slots, heads, size).index_copy(0, geometry.slots, x)
        return padded.view(n, slots, heads, size).transpose(1, 2)

    q, k, v = pad(q * scale), pad(k), pad(v)
    if frequencies:
        logits = geometry.bias
        segments = zip(
            geometry.polynomials,
            q.split(frequencies, dim=-1),
            k.split(frequencies, dim=-1),
            strict=True,
        )
        for polynomial, q_l, k_l in segments:
            if q_l.shape[-1]:
                logits = logits + polynomial * (q_l @ k_l.transpose(-1, -2))
    else:
        logits = q @ k.transpose(-1, -2) + geometry.bias
    if cosine_scale is not None:
        logits = logits + cosine_scale * geometry.cosines
    weights = F.dropout(logits.softmax(-1), dropout)
    out = (weights @ v).transpose(1, 2).reshape(n * slots, heads, size)
    return out[geometry.slots]
