"""PyTorch operators of the fused gather, for autograd and torch.compile.

Forward, its gradient, and the gradient of that (no third). Rows of gradients are summed in
float32 in a fixed order, without atomics: the same input gives the same bits.
Shapes and letters: see `triton_gather`; tables are `distance` [U, H], `source` and `target`
[N, H], `weight` [H] that of the norm; `index` as `edges.edge_index` makes it.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from escaip_fairchem.kernels.triton_gather import (
    backward_kernel,
    double_backward_kernel,
    forward_kernel,
    segment_sum_kernel,
)

# channels of a program, chosen from the registers of compiled code (compute capability 9.0)
_FORWARD, _DERIVATIVES = 2048, 1024

_TABLES = "Tensor? distance, Tensor source, Tensor target, Tensor? weight, Tensor[] index"
_GRADIENTS = "Tensor, Tensor, Tensor, Tensor"


@torch.library.custom_op(
    "escaip_fairchem::gather", mutates_args=(), schema=f"({_TABLES}) -> Tensor"
)
def gather_op(distance, source, target, weight, index):
    """Output, [E, H]."""
    tables = _contiguous(distance, source, target, weight)
    rows, senders, receivers = index[:3]
    out = source.new_empty(len(senders), source.shape[1])
    settings = _settings(distance, source, weight, _FORWARD)
    if len(senders):
        with torch.cuda.device_of(source):
            forward_kernel[(triton.cdiv(len(senders), settings["EDGES"]),)](
                *tables, rows, senders, receivers, out, len(senders), **settings
            )
    return out


@torch.library.custom_op(
    "escaip_fairchem::gather_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_TABLES}) -> ({_GRADIENTS})",
)
def backward_op(grad, distance, source, target, weight, index):
    """Gradients of tables and weight; empty for those that are None."""
    tables = _contiguous(distance, source, target, weight)
    return _derive(backward_kernel, (grad.contiguous(),), (), tables, weight, index, distance)


@torch.library.custom_op(
    "escaip_fairchem::gather_double_backward",
    mutates_args=(),
    schema="(Tensor c_distance, Tensor c_source, Tensor c_target, Tensor c_weight, "
    f"Tensor grad, {_TABLES}) -> (Tensor, {_GRADIENTS})",
)
def double_backward_op(
    c_distance, c_source, c_target, c_weight, grad, distance, source, target, weight, index
):
    """Gradients of <c, backward> with respect to grad, tables and weight."""
    tables = _contiguous(distance, source, target, weight)
    cotangents = _contiguous(c_distance, c_source, c_target, c_weight)
    inputs, d_grad = (grad.contiguous(), *cotangents), grad.new_empty(grad.shape)
    kernel = double_backward_kernel
    return d_grad, *_derive(kernel, inputs, (d_grad,), tables, weight, index, distance)


def _derive(kernel, inputs, outputs, tables, weight, index, distance):
    """Run a kernel of derivatives on every atom; its gradients of tables and weight."""
    _, source, target, _ = tables
    rows, senders, _, starts, counts, row_order, row_ends, sender_order, sender_ends = index
    d_z = source.new_empty(len(senders), source.shape[1])
    d_target = torch.empty_like(target)
    d_weight = source.new_empty((0,) if weight is None else target.shape, dtype=_wide(source))
    if len(counts):
        with torch.cuda.device_of(source):
            kernel[(len(counts),)](
                *tables,
                rows,
                senders,
                starts,
                counts,
                *inputs,
                *outputs,
                d_z,
                d_target,
                d_weight,
                **_settings(distance, source, weight, _DERIVATIVES),
            )
    d_distance = source.new_empty(0)
    if distance is not None:
        d_distance = segment_sum(d_z, row_order, row_ends).to(distance.dtype)
    d_source = segment_sum(d_z, sender_order, sender_ends)
    if weight is not None:
        d_weight = d_weight.sum(0).to(weight.dtype)
    return d_distance, d_source, d_target, d_weight


def segment_sum(
    values: Tensor, order: Tensor, ends: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Sums of values[order[ends[s]:ends[s + 1]]], [S, H], in the type of `values` or `dtype`."""
    size, segments = values.shape[1], len(ends) - 1
    out = values.new_empty(segments, size, dtype=dtype)
    block = min(128, triton.next_power_of_2(size))
    if segments:
        with torch.cuda.device_of(values):
            segment_sum_kernel[segments, triton.cdiv(size, block)](
                values, order, ends, out, SIZE=size, FEW=2, ROWS=16, BLOCK=block, num_warps=1
            )
    return out


