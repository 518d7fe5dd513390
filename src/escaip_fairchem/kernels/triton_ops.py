"""PyTorch operators of the Triton neighbourhood attention, for autograd and torch.compile.

Forward, its gradient, and the gradient of that. `torch.compile` does not look into them, only
at the shapes that the fake implementations give.
Shapes: see `triton_attention`; `qkv` is a list of q, k and v, or of one packed tensor.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from escaip_fairchem.kernels.triton_double_backward import double_backward_kernel
from escaip_fairchem.kernels.triton_kernels import backward_kernel, forward_kernel
from escaip_fairchem.kernels.triton_tiles import precision

_INPUTS = (
    "Tensor[] qkv, Tensor directions, Tensor log_envelope, Tensor? cosine_scale, "
    "Tensor starts, Tensor counts, SymInt num_slots, float scale, int[] frequencies"
)


@torch.library.custom_op(
    "escaip_fairchem::attention", mutates_args=(), schema=f"({_INPUTS}) -> Tensor"
)
def attention_op(
    qkv, directions, log_envelope, cosine_scale, starts, counts, num_slots, scale, frequencies
):
    """Attention, [E, A, D]."""
    tensors = _adjacent(_parts(qkv))
    out = tensors[0].new_empty(tensors[0].shape)
    geometry = directions, log_envelope, cosine_scale, starts, counts
    _launch(
        forward_kernel, tensors, geometry, (out,), num_slots, SCALE=scale, frequencies=frequencies
    )
    return out


@torch.library.custom_op(
    "escaip_fairchem::attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, {_INPUTS}, bool geometry) -> (Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(
    grad_out,
    qkv,
    directions,
    log_envelope,
    cosine_scale,
    starts,
    counts,
    num_slots,
    scale,
    frequencies,
    geometry,
):
    """Gradients of qkv [E, 3, A, D], directions, log-envelope and cosine scale.

    Those of directions and log-envelope are empty without `geometry`.
    """
    tensors = _adjacent([*_parts(qkv), grad_out])
    d_qkv, *shares = _outputs(tensors[0], counts, geometry)
    inputs = directions, log_envelope, cosine_scale, starts, counts
    _launch(
        backward_kernel,
        tensors,
        inputs,
        (d_qkv, *shares),
        num_slots,
        SCALE=scale,
        frequencies=frequencies,
        GEOMETRY=geometry,
    )
    return d_qkv, *_sum_heads(*shares, directions, log_envelope, cosine_scale, geometry)


@torch.library.custom_op(
    "escaip_fairchem::attention_double_backward",
    mutates_args=(),
    schema="(Tensor g_qkv, Tensor g_directions, Tensor g_log_envelope, Tensor g_cosine, "
    f"Tensor grad_out, {_INPUTS}, bool geometry) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def double_backward_op(
    g_qkv,
    g_directions,
    g_log_envelope,
    g_cosine,
    grad_out,
    qkv,
    directions,
    log_envelope,
    cosine_scale,
    starts,
    counts,
    num_slots,
    scale,
    frequencies,
    geometry,
):
    """Gradients of <g, backward> with respect to grad_out, and what `backward_op` returns."""
    tensors = _adjacent([*_parts(qkv), grad_out])
    d_qkv, *shares = _outputs(tensors[0], counts, geometry)
    d_grad_out = grad_out.new_empty(grad_out.shape)
    cotangents = [g.contiguous() for g in (g_qkv, g_directions, g_log_envelope, g_cosine)]
    inputs = directions, log_envelope, cosine_scale, starts, counts
    _launch(
        double_backward_kernel,
        tensors,
        inputs,
        (*cotangents, d_grad_out, d_qkv, *shares),
        num_slots,
        SCALE=scale,
        frequencies=frequencies,
        GEOMETRY=geometry,
    )
    geometric = _sum_heads(*shares, directions, log_envelope, cosine_scale, geometry)
    return d_grad_out, d_qkv, *geometric


def _parts(qkv: list[Tensor]) -> list[Tensor]:
    """Queries, keys and values, of three tensors or one packed tensor."""
    return list(qkv[0].unbind(1)) if len(qkv) == 1 else list(qkv)


def _adjacent(tensors: list[Tensor]) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _outputs(q: Tensor, counts: Tensor, geometry: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of qkv, and each head's share of those of geometry and of the cosine scale.

    The shares are summed afterwards, not by atomics: the same input gives the same bits.
    """
    edges, heads, size = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    d_qkv = q.new_empty(edges, 3, heads, size)
    d_geometry = q.new_empty(edges if geometry else 0, heads, 4, dtype=wide)
    return d_qkv, d_geometry, q.new_empty(len(counts), heads, dtype=wide)


def _sum_heads(d_geometry, d_cosine, directions, log_envelope, cosine_scale, geometry):
    d_directions, d_envelope = directions.new_empty(0), log_envelope.new_empty(0)
    if geometry:
        d_directions = d_geometry[..., :3].sum(1).to(directions.dtype)
        d_envelope = d_geometry[..., 3].sum(1).to(log_envelope.dtype)
    if cosine_scale is None:
        return d_directions, d_envelope, d_cosine.new_empty(0)
    return d_directions, d_envelope, d_cosine.sum().to(cosine_scale.dtype)


