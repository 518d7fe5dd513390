"""Sums of the edges of each atom in Triton: a program for each atom instead of atomics.

`index_add` makes E H atomic additions on a GPU, in an order that changes from run to run. Edges
are sorted by their atom, so here each sum is one program's, in a fixed order.

Shapes: N atoms, E edges (packed), H channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def pool_kernel(
    edge, starts, counts, out, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums of rows of `edge` [E, H] by atom, [N, H]; in the type of `out`."""
    ACC: tl.constexpr = out.dtype.element_ty
    atom = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, count = tl.load(starts + atom), tl.load(counts + atom)
    inside = column < SIZE
    total = tl.zeros([ROWS, BLOCK], ACC)
    for first in range(0, count, ROWS):
        slot = first + tl.arange(0, ROWS)
        at = (begin + slot).to(tl.int64)[:, None] * SIZE + column[None, :]
        mask = (slot < count)[:, None] & inside[None, :]
        total += tl.load(edge + at, mask=mask, other=0.0).to(ACC)
    tl.store(out + atom * SIZE + column, tl.sum(total, 0), mask=inside)


@torch.library.custom_op("escaip_fairchem::pool", mutates_args=())
def pool_op(edge: Tensor, receivers: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    """Sums of `edge` [E, H] by atom, [N, H], in float32 (float64 for float64).

    Args:
        edge: Features of edges, [E, H].
        receivers: Atom of each edge, ascending from 0, [E].
        starts: First edge of each atom, [N].
        counts: Edges of each atom, [N].
    """
    out = _sums_like(edge, counts)
    atoms, size = out.shape
    block = min(128, triton.next_power_of_2(size))
    if atoms:
        with torch.cuda.device_of(edge):
            pool_kernel[atoms, triton.cdiv(size, block)](
                edge.contiguous(), starts, counts, out, SIZE=size, ROWS=8, BLOCK=block, num_warps=2
            )
    return out


@torch.library.custom_op("escaip_fairchem::spread", mutates_args=())
def spread_op(
    node: Tensor, receivers: Tensor, starts: Tensor, counts: Tensor, dtype: torch.dtype
) -> Tensor:
    """Rows of `node` [N, H] for each of an atom's edges, [E, H]: the transpose of `pool_op`."""
    return node.to(dtype).index_select(0, receivers)


@pool_op.register_fake
def _(edge, _receivers, _starts, counts):
    return _sums_like(edge, counts)


@spread_op.register_fake
def _(node, receivers, _starts, _counts, dtype):
    return node.new_empty(receivers.shape[0], node.shape[1], dtype=dtype)


def _sums_like(edge: Tensor, counts: Tensor) -> Tensor:
    dtype = torch.promote_types(edge.dtype, torch.float32)
    return edge.new_empty(counts.shape[0], edge.shape[1], dtype=dtype)


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