def _contiguous(*tables: Tensor | None) -> list[Tensor]:
    """Tables as the kernels read them; one that is None is not read."""
    some = tables[1].contiguous()
    return [some if table is None else table.contiguous() for table in tables]


def _wide(table: Tensor) -> torch.dtype:
    """Type of sums."""
    return torch.float64 if table.dtype == torch.float64 else torch.float32


def _settings(
    distance: Tensor | None, source: Tensor, weight: Tensor | None, elements: int
) -> dict:
    """Constants of a launch; a program takes whole rows, of about `elements` channels in all."""
    size = source.shape[1]
    block = triton.next_power_of_2(size)
    return {
        "SIZE": size,
        "DISTANCE": distance is not None,
        "NORM": weight is not None,
        "EPS": torch.finfo(_wide(source)).eps,
        "EDGES": max(1, elements // block),
        "BLOCK": block,
        "num_warps": 4 if block <= 1024 else 8,
    }


@gather_op.register_fake
def _(_distance, source, _target, _weight, index):
    return source.new_empty(index[1].shape[0], source.shape[1])


def _fake_gradients(distance, source, target, weight):
    return (
        source.new_empty(0) if distance is None else torch.empty_like(distance),
        torch.empty_like(source),
        torch.empty_like(target),
        source.new_empty(0, dtype=_wide(source)) if weight is None else torch.empty_like(weight),
    )


@backward_op.register_fake
def _(_grad, distance, source, target, weight, _index):
    return _fake_gradients(distance, source, target, weight)


@double_backward_op.register_fake
def _(_1, _2, _3, _4, grad, distance, source, target, weight, _index):
    return grad.new_empty(grad.shape), *_fake_gradients(distance, source, target, weight)


def _save(ctx, *inputs) -> None:
    *tensors, index = inputs
    ctx.save_for_backward(*tensors, *index)


def _saved(ctx, count: int):
    """The tensors that `_save` kept, and the index."""
    tensors = ctx.saved_tensors  # once: torch's checkpointing gives them a single time
    return *tensors[:count], list(tensors[count:])


def _present(gradients, distance, weight, index):
    """Gradients in the order of the operators' arguments from `distance` on."""
    d_distance, d_source, d_target, d_weight = gradients
    return (
        None if distance is None else d_distance,
        d_source,
        d_target,
        None if weight is None else d_weight,
        [None] * len(index),
    )


def _differentiate_forward(ctx, grad):
    distance, source, target, weight, index = _saved(ctx, 4)
    gradients = backward_op(grad, distance, source, target, weight, index)
    return _present(gradients, distance, weight, index)


def _differentiate_backward(ctx, *cotangents):
    grad, distance, source, target, weight, index = _saved(ctx, 5)
    inputs = grad, distance, source, target, weight, index
    d_grad, *gradients = double_backward_op(*cotangents, *inputs)
    return d_grad, *_present(gradients, distance, weight, index)


gather_op.register_autograd(
    _differentiate_forward, setup_context=lambda ctx, inputs, output: _save(ctx, *inputs)
)
backward_op.register_autograd(
    _differentiate_backward, setup_context=lambda ctx, inputs, output: _save(ctx, *inputs)
)
