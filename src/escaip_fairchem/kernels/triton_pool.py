"""Sums of the edges of each atom in Triton: a program for each atom instead of atomics.

`index_add` makes E H atomic additions on a GPU, in an order that changes from run to run. Edges
are sorted by their atom, so here each sum is one program's, in a fixed order.

Shapes: N atoms, E edges (packed), H channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from escaip_fairchem.kernels.triton_gather_ops import segment_sum


@torch.library.custom_op("escaip_fairchem::pool", mutates_args=())
def pool_op(edge: Tensor, receivers: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    """`edges.sum_edges`."""
    rows = torch.arange(len(edge), device=edge.device)
    ends = torch.cat([starts, starts.new_full((1,), len(edge))])
    return segment_sum(
        edge.contiguous(), rows, ends, torch.promote_types(edge.dtype, torch.float32)
    )


@torch.library.custom_op("escaip_fairchem::spread", mutates_args=())
def spread_op(
    node: Tensor, receivers: Tensor, starts: Tensor, counts: Tensor, dtype: torch.dtype
) -> Tensor:
    """Rows of `node` [N, H] for each of an atom's edges, [E, H]: the transpose of `pool_op`."""
    return node.to(dtype).index_select(0, receivers)


@pool_op.register_fake
def _(edge, _receivers, _starts, counts):
    dtype = torch.promote_types(edge.dtype, torch.float32)
    return edge.new_empty(counts.shape[0], edge.shape[1], dtype=dtype)


@spread_op.register_fake
def _(node, receivers, _starts, _counts, dtype):
    return node.new_empty(receivers.shape[0], node.shape[1], dtype=dtype)


def _save(ctx, inputs, output) -> None:
    values, *index = inputs
    ctx.save_for_backward(*index[:3])
    ctx.dtype = values.dtype


def _differentiate_pool(ctx, grad):
    return spread_op(grad, *ctx.saved_tensors, ctx.dtype), None, None, None


def _differentiate_spread(ctx, grad):
    return pool_op(grad, *ctx.saved_tensors).to(ctx.dtype), None, None, None, None


pool_op.register_autograd(_differentiate_pool, setup_context=_save)
spread_op.register_autograd(_differentiate_spread, setup_context=_save)
