"""``escaip bench graph``: neighbourhoods against the number of atoms, and the built-in's."""

from __future__ import annotations

from functools import partial
from math import ceil
from typing import TYPE_CHECKING

import torch
from fairchem.core.models.escaip.utils.radius_graph import biknn_radius_graph, envelope_fn

from escaip_fairchem.bench.compare import BUILTIN, OURS
from escaip_fairchem.bench.measure import Call, interleaved, refuse_if_different
from escaip_fairchem.bench.pair import batch_of
from escaip_fairchem.bench.report import Row
from escaip_fairchem.bench.structures import solid
from escaip_fairchem.config import EScAIPConfig
from escaip_fairchem.graph import build_graph
from escaip_fairchem.neighbors import Structures

if TYPE_CHECKING:
    from ase import Atoms
    from fairchem.core.datasets.atomic_data import AtomicData

    from escaip_fairchem.bench.report import Report
    from escaip_fairchem.bench.settings import Settings

#: Tensors of one float per pair of atoms and image that the built-in holds at once, about.
BUILTIN_TENSORS = 12


def run(
    settings: Settings,
    report: Report,
    sizes: list[int],
    presets: list[str],
    searches: list[str],
    *,
    perfect: bool,
    limit: float,
) -> None:
    """Time the graph of a crystal of each size.

    Args:
        settings: Repeats, threads, device, neighbors.
        report: Takes the rows.
        sizes: About how many atoms.
        presets: ``v2`` (compared with the built-in), ``paper``.
        searches: What finds the pairs, see `EScAIPConfig.neighbor_search`.
        perfect: Lattice sites, where many neighbours are equally far, instead of rattled ones.
        limit: GiB that the built-in may take.
    """
    for preset in presets:
        for size in sorted(sizes):
            atoms = solid(size, settings.seed, rattle=not perfect)
            batch = batch_of([atoms]).to(settings.torch_device)
            calls = {OURS + f" {s}": _ours(batch, preset, s, settings) for s in searches}
            needed = _builtin_gib(atoms)
            if preset == "v2" and needed <= limit:
                calls = {BUILTIN: _builtin(batch, settings.neighbors)} | calls
                _check(calls, len(atoms))
            elif preset == "v2":
                print(f"built-in: {len(atoms)} atoms would take about {needed:.0f} GiB; left out")
            _measure(calls, settings, report, preset, atoms, perfect)


def _measure(
    calls: dict[str, Call],
    settings: Settings,
    report: Report,
    preset: str,
    atoms: Atoms,
    perfect: bool,
) -> None:
    spreads = interleaved(calls, settings.repeats, settings.torch_device)
    common = settings.columns() | {"config": f"{preset} graph", "kind": "", "domain": "solid"}
    if preset == "v2":
        common["config"] += f" K{settings.neighbors}"
    for name, spread in spreads.items():
        compared = name != BUILTIN and BUILTIN in spreads
        report.add(
            Row(
                model=name,
                quantity=f"{preset} graph, {'perfect' if perfect else 'rattled'}",
                unit="s",
                systems=1,
                atoms=len(atoms),
                min=spread.min,
                median=spread.median,
                max=spread.max,
                repeats=spread.repeats,
                ratio=spreads[BUILTIN].min / spread.min if compared else None,
                common=common,
            )
        )


def _ours(batch: AtomicData, preset: str, search: str, settings: Settings) -> Call:
    keys = {"max_neighbors": settings.neighbors} if preset == "v2" else {}
    config = EScAIPConfig.from_kwargs(preset=preset, neighbor_search=search, **keys)
    structures = Structures(batch.pos, batch.cell, batch.pbc, batch.natoms, batch.batch)
    return Call(lambda: structures, partial(build_graph, config=config))


def _builtin(batch: AtomicData, k: int) -> Call:
    def build(data: AtomicData) -> tuple[torch.Tensor, ...]:
        pad = -(-3 * k // 2)
        return biknn_radius_graph(data, 6.0, k, True, 0.2, 0.1, True, pad, True, batch.pos.device)

    return Call(batch.clone, build)


def _check(calls: dict[str, Call], atoms: int) -> None:
    """Neighbours of each atom and the sum of their weights are those of the built-in."""
    results = {name: call.run(call.prepare()) for name, call in calls.items()}
    environment = results.pop(BUILTIN)[1]
    counts = (environment != torch.inf).sum(1)
    weights = envelope_fn(environment).exp().sum(1)
    for graph in results.values():
        total = weights.new_zeros(atoms).index_add(0, graph.receivers, graph.envelope)
        refuse_if_different(
            {
                "neighbours": float((graph.counts - counts).abs().max()),
                "weights": float((total - weights).abs().max() / weights.max()),
            }
        )


def _builtin_gib(atoms: Atoms) -> float:
    """Its tensors over all pairs of atoms and images within reach."""
    heights = atoms.cell.volume / atoms.cell.areas()
    images = 1
    for height in heights:
        images *= 2 * ceil(6.0 / height) + 1
    return BUILTIN_TENSORS * 4 * len(atoms) ** 2 * images / 2**30
