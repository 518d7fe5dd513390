"""``escaip bench forward|train|memory``: one batch, a file, batch sizes, or system sizes."""

from __future__ import annotations

import dataclasses
import itertools
import os
from typing import TYPE_CHECKING

import torch

from escaip_fairchem.bench.compare import BUILTIN, OURS, Comparison
from escaip_fairchem.bench.structures import batch_by_atoms, batch_by_systems, slab, solid
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from ase import Atoms

    from escaip_fairchem.bench.report import Report
    from escaip_fairchem.bench.settings import Settings

#: Command -> what is measured of one batch, and in a sweep.
OF_ONE = {
    "forward": ("forward",),
    "train": ("train",),
    "memory": ("peak of inference", "saved for backward", "peak of training"),
}
OF_SWEEP = {
    "forward": ("forward", "peak of inference"),
    "train": ("train", "peak of training"),
    "memory": OF_ONE["memory"],
}

#: Random batches of each batch size, as in the paper's Figure 5.
BATCHES = 16


def one_batch(command: str, settings: Settings, report: Report) -> None:
    """One batch of about ``settings.atoms`` atoms."""
    batch = batch_by_atoms(settings.domain, settings.atoms, settings.seed)
    comparison = Comparison(settings)
    try:
        rows = comparison.rows(OF_ONE[command], batch)
    except torch.OutOfMemoryError:
        print(f"{BUILTIN}: out of memory; {OURS} alone is measured")
        rows = comparison.rows(OF_ONE[command], batch, (OURS,))
    for row in rows:
        report.add(row)


def each(command: str, settings: Settings, report: Report, structures: list[Atoms]) -> None:
    """Every structure by itself; those where the models differ are named and not measured.

    The built-in reads no `pbc`: either all structures are molecules, or all are periodic.
    """
    periodic = any(atoms.pbc.any() for atoms in structures)
    settings = dataclasses.replace(settings, domain="file" if periodic else "molecules")
    comparison = Comparison(settings)
    for index, atoms in enumerate(structures):
        try:
            rows = comparison.rows(OF_ONE[command], [atoms])
        except UserError as error:
            print(f"structure {index}, {atoms.get_chemical_formula()}: {error}")
            continue
        for row in rows:
            report.add(row)
    if not report.rows:
        raise UserError("the models differ on every structure; nothing was measured")
    ratios = sorted(row.ratio for row in report.rows if row.ratio is not None)
    print(f"ratio: smallest {ratios[0]:.2f}x, median {ratios[len(ratios) // 2]:.2f}x")


def as_shipped(command: str, settings: Settings, report: Report) -> None:
    """One 66-atom slab; the built-in pads it to 300 atoms, as its shipped recipes do."""
    atoms = next(made for made in map(slab, itertools.count()) if len(made) == 66)
    settings = dataclasses.replace(settings, domain="slabs")
    comparison = Comparison(settings, note=", built-in padded to 300 atoms", use_padding=True)
    for row in comparison.rows(OF_ONE[command], [atoms]):
        report.add(row)


def batch_sizes(
    command: str, settings: Settings, report: Report, sizes: list[int], batches: int
) -> None:
    """Random batches of each number of structures, the same ones for both models."""
    comparison = Comparison(settings)
    for size in sizes:
        for seed in range(settings.seed, settings.seed + batches):
            batch = batch_by_systems(settings.domain, size, seed)
            for row in comparison.rows(OF_SWEEP[command], batch):
                report.add(row)


def system_sizes(
    command: str,
    settings: Settings,
    report: Report,
    sizes: list[int],
    limit: float | None,
    names: tuple[str, ...] = (BUILTIN, OURS),
) -> None:
    """One doped crystal of each size; a model stops before the size that would not fit.

    Args:
        command: ``forward``, ``train`` or ``memory``.
        settings: The domain is not read: all sizes are crystals.
        report: Takes the rows.
        sizes: About how many atoms, ascending.
        limit: GiB that a call may take; 70 % of what is free by default.
        names: The models.
    """
    settings = dataclasses.replace(settings, domain="solid")
    comparison = Comparison(settings)
    allowed = limit * 2**10 if limit else 0.7 * _free_mib(comparison.device)
    history: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
    for size in sorted(sizes):
        atoms = solid(size, settings.seed)
        for name in list(history):
            needed = expected_memory(history[name], len(atoms))
            if needed > allowed:
                print(f"{name} stops: {len(atoms)} atoms would take about {needed / 2**10:.0f} GiB")
                del history[name]
        if not history:
            return
        quantities = OF_SWEEP[command]
        try:
            rows = comparison.rows(quantities, [atoms], tuple(history))
        except torch.OutOfMemoryError:
            print(f"{', '.join(history)}: out of memory at {len(atoms)} atoms")
            if history.pop(BUILTIN, None) is None:
                return
            rows = comparison.rows(quantities, [atoms], (OURS,))
        for row in rows:
            report.add(row)
        for name, past in history.items():
            past.append(
                (len(atoms), max(r.max for r in rows if r.unit == "MiB" and r.model == name))
            )


def expected_memory(history: list[tuple[int, float]], atoms: int) -> float:
    """Memory at `atoms` by a n + b n^2 through the last two of (atoms, memory); 0 if unknown."""
    if not history:
        return 0.0
    (last, memory), linear = history[-1], history[-1][1] / history[-1][0]
    square = 0.0
    if len(history) > 1:
        before, smaller = history[-2]
        square = max(0.0, (linear - smaller / before) / (last - before))
        linear = memory / last - square * last
    return linear * atoms + square * atoms**2


def _free_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**20
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
