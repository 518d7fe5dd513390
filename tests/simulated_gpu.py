"""A GPU that is none: tensors that say they are on a device, and are computed on the CPU.

Code takes the branches that it takes away from a CPU, and whatever makes the host wait for a GPU
is seen, with the function that asked for it. It changes what torch knows of devices for the whole
process: call `simulated` in a process of its own.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten
NAME = "simulated"
DEVICE = torch.device("privateuseone", 0)

#: Operators that read numbers of a GPU on the host, in torch's code for it, and how often.
READS = {
    aten._local_scalar_dense.default: 1,  # item, bool, int, float
    aten.nonzero.default: 1,
    aten.masked_select.default: 1,
    aten._unique2.default: 1,
    aten.unique_dim.default: 1,
    aten.unique_consecutive.default: 1,
    aten.bincount.default: 2,
    aten._linalg_check_errors.default: 1,  # of linalg.inv, linalg.solve, ...
    aten.equal.default: 1,
}
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class OnDevice(Tensor):
    """A tensor that is on the device; `host` has its numbers."""

    @staticmethod
    def __new__(cls, host: Tensor) -> Self:
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset()}
        return Tensor._make_wrapper_subclass(
            cls, host.shape, dtype=host.dtype, device=DEVICE, **layout
        )

    def __init__(self, host: Tensor) -> None:
        self.host = host

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return carry_out(func, args, kwargs or {})

    def tolist(self) -> list:
        return self.cpu().tolist()


class Waits(TorchDispatchMode):
    """Counts operators on the device, and by place those that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self.operators = 0

    def __enter__(self):
        # so that torch.tensor(..., device=...) is seen to copy
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = on_device(args, kwargs)
        result = carry_out(func, args, kwargs)
        self.operators += before or on_device(result)
        number = reads(func, args, kwargs) if before else 0
        if func is aten._to_copy.default and not kwargs.get("non_blocking"):
            number += before != on_device(result)
        if number:
            self.places[place()] += number
        return result


def simulated(function: Callable[..., Any], *args: Any) -> tuple[Any, Waits]:
    """What a function returns, and what the host waited for."""
    torch.set_num_threads(1)
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(rename=NAME)
        torch.simulated.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    # with threads the stack would not say who asked
    with torch.autograd.set_multithreading_enabled(False), Waits() as waits:
        result = function(*args)
    return result, waits


def on_device(*values: Any) -> bool:
    return any(isinstance(x, OnDevice) for x in tree_leaves(values))


def reads(func, args, kwargs) -> int:
    """How often the host waits in an operator on tensors of the device."""
    if func in INDEXING:  # by a mask, which is counted first, or by indices from the host
        indices = [index for index in args[1] if index is not None]
        return sum(i.dtype == torch.bool or not isinstance(i, OnDevice) for i in indices)
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    if func is aten.copy_.default:
        return isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice)
    return READS.get(func, 0)


def carry_out(func, args, kwargs):
    """The result of an operator, on the device that it would be on."""
    leaves = tree_leaves((args, kwargs))
    wrapped = {id(x.host): x for x in leaves if isinstance(x, OnDevice)}
    goal = kwargs.get("device")
    to_device = bool(wrapped) if goal is None else torch.device(goal).type == NAME
    if wrapped and func not in (aten.copy_.default, *INDEXING):
        mixed = [x for x in leaves if type(x) is Tensor and x.dim()]
        assert not mixed, f"{func}: tensors on both devices"
    args, kwargs = tree_map_only(OnDevice, lambda x: x.host, (args, kwargs))
    if goal is not None:
        kwargs["device"] = torch.device("cpu")
    result = func(*args, **kwargs)
    if not to_device:
        return result

    def wrap(x: Tensor) -> OnDevice:
        return wrapped[id(x)] if id(x) in wrapped else OnDevice(x)  # given, if changed in place

    return tree_map_only(Tensor, wrap, result)


def place() -> str:
    """The innermost function on the stack of this package or fairchem."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("escaip_fairchem.", "fairchem.")):
            return f"{module.removeprefix('escaip_fairchem.')}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def move(module: nn.Module) -> nn.Module:
    """Put a module's parameters and buffers on the device."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(OnDevice(value.detach().clone()))
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = OnDevice(value.clone())
    return module


def moved(batch):
    """A copy of a batch on the device."""
    batch = batch.clone()
    for key, value in list(batch):
        if isinstance(value, Tensor):
            batch[key] = OnDevice(value)
    return batch
