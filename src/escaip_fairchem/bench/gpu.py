"""``escaip bench gpu``: everything that a GPU shows, in one command."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

import torch

from escaip_fairchem.bench import md, sweep
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from escaip_fairchem.bench.report import Report
    from escaip_fairchem.bench.settings import Settings

#: (hidden, layers) of the models.
SIZES = ((256, 4), (512, 10))

#: Atoms in a batch; the built-in's training step takes tens of MiB for each.
ATOMS = {"forward": 4000, "train": 800, "memory": 800}

#: Atoms of the crystal that dynamics runs on, and steps of each turn.
MD_ATOMS, MD_STEPS = 1000, 50


def run(settings: Settings, report: Report) -> None:
    """Forward, training step, memory and dynamics: sizes x kinds x precisions.

    Args:
        settings: Repeats and seed.
        report: Takes the rows.

    Raises:
        UserError: No GPU.
    """
    if not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device here; the other subcommands run on CPUs")
    kinds, numerics = ("direct", "conservative"), ("bf16", "tf32", "fp32")
    for (hidden, layers), kind, precision in itertools.product(SIZES, kinds, numerics):
        changed = dataclasses.replace(
            settings,
            hidden=hidden,
            layers=layers,
            kind=kind,
            precision=precision,
            device="cuda",
        )
        print(f"H{hidden} L{layers}, {kind}, {precision}")
        _guarded(sweep.one_batch, "forward", changed, report)
        _guarded(sweep.one_batch, "train", changed, report)
        _guarded(sweep.one_batch, "memory", changed, report)
        _guarded(md.run, changed, report, [MD_ATOMS], MD_STEPS)


def _guarded(measure, *arguments) -> None:
    """A measurement that fails is named; the others still run."""
    try:
        measure(*arguments)
    except (UserError, torch.OutOfMemoryError) as error:
        print(f"not measured: {error}")
    torch.cuda.empty_cache()
