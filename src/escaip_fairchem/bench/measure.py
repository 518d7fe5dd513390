"""Time, saved bytes and peak memory of a call, and the check that comes before any of them."""

from __future__ import annotations

import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from escaip_fairchem.bench import peer_worker
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

#: Largest difference between two models, relative to the largest value, that counts as equal.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Call:
    """What is measured: `run` on a fresh result of `prepare`, which is not measured."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest of repeated measurements, and how many there were."""

    min: float
    median: float
    max: float
    repeats: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of `values`."""
        return cls(min(values), statistics.median(values), max(values), len(values))


def interleaved(calls: dict[str, Call], repeats: int, device: torch.device) -> dict[str, Spread]:
    """Seconds of each call: all in turn, `repeats` times, after one unmeasured turn.

    On a CPU it is the time that the process spent computing, in all its threads together,
    which other processes do not change; on a GPU it is the time between two events of the
    stream.

    Args:
        calls: Name -> what is measured.
        repeats: Turns.
        device: Where the calls run.

    Returns:
        Name -> seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            argument = call.prepare()
            with kept_attention_switches():
                taken = timed(call.run, argument, device)
            if turn:
                seconds[name].append(taken)
    return {name: Spread.of(values) for name, values in seconds.items()}


def timed(run: Callable[[Any], Any], argument: Any, device: torch.device) -> float:
    """Seconds of one call, as `interleaved` counts them."""
    if device.type != "cuda":
        start = time.process_time()
        run(argument)
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    run(argument)
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def saved_bytes(run: Callable[[], Any], model: torch.nn.Module) -> int:
    """Bytes that autograd keeps for the backward of what `run` returns.

    Counts each storage once, and only those alive at the end; storages of parameters and
    buffers are left out. What a function keeps by other means than saving is not seen.
    """
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in seen:
            # the reference keeps the identity from being used again, not the data
            seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return tensor.detach()  # an output that is saved as it is would keep itself alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    total = sum(size for reference, size in seen.values() if not reference.expired())
    del result
    return total


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that torch's allocator held at once during a call, above those before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return peer_worker.peak_bytes(run)


def differences(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each output, relative to the largest expected value; inf for NaN."""
    if expected.keys() != found.keys():
        raise UserError(f"one model gives {sorted(expected)}, the other {sorted(found)}")
    relative = {}
    for key, value in expected.items():
        exact = value.detach().double()
        error = float((exact - found[key].detach().double()).abs().max() / exact.abs().max())
        relative[key] = error if error == error else float("inf")
    return relative


def refuse_if_different(errors: dict[str, float]) -> None:
    """Raise a UserError if an output differs by more than `TOLERANCE`."""
    for key, error in errors.items():
        if not error <= TOLERANCE:
            raise UserError(
                f"the models differ: {key} by {error:.1e} of the largest value, above "
                f"{TOLERANCE:.0e}; a speed would mean nothing, so none is measured"
            )


@contextmanager
def kept_attention_switches() -> Iterator[None]:
    """Undo what a model does to torch's attention switches, which the built-in turns off."""
    backends = torch.backends.cuda
    names = ("flash", "mem_efficient", "math")
    before = {name: getattr(backends, f"{name}_sdp_enabled")() for name in names}
    try:
        yield
    finally:
        for name, enabled in before.items():
            getattr(backends, f"enable_{name}_sdp")(enabled)


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Run in ``fp32``, ``tf32`` (matrix products) or ``bf16`` (autocast, the rest in TF32)."""
    before = torch.get_float32_matmul_precision()
    # as the recipes train on GPUs: heads, which autocast leaves alone, multiply in TF32
    tf32 = name == "tf32" or (name == "bf16" and device.type == "cuda")
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=name == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
