"""Build what is trained, and take one step: does it learn, what does it cost."""

from __future__ import annotations

import copy
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from fairchem.core.common import distutils
from fairchem.core.units.mlip_unit.mlip_unit import compute_loss
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula

from escaip_fairchem.bench.measure import peak_bytes
from escaip_fairchem.data.energies import use_exact_energy
from escaip_fairchem.graph import build_graph
from escaip_fairchem.neighbors import Structures
from escaip_fairchem.train.counting import loss_weights
from escaip_fairchem.train.runner import instantiate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from escaip_fairchem.check.batches import Batches
    from escaip_fairchem.check.report import Report
    from escaip_fairchem.train.unit import TrainEvalUnit

#: Time that the measured passes may take on a CPU, s.
BUDGET = 12.0
FIRST_ATOMS = 64  # of the first pass on a CPU
LARGER = 1.8  # a second size tells more than this times the first


@dataclass(frozen=True)
class Sample:
    """Forward and backward pass of one batch.

    Attributes:
        atoms: Its atoms.
        edges: Its edges.
        peak: Most bytes held, above weights, gradients and states of the optimizer.
        seconds: By the clock, or those that a CPU worked if they are fewer.
        loss: Of the batch.
    """

    atoms: int
    edges: int
    peak: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class Cost:
    """What a training takes.

    Attributes:
        samples: Measured passes, the smaller first.
        resident: Bytes of weights, their gradients and average, and states of the optimizer.
        states: Of these, the states of the optimizer.
        moving: Most bytes that the optimizer's step holds besides.
        checkpoint: Bytes of a checkpoint.
        flops: Operations of a pass, per atom.
        device: Where it was measured.
    """

    samples: list[Sample]
    resident: int
    states: int
    moving: int
    checkpoint: int
    flops: float
    device: torch.device


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)
def _linear_operations(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    """Operations of oneDNN's products, see `kernels.dense`; torch counts none."""
    return 2 * math.prod(x_shape) * weight_shape[0]


class OperationCounter(TorchDispatchMode):
    """Counts the operations of matrix products, forward and backward.

    torch's `FlopCounterMode` also asks which module they are in, by hooks that the
    recomputation of activations does not allow.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: D105
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


@contextmanager
def one_rank(device_type: str) -> Iterator[torch.device]:
    """A process group of this process alone, which fairchem's training unit needs."""
    cuda = device_type == "cuda" and torch.cuda.is_available()
    distutils.assign_device_for_local_rank(not cuda, 0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield torch.device("cuda" if cuda else "cpu")
    finally:
        dist.destroy_process_group()


def build_unit(config: Any, report: Report) -> TrainEvalUnit:
    """Build model, optimizer and tasks as the training does.

    Args:
        config: The composed recipe.
        report: Takes the number of parameters.
    """
    settings = copy.deepcopy(config.runner.train_eval_unit)
    OmegaConf.set_struct(settings, False)
    settings.job_config.logger = None
    torch.manual_seed(config.job.seed)
    unit = instantiate(settings)
    # the gradients of one rank need no buckets
    unit.model = unit.model.module
    model = unit.model
    parts = {name: _count(part) for name, part in model.backbone.named_children()}
    parts |= {f"head {name}": _count(head) for name, head in model.output_heads.items()}
    total = _count(model)
    report.record("model", parameters=total, parts=parts)
    words = ", ".join(f"{name} {count:,}" for name, count in parts.items() if count)
    report.ok("model", f"{total:,} parameters: {words}")
    return unit


def take_step(unit: TrainEvalUnit, batches: Batches, device: torch.device, report: Report) -> Cost:
    """Train one step, on the smallest batch or, on a CPU, on as much of it as is fast.

    Args:
        unit: From `build_unit`.
        batches: The batches of the training.
        device: Where to.
        report: Takes what the step shows.

    Returns:
        What was measured.
    """
    smallest = int(batches.atoms.argmin())
    most = FIRST_ATOMS if device.type == "cpu" else int(batches.atoms.max())
    batch = batches.first_of(smallest, most)
    unit.prepare([batch])
    unit.load_scheduler(batches.batches_per_epoch)
    unit.model.train()
    trained = {n: p for n, p in unit.model.named_parameters() if p.requires_grad}
    reached: set[str] = set()
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: reached.add(name))
        for name, parameter in trained.items()
    ]
    # as between the steps of several ranks, whose gradients stay where they are
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    with OperationCounter() as counter:
        samples = [_measure(unit, batch, device)]
    atoms = samples[0].atoms
    _judge_loss(unit, batch, samples[0].loss, report)
    _judge_gradients(trained, reached, report)
    larger = _larger(batches, samples[0], device)
    if larger is not None:
        unit.prepare([larger])
        samples.append(_measure(unit, larger, device))
    for hook in hooks:
        hook.remove()
    moving = peak_bytes(lambda: unit._move([batch]), device)
    _judge_weights(unit, report)
    weights = _bytes(unit.model.parameters())
    states = _bytes(
        value
        for state in unit.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    average = _bytes(unit.ema_model.parameters()) if unit.ema_model is not None else 0
    # the optimizer's step allocates its states, which are resident from then on
    moving = max(0, moving - states)
    sizes = ", ".join(f"{sample.atoms} atoms {sample.seconds:.2f} s" for sample in samples)
    whole = "the smallest batch" if atoms == batches.atoms.min() else "part of the smallest batch"
    report.ok(
        "step",
        f"{atoms} atoms ({whole}) forward, backward, optimizer on {device.type}: {sizes}",
    )
    return Cost(
        samples,
        resident=2 * weights + states + average,
        states=states,
        moving=moving,
        # distributed checkpoint and inference checkpoint
        checkpoint=2 * (weights + average) + states,
        flops=counter.total / atoms,
        device=device,
    )


def edges_of(unit: TrainEvalUnit, batch: Any) -> int:
    """Edges of the graph that the model makes of a batch."""
    structures = Structures(
        batch.pos, batch.cell, torch.atleast_2d(batch.pbc).bool(), batch.natoms, batch.batch
    )
    with torch.no_grad():
        return len(build_graph(structures, unit.model.backbone.config).senders)


def _measure(unit: TrainEvalUnit, batch: Any, device: torch.device) -> Sample:
    """Loss, peak memory and time of a pass that adds to gradients that exist."""
    losses = []
    wall, cpu = time.perf_counter(), time.process_time()
    peak = peak_bytes(lambda: losses.append(float(unit._backward([batch.clone()]))), device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    # of a machine that others use too, less than went by
    seconds = min(wall, cpu) if device.type == "cpu" else wall
    return Sample(int(batch.natoms.sum()), edges_of(unit, batch), peak, seconds, losses[0])


def _larger(batches: Batches, first: Sample, device: torch.device) -> Any:
    """The largest batch, or on a CPU as much of it as the time allows; None if no larger."""
    affordable = int(BUDGET * first.atoms / first.seconds) if device.type == "cpu" else 2**62
    batch = batches.first_of(int(batches.atoms.argmax()), min(affordable, 8 * first.atoms))
    fits = first.atoms * LARGER < batch.natoms.sum() <= affordable
    return batch if fits else None


def _judge_loss(unit: TrainEvalUnit, batch: Any, loss: float, report: Report) -> None:
    """Compare the first loss with that of the mean energy and no forces."""
    batch = batch.clone().to(distutils.get_device_for_local_rank())
    batch["atomic_numbers_full"], batch["batch_full"] = batch["atomic_numbers"].long(), batch.batch
    weights = loss_weights(unit._losses, unit.counts(batch), 1)
    nothing = {
        task.name: {task.property: torch.zeros_like(batch[task.name], requires_grad=True)}
        for task in unit._losses
    }
    use_exact_energy(batch)
    losses = compute_loss(unit._losses, nothing, batch).values()
    baseline = sum(float(w * value.detach()) for w, value in zip(weights, losses, strict=True))
    report.record("step", loss=loss, baseline_loss=baseline)
    words = f"loss {loss:.4g}, {baseline:.4g} of element references and zero forces"
    if not math.isfinite(loss):
        report.wrong(
            "step", f"{words}: not finite; look at labels, normalizer and precision (bf16, fp16)"
        )
    elif loss > 100 * baseline > 0:
        report.note("step", f"{words}: far above; are references and scales those of the data?")
    else:
        report.ok("step", words)


def _judge_gradients(
    trained: dict[str, torch.nn.Parameter], reached: set[str], report: Report
) -> None:
    without = [name for name in trained if name not in reached]
    bad = [name for name, parameter in trained.items() if not parameter.grad.isfinite().all()]
    report.record("step", parameters_without_gradient=without)
    if without:
        report.wrong(
            "step",
            f"{_some(without)} get no gradient: several ranks (DDP) stop at the second step; "
            "freeze or remove them",
        )
    if bad:
        report.wrong("step", f"gradients of {_some(bad)} are not finite; lower the loss's weights")
    if not without and not bad:
        report.ok("step", f"all {len(trained)} parameter tensors get a finite gradient")


def _judge_weights(unit: TrainEvalUnit, report: Report) -> None:
    bad = [name for name, p in unit.model.named_parameters() if not p.isfinite().all()]
    if bad:
        report.wrong("step", f"{_some(bad)} are not finite after one step; lower lr")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
