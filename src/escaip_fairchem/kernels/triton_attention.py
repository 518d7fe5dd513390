"""Neighbourhood attention as fused Triton kernels, differentiable twice.

Reads packed edges and writes packed edges: no padding, no [N, K, K] arrays, whatever is
differentiated. Needs triton (ImportError without it) and a GPU; on a CPU only triton's
interpreter runs it, if TRITON_INTERPRET=1 was set before the import: for tests.

Shapes: N atoms, K slots (largest neighbourhood), E edges, A heads, D channels per head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from escaip_fairchem.kernels.triton_ops import attention_op

if TYPE_CHECKING:
    from torch import Tensor


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    directions: Tensor,
    log_envelope: Tensor,
    starts: Tensor,
    counts: Tensor,
    *,
    num_slots: int,
    scale: float,
    frequencies: tuple[int, ...] = (),
    cosine_scale: Tensor | None = None,
) -> Tensor:
    """Multi-head self-attention among the edges of each atom, as `neighbor_attention`.

    Products are taken in the type of `q`, `k` and `v`: float32 (TF32 where
    `torch.backends.cuda.matmul` allows it), bfloat16, float16 or float64. Sums, softmax and
    everything geometric are float32, or float64 for float64. No third derivative.

    Args:
        q: Queries, [E, A, D]; any strides of edges and heads, channels best adjacent.
        k: Keys, [E, A, D].
        v: Values, [E, A, D].
        directions: Unit vectors, zero for an edge without direction, [E, 3].
        log_envelope: Logarithm of each edge's weight, [E].
        starts: First edge of each atom, [N].
        counts: Edges of each atom, 1 to `num_slots`, [N]; not checked, to spare the wait.
        num_slots: K.
        scale: Factor of the dot products.
        frequencies: Channels of each l, summing to D; empty for plain dot products.
        cosine_scale: Learnable factor of the cosines in the logits, scalar.

    Returns:
        [E, A, D].
    """
    geometry = directions, log_envelope, cosine_scale, starts, counts
    return attention_op([q, k, v], *geometry, num_slots, scale, frequencies or q.shape[-1:])


def triton_attention_packed(
    qkv: Tensor,
    directions: Tensor,
    log_envelope: Tensor,
    starts: Tensor,
    counts: Tensor,
    *,
    num_slots: int,
    scale: float,
    frequencies: tuple[int, ...] = (),
    cosine_scale: Tensor | None = None,
) -> Tensor:
    """`triton_attention` of `qkv` [E, 3, A, D], whose gradient is born in that layout.

    Gradients of three views of one tensor must be copied together; this saves the copy.
    """
    geometry = directions, log_envelope, cosine_scale, starts, counts
    return attention_op([qkv], *geometry, num_slots, scale, frequencies or qkv.shape[-1:])
