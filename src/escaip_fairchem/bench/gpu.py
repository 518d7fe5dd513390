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
KINDS = ("direct", "conservative")
PRECISIONS = ("bf16", "tf32", "fp32")

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
    on_gpu = dataclasses.replace(settings, device="cuda")
    for (hidden, layers), kind, precision in itertools.product(SIZES, KINDS, PRECISIONS):
        print(f"H{hidden} L{layers}, {kind}, {precision}")
        model = {"hidden": hidden, "layers": layers, "kind": kind, "precision": precision}
        one_model(dataclasses.replace(on_gpu, **model), report, ATOMS, MD_ATOMS, MD_STEPS)


def one_model(
    settings: Settings, report: Report, atoms: dict[str, int], md_atoms: int, md_steps: int
) -> None:
    """Forward, training step, memory and dynamics of one model.

    Args:
        settings: The model.
        report: Takes the rows.
        atoms: Subcommand -> atoms in its batch.
        md_atoms: Atoms of the crystal that dynamics runs on.
        md_steps: Steps of each turn.
    """
    for command, size in atoms.items():
        sized = dataclasses.replace(settings, atoms=size)
        _guarded(sweep.one_batch, command, sized, report)
    _guarded(md.run, settings, report, [md_atoms], md_steps)


def _guarded(measure, *arguments) -> None:
    """A measurement that fails is named; the others still run."""
    try:
        measure(*arguments)
    except (UserError, torch.OutOfMemoryError) as error:
        print(f"not measured: {error}")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
