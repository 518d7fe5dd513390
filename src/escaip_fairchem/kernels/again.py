"""Functions whose derivatives start from their inputs, and what a backward pass asks for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

if TYPE_CHECKING:
    from collections.abc import Callable


def recomputed(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """``function(*inputs)`` that keeps its inputs only, for derivatives of any order.

    `torch.utils.checkpoint` does the same for the first derivative; where that one is
    differentiated again, it keeps all that the function computes. Here the first derivative is
    such a function itself.

    Args:
        function: Deterministic. Everything that needs a gradient must come in by `inputs`, or be
            one of them (a module's parameter).
        *inputs: Tensors.

    Returns:
        The outputs, each of which depends on an input that needs a gradient.
    """
    return _Recomputed.apply(function, *inputs)


class _Recomputed(Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        wanted = [index for index in range(len(ctx.saved_tensors)) if asked_for(ctx, index, 1)]
        derivative = _Derivative(ctx.function, len(grads), wanted)
        run = _Recomputed.apply if torch.is_grad_enabled() else _call
        found = dict(zip(wanted, run(derivative, *grads, *ctx.saved_tensors), strict=True))
        return None, *(found.get(index) for index in range(len(ctx.saved_tensors)))


def recomputed_tree(function: Callable[[Any], Any], arguments: Any, *parameters: Tensor) -> Any:
    """`recomputed` for arguments and outputs that are nested in dataclasses, tuples and lists.

    Args:
        function: Of `arguments`; it may use `parameters` besides.
        arguments: Tensors in it that need a gradient are handed over; the rest stays.
        *parameters: Leaves that the function uses.

    Returns:
        ``function(arguments)``, in float32 or autocast as of this call also when repeated.
    """
    tensors: list[Tensor] = []
    _map(arguments, _needs_gradient, tensors.append)
    device = (tensors or parameters)[0].device.type
    autocast = {"enabled": torch.is_autocast_enabled(device)}
    autocast["dtype"] = torch.get_autocast_dtype(device)
    places: list[Any] = [None]

    def flat(*given: Tensor) -> tuple[Tensor, ...]:
        left, outputs = iter(given), []

        def place(output: Tensor) -> _Place:
            outputs.append(output)
            return _Place()

        # without its cache: weights that were cast without a gradient would be taken again
        with torch.autocast(device, cache_enabled=False, **autocast):
            result = function(_map(arguments, _needs_gradient, lambda _: next(left)))
        places[0] = _map(result, torch.is_tensor, place)
        return tuple(outputs)

    outputs = iter(recomputed(flat, *tensors, *parameters))
    return _map(places[0], lambda leaf: isinstance(leaf, _Place), lambda _: next(outputs))


class _Place:
    """Where an output belongs."""


def _needs_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _map(tree: Any, matches: Callable[[Any], bool], function: Callable[[Any], Any]) -> Any:
    """`tree` with the function's values in place of the leaves that match."""
    if matches(tree):
        return function(tree)
    if isinstance(tree, list | tuple):
        return type(tree)(_map(part, matches, function) for part in tree)
    if dataclasses.is_dataclass(tree):
        values = ((field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree))
        return dataclasses.replace(tree, **{n: _map(v, matches, function) for n, v in values})
    return tree


def _call(function, *inputs):
    return function(*inputs)


class _Derivative:
    """Cotangents of a function's outputs and its inputs -> gradients of the `wanted` inputs."""

    def __init__(self, function: Callable, num_grads: int, wanted: list[int]) -> None:
        self.function, self.num_grads, self.wanted = function, num_grads, wanted

    def __call__(self, *args: Tensor) -> tuple[Tensor, ...]:
        grads, inputs = args[: self.num_grads], list(args[self.num_grads :])
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            if not again:
                for index in self.wanted:
                    # a leaf stays itself: the function may use a parameter of its own accord
                    if not inputs[index].is_leaf:
                        inputs[index] = inputs[index].detach().requires_grad_()
            outputs = self.function(*inputs)
            return torch.autograd.grad(
                outputs,
                [inputs[index] for index in self.wanted],
                grads,
                create_graph=again,
                materialize_grads=True,
            )


def asked_for(ctx, index: int, others: int = 0) -> bool:
    """Whether this backward pass wants the gradient of an input.

    ``ctx.needs_input_grad`` says whether the input needs one at all: weights do, also while
    forces are derived from an energy, where their gradients would be thrown away.

    Args:
        ctx: Of an `autograd.Function` or a custom operator.
        index: Of the input among its tensors, without those that are None.
        others: Arguments before them that are no tensors.
    """
    if not ctx.needs_input_grad[index + others]:
        return False
    node = ctx.next_functions[index][0]
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that `torch.autograd.grad` was asked for
        return True
