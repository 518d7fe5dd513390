"""The whole of `escaip check`: each check goes on where another found a problem."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from escaip_fairchem.check import data, place
from escaip_fairchem.check.batches import make_batches
from escaip_fairchem.check.devices import Device, find_device
from escaip_fairchem.check.estimate import (
    DOUBT,
    estimate_memory,
    estimate_time,
    plan_of,
)
from escaip_fairchem.check.step import build_unit, one_rank, take_step
from escaip_fairchem.data.limits import compose_recipe
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from escaip_fairchem.check.report import Report


@dataclass(frozen=True)
class Options:
    """What is known of the machine that will train.

    Attributes:
        gpu: A name of `devices.DEVICES`.
        gpu_memory: Its memory, GiB, where it differs from the table.
        atoms_per_second: Of a rank, where it is known.
    """

    gpu: str = "h100"
    gpu_memory: float | None = None
    atoms_per_second: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name in ("gpu_memory", "atoms_per_second"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} {value}: give a number above 0")
        find_device(self.gpu)

    @property
    def device(self) -> Device:
        """The GPU."""
        return find_device(self.gpu)


def check(recipe: Path, overrides: Sequence[str], options: Options, report: Report) -> None:
    """Check a training as far as it goes.

    Args:
        recipe: The recipe.
        overrides: As on fairchem's command line.
        options: What is known of the machine that will train.
        report: Takes the findings.
    """
    config = None
    with report.watch("recipe"):
        config = compose_recipe(recipe, overrides)
        report.ok("recipe", f"{recipe} composes")
    if config is None:
        return
    ranks = 1
    with report.watch("machine"):
        ranks = place.check_machine(config, report)
        place.check_slurm(config, report)
    with report.watch("run"):
        place.check_run(config, report)
    splits = data.open_splits(config, report)
    with report.watch("data"):
        data.check_splits(config, splits, report)
    batches = None
    if "train" in splits:
        with report.watch("batches"):
            batches = make_batches(config, splits["train"], ranks, report)
    with one_rank(str(config.job.device_type)) as device:
        unit = None
        with report.watch("model"):
            unit = build_unit(config, report)
        if unit is None or batches is None:
            return
        cost = None
        with report.watch("step"):
            cost = take_step(unit, batches, device, report)
        if cost is None:
            return
        with report.watch("memory"):
            estimate_memory(cost, unit, batches, _capacity(config, options), report)
    given = options.atoms_per_second
    with report.watch("time"):
        val_atoms = report.values.get("val", {}).get("atoms", 0)
        total = estimate_time(
            config,
            cost,
            batches,
            val_atoms=val_atoms,
            device=options.device,
            given=given,
            report=report,
        )
        doubt = report.values["time"].get("factor_of_doubt", DOUBT)
        place.check_requeues(config, total, doubt, report)
    with report.watch("disk"):
        plan = plan_of(config, batches.steps_per_epoch)
        place.check_disk(config, cost.checkpoint, plan.steps, report)


def _capacity(config: Any, options: Options) -> float:
    """Bytes that a rank has: of its GPU, or its part of the machine's memory."""
    import torch

    if config.job.device_type == "cuda":
        if options.gpu_memory is not None:
            return options.gpu_memory * 2**30
        if torch.cuda.is_available():
            return torch.cuda.get_device_properties(0).total_memory
        return options.device.memory * 2**30
    scheduler = config.job.scheduler
    if scheduler.mode == "slurm" and scheduler.slurm.mem_gb:
        return int(scheduler.slurm.mem_gb) * 2**30 / int(scheduler.ranks_per_node)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory / int(scheduler.ranks_per_node)
