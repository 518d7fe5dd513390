"""``escaip bench gpu``: everything that a GPU shows, in one command."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

import torch

from escaip_fairchem.bench import md, stages, sweep
from escaip_fairchem.bench.compare import OURS
from escaip_fairchem.bench.headlines import headlines
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from escaip_fairchem.bench.report import Report
    from escaip_fairchem.bench.settings import Settings

#: (hidden, layers) of the models.
SIZES = ((256, 4), (512, 10))
KINDS = ("direct", "conservative")
PRECISIONS = ("bf16", "tf32", "fp32")

#: The forms of ours.
FORMS = (
    {"kernels": "torch"},
    {"kernels": "triton"},
    {"kernels": "triton", "compile": True},
)

#: Atoms in a batch; the built-in's training step takes tens of MiB for each.
ATOMS = {"forward": 4000, "train": 800, "memory": 800}

#: Atoms of the crystal that dynamics runs on, and steps of each turn.
MD_ATOMS, MD_STEPS = 1000, 50

#: Atoms of one system whose energy and forces are computed in one call, a group at a time.
LADDER, CHUNK = [10_000, 100_000, 1_000_000], 20_000


def run(settings: Settings, report: Report) -> None:
    """Speed and memory of every model in every form, a million atoms, and stage by stage.

    Args:
        settings: Repeats and seed.
        report: Takes the rows.

    Raises:
        UserError: No GPU.
    """
    if not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device here; the other subcommands run on CPUs")
    on_gpu = dataclasses.replace(settings, device="cuda")
    large_system(on_gpu, report, LADDER, CHUNK)
    for hidden, layers in SIZES:
        model = {"hidden": hidden, "layers": layers, "precision": "bf16", "atoms": ATOMS["forward"]}
        for kernels in ("torch", "triton"):
            sized = dataclasses.replace(on_gpu, kernels=kernels, **model)
            _guarded(f"stages, {kernels}", stages.run, sized, report)
    for (hidden, layers), kind, precision in itertools.product(SIZES, KINDS, PRECISIONS):
        print(f"H{hidden} L{layers}, {kind}, {precision}")
        model = {"hidden": hidden, "layers": layers, "kind": kind, "precision": precision}
        every_form(dataclasses.replace(on_gpu, **model), report, ATOMS, MD_ATOMS, MD_STEPS)
    for line in headlines(report.rows, MD_ATOMS):
        print(line)


def every_form(
    settings: Settings, report: Report, atoms: dict[str, int], md_atoms: int, md_steps: int
) -> None:
    """`one_model` in every form of ours."""
    for form in FORMS:
        print(", ".join(f"{key} {value}".lower() for key, value in form.items()))
        one_model(dataclasses.replace(settings, **form), report, atoms, md_atoms, md_steps)


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
        _guarded(command, sweep.one_batch, command, sized, report)
    _guarded("md", md.run, settings, report, [md_atoms], md_steps)


def large_system(
    settings: Settings, report: Report, sizes: list[int], chunk: int, limit: float | None = None
) -> None:
    """Energy and forces of a crystal in one call, and the peak of its memory.

    Stops before a size that would not fit, by the growth of the last two.

    Args:
        settings: Repeats and device.
        report: Takes the rows.
        sizes: About how many atoms, ascending.
        chunk: Atoms that blocks work on at a time.
        limit: As of `sweep.system_sizes`.
    """
    for kernels in ("torch", "triton"):
        form = {"kind": "direct", "precision": "bf16", "inference_chunk": chunk, "kernels": kernels}
        sized = dataclasses.replace(settings, **form)
        arguments = "forward", sized, report, sizes, limit, (OURS,)
        _guarded(f"large system, {kernels}", sweep.system_sizes, *arguments)


def _guarded(name: str, measure: Callable[..., None], *arguments) -> None:
    """A measurement that fails is named; the others still run."""
    try:
        measure(*arguments)
    except Exception as error:  # whatever a kernel or a compiler raises
        reason = (str(error).strip().splitlines() or [""])[0]
        print(f"{name}, not measured: {type(error).__name__}: {reason}")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
