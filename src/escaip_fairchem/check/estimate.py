"""Memory, time and disk of a whole training, from what one step took."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from escaip_fairchem.check.report import duration, gib
from escaip_fairchem.check.step import edges_of

if TYPE_CHECKING:
    from escaip_fairchem.check.batches import Batches
    from escaip_fairchem.check.devices import Device
    from escaip_fairchem.check.report import Report
    from escaip_fairchem.check.step import Cost
    from escaip_fairchem.train.unit import TrainEvalUnit

#: Of a process, outside of torch's allocator: libraries; on a GPU context and communication.
PROCESS = 1.0 * 2**30
#: Between what tensors take and what the allocator reserves; also how far the estimate may be off.
MARGIN = 0.15
FORWARD = 1 / 3  # of the time of a training pass
#: What a GPU does of its peak, where nothing was measured on one: the CPU's part of its own, but
#: no more than this, since a GPU waits for memory sooner.
MOST_EFFICIENT = 0.3
DOUBT = 3.0  # factor either way of a time that is not measured on the device itself


@dataclass(frozen=True)
class Plan:
    """How long a training goes on.

    Attributes:
        epochs: Passes over the data.
        steps: Steps of the optimizer.
    """

    epochs: float
    steps: int


def plan_of(config: Any, steps_per_epoch: int) -> Plan:
    """The length of a training.

    Args:
        config: The composed recipe.
        steps_per_epoch: Steps of the optimizer in a pass over the data.
    """
    steps, epochs = config.runner.get("max_steps"), config.runner.get("max_epochs")
    if steps is None:
        steps = math.ceil((epochs or 0) * steps_per_epoch)
    return Plan(steps / steps_per_epoch, steps)


def estimate_memory(
    cost: Cost, unit: TrainEvalUnit, batches: Batches, capacity: float, report: Report
) -> None:
    """Peak memory of the largest batch, against what there is.

    Activations grow with the number of edges: through the two measured sizes goes a line, through
    one a proportion. Precision and recomputation are those of the recipe.

    Args:
        cost: From the measured step.
        unit: What is trained.
        batches: The batches of the training.
        capacity: Bytes of the device, or of this machine for a rank on its CPU.
        report: Takes the estimate.
    """
    edges = edges_of(unit, batches.largest)
    atoms = int(batches.atoms.max())
    activations = activation_bytes(cost, edges)
    needed = cost.resident + max(activations, cost.moving) + PROCESS
    if unit.shard_optimizer and batches.ranks > 1:
        needed -= (1 - 1 / batches.ranks) * cost.states
    sizes = " and ".join(f"{sample.atoms}" for sample in cost.samples)
    report.record(
        "memory",
        largest_batch_atoms=atoms,
        largest_batch_edges=edges,
        activations=int(activations),
        resident=cost.resident,
        needed=int(needed),
        capacity=int(capacity),
    )
    words = (
        f"{gib(needed)} +-{MARGIN:.0%} for the largest batch ({atoms} atoms, {edges:,} edges): "
        f"{gib(cost.resident)} weights, gradients, average, optimizer; {gib(activations)} "
        f"activations, from {sizes} atoms on {cost.device.type}; {gib(PROCESS)} the process"
    )
    if needed * (1 + MARGIN) <= capacity:
        report.ok("memory", f"{words}; there are {gib(capacity)}")
        return
    room = capacity / (1 + MARGIN) - cost.resident - PROCESS
    fitting = int(atoms * room / activations) if activations else 0
    largest = int(batches.natoms.max())
    if fitting >= largest:
        remedy = f"set max_atoms={fitting} (and accumulate for the same step)"
    else:
        remedy = "choose a smaller backbone, bf16=true or backbone.checkpointing=block"
    state = report.wrong if needed > capacity else report.note
    state("memory", f"{words}; there are only {gib(capacity)}: {remedy}")


def activation_bytes(cost: Cost, edges: int) -> float:
    """Peak of a batch of so many edges, above what stays between steps."""
    first, last = cost.samples[0], cost.samples[-1]
    if last.edges <= first.edges:
        return first.peak * edges / first.edges
    slope = (last.peak - first.peak) / (last.edges - first.edges)
    return last.peak + slope * (edges - last.edges)


def estimate_time(
    config: Any,
    cost: Cost,
    batches: Batches,
    *,
    val_atoms: int,
    device: Device,
    given: float | None,
    report: Report,
) -> float:
    """Time of a step, of an epoch, of all; whether the loader keeps up.

    Args:
        config: The composed recipe.
        cost: From the measured step.
        batches: The batches of the training.
        val_atoms: Atoms of the validation set.
        device: The GPU, where the training uses one.
        given: Atoms per second and rank that the user knows, or None.
        report: Takes the estimate.

    Returns:
        Seconds of the whole training.
    """
    rate, doubt, origin = _rate(config, cost, batches, device, given)
    plan = plan_of(config, batches.steps_per_epoch)
    batch_seconds = float(batches.atoms.mean()) / rate
    read_seconds = batches.seconds_per_atom * float(batches.atoms.mean())
    workers = int(config.runner.train_dataloader.num_workers)
    waiting = _loader(batch_seconds, read_seconds, workers, doubt, report)
    step = batches.accumulate * (batch_seconds + waiting)
    every = config.runner.get("evaluate_every_n_steps")
    # after so many steps, and after every epoch and the last step besides
    evaluations = math.ceil(plan.epochs) + (plan.steps // every if every else 0)
    validation = FORWARD * val_atoms / (rate * batches.ranks)
    total = plan.steps * step + evaluations * validation
    report.record(
        "time",
        atoms_per_second_and_rank=rate,
        step_seconds=step,
        epoch_seconds=step * batches.steps_per_epoch,
        validation_seconds=validation,
        evaluations=evaluations,
        total_seconds=total,
        factor_of_doubt=doubt,
        steps=plan.steps,
        epochs=plan.epochs,
    )
    report.ok(
        "time",
        f"{duration(total)} within a factor of {doubt:g} ({total * batches.ranks / 3600:.3g} rank "
        f"hours): {plan.steps:,} steps of {duration(step)}, {plan.epochs:.3g} epochs of "
        f"{duration(step * batches.steps_per_epoch)}, {evaluations} validations of "
        f"{duration(validation)}; {rate:,.0f} atoms/s a rank, {origin}",
    )
    return total


def _rate(
    config: Any, cost: Cost, batches: Batches, device: Device, given: float | None
) -> tuple[float, float, str]:
    """Atoms per second of a rank, the factor it may be off by, and where it is from."""
    if given is not None:
        return given, 1.2, "as given"
    sample = cost.samples[-1]
    measured = sample.atoms / sample.seconds
    cuda = config.job.device_type == "cuda"
    if not cuda:
        # ranks share the cores of a machine
        share = min(batches.ranks, int(config.job.scheduler.ranks_per_node))
        return measured / share, 1.5, f"measured here on {torch.get_num_threads()} threads"
    if cost.device.type == "cuda":
        return measured, 1.5, f"measured here on {torch.cuda.get_device_name()}"
    unit = config.runner.train_eval_unit
    peak = device.peak(tf32=bool(unit.get("tf32")), half=bool(unit.get("bf16") or unit.get("fp16")))
    here = measured * cost.flops
    part = min(MOST_EFFICIENT, here / cpu_peak())
    return (
        peak * part / cost.flops,
        DOUBT,
        f"not measured on a GPU: {cost.flops / 1e9:.2g} GFLOP an atom at {part:.0%} (as on this "
        f"CPU) of {peak / 1e12:.0f} TFLOP/s; --atoms-per-second says better",
    )


def _loader(batch: float, read: float, workers: int, doubt: float, report: Report) -> float:
    """Whether reading keeps up; seconds per batch that a step waits for it."""
    waiting = read if workers == 0 else max(0.0, read / workers - batch)
    needed = math.ceil(read / batch)
    report.record("time", read_seconds=read, workers=workers, workers_needed=needed)
    words = f"a batch is read in {duration(read)}, trained in {duration(batch)}"
    if waiting < 0.1 * batch:
        report.ok("loader", f"{words}; num_workers {workers} keep up")
    else:
        cores = os.cpu_count() or 1
        known = "" if doubt < DOUBT else ", if the time of a step is right"
        report.note(
            "loader",
            f"{words}; num_workers {workers} slow a step by {waiting / batch:.0%}{known}: set "
            f"num_workers={max(1, needed)} (this machine has {cores} cores)",
        )
    return waiting


def cpu_peak(size: int = 1024) -> float:
    """FLOP/s of a float32 matrix product on this machine's threads, the best of five."""
    import time

    matrix = torch.rand(size, size)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