def _launch(kernel, tensors, geometry, others, num_slots, frequencies, **constants) -> None:
    """Run a kernel on every atom and head."""
    directions, log_envelope, cosine_scale, starts, counts = geometry
    heads, size = tensors[0].shape[1:]
    if not len(counts):
        return
    segments, first = [], 0
    for width in frequencies:
        segments.append((first, width, _block(width)))
        first += width
    slots = _block(num_slots)
    tensor_cores = tensors[0].element_size() == 2 or precision() == "tf32"
    with torch.cuda.device_of(tensors[0]):
        kernel[(len(counts) * heads,)](
            *tensors,
            *(x.stride(0) for x in tensors),
            *(x.stride(1) for x in tensors),
            directions.contiguous(),
            log_envelope.contiguous(),
            directions if cosine_scale is None else cosine_scale,
            starts.contiguous(),
            counts.contiguous(),
            *others,
            HEADS=heads,
            SIZE=size,
            SIZE_BLOCK=_block(size),
            SEGMENTS=tuple(segments),
            SLOTS=slots,
            COSINE=cosine_scale is not None,
            PRECISION=precision(),
            num_warps=_num_warps(slots, tensor_cores),
            **constants,
        )


def _block(size: int) -> int:
    """Least power of two that a matrix product takes."""
    return max(16, triton.next_power_of_2(size))


def _num_warps(slots: int, tensor_cores: bool) -> int:
    """Warps of a program, chosen from compiled code (compute capability 9.0), not timed.

    On tensor cores a warp takes 16 queries, and more warps would repeat each other's work.
    Full float32 is shared among any number of warps; with few, it overflows the registers.
    """
    return min(8, slots // 16) if tensor_cores else min(16, slots // 4)


@attention_op.register_fake
def _(qkv, *_args):
    q = _parts(qkv)[0]
    return q.new_empty(q.shape)


def _fake_gradients(qkv, directions, log_envelope, cosine_scale, geometry):
    q = _parts(qkv)[0]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        q.new_empty(q.shape[0], 3, *q.shape[1:]),
        directions.new_empty(directions.shape if geometry else 0),
        log_envelope.new_empty(log_envelope.shape if geometry else 0),
        q.new_empty(0, dtype=wide) if cosine_scale is None else torch.empty_like(cosine_scale),
    )


@backward_op.register_fake
def _(_grad_out, qkv, directions, log_envelope, cosine_scale, *args):
    return _fake_gradients(qkv, directions, log_envelope, cosine_scale, args[-1])


@double_backward_op.register_fake
def _(_1, _2, _3, _4, grad_out, qkv, directions, log_envelope, cosine_scale, *args):
    gradients = _fake_gradients(qkv, directions, log_envelope, cosine_scale, args[-1])
    return grad_out.new_empty(grad_out.shape), *gradients


def _save(ctx, first: tuple[Tensor, ...], qkv, inputs) -> None:
    """Keep the arguments of an operator that begin with `qkv`, and `first` before them."""
    *tensors, cosine_scale, starts, counts, num_slots, scale, frequencies = inputs
    ctx.save_for_backward(*first, *qkv, *tensors, starts, counts, cosine_scale)
    ctx.num_qkv = len(qkv)
    ctx.rest = num_slots, scale, list(frequencies)


def _saved(ctx, num_first: int):
    """What `_save` kept: `first`, and the arguments from `qkv` on."""
    tensors, end = ctx.saved_tensors, num_first + ctx.num_qkv
    directions, log_envelope, starts, counts, cosine_scale = tensors[end:]
    inputs = directions, log_envelope, cosine_scale, starts, counts, *ctx.rest
    return tensors[:num_first], (list(tensors[num_first:end]), *inputs)


def _setup_forward(ctx, inputs, output) -> None:
    _save(ctx, (), inputs[0], inputs[1:])


def _setup_backward(ctx, inputs, output) -> None:
    _save(ctx, inputs[:1], inputs[1], inputs[2:-1])
    ctx.geometry = inputs[-1]


def _gradients(ctx, d_qkv, d_directions, d_envelope, d_cosine, inputs, geometry):
    """Gradients in the order of the operators' arguments from `qkv` on."""
    cosine_scale = inputs[3]
    return (
        [d_qkv] if ctx.num_qkv == 1 else list(d_qkv.unbind(1)),
        d_directions if geometry else None,
        d_envelope if geometry else None,
        None if cosine_scale is None else d_cosine,
        *(None,) * 5,
    )


def _differentiate_forward(ctx, grad_out):
    _, inputs = _saved(ctx, 0)
    # a model that predicts forces directly spares the gradients of its geometry
    geometry = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    return _gradients(ctx, *backward_op(grad_out, *inputs, geometry), inputs, geometry)


def _differentiate_backward(ctx, *cotangents):
    (grad_out,), inputs = _saved(ctx, 1)
    d_grad_out, *gradients = double_backward_op(*cotangents, grad_out, *inputs, ctx.geometry)
    return d_grad_out, *_gradients(ctx, *gradients, inputs, ctx.geometry), None


attention_op.register_autograd(_differentiate_forward, setup_context=_setup_forward)
backward_op.register_autograd(_differentiate_backward, setup_context=_setup_backward)
