"""Where the time of a direct model's forward goes, stage by stage, and the least it could take.

Shapes: N atoms, E edges, U distinct lengths, H hidden, L blocks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from escaip_fairchem.bench.measure import Spread, precision
from escaip_fairchem.bench.pair import batch_of, own_model
from escaip_fairchem.bench.report import Row
from escaip_fairchem.bench.structures import batch_by_atoms
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from escaip_fairchem.backbone import EScAIPBackbone
    from escaip_fairchem.bench.report import Report
    from escaip_fairchem.bench.settings import Settings
    from escaip_fairchem.graph import NeighborGraph
    from escaip_fairchem.model import EScAIP

#: Sides of the matrices and MiB of the copy that say what the device can do.
SIDE, COPIED = {"cuda": 8192, "cpu": 256}, {"cuda": 1024, "cpu": 16}

STAGES = (
    "graph",
    "features",
    "input block",
    "attention GEMMs",
    "attention",
    "FFN",
    "readouts",
    "heads",
)


def run(settings: Settings, report: Report) -> None:
    """A row of each stage's milliseconds, and one of the fraction of the floor it reaches.

    Args:
        settings: A direct model; `compile` is not read, because compiled stages are not separate.
        report: Takes the rows.

    Raises:
        UserError: The model is not direct.
    """
    if not settings.direct:
        raise UserError("stages are measured of --kind direct")
    torch.manual_seed(0)
    with settings.chosen_kernels():
        model = own_model(settings.config() | settings.own_keys() | {"compile": False})
    device = settings.torch_device
    model = model.to(device).eval().requires_grad_(False)
    structures = batch_by_atoms(settings.domain, settings.atoms, settings.seed)
    batch = batch_of(structures).to(device)
    watch, turns = Stopwatch(device), []
    with precision(settings.precision, device), torch.no_grad(), watching(model, watch):
        for _ in range(settings.repeats + 1):
            model(batch.clone())
            turns.append(watch.seconds())
        graph = model.backbone(batch.clone())["graph"]
        operations, bandwidth = measured_limits(device)
    size = torch.finfo(torch.bfloat16 if settings.precision == "bf16" else torch.float32).bits // 8
    needs = work(model.backbone, graph, size)
    for stage in STAGES:
        spread = Spread.of([1e3 * turn[stage] for turn in turns[1:]])
        need = needs[stage]
        floor = 1e3 * max(need.operations / operations, need.bytes / bandwidth)
        reached = Spread(floor / spread.max, floor / spread.median, floor / spread.min, 1)
        for quantity, unit, values in (
            (f"stage {stage}", "ms", spread),
            (f"stage {stage}, of its floor", "1", reached),
        ):
            report.add(
                Row(
                    model="ours",
                    quantity=quantity,
                    unit=unit,
                    systems=len(structures),
                    atoms=sum(map(len, structures)),
                    min=values.min,
                    median=values.median,
                    max=values.max,
                    repeats=spread.repeats,
                    common=settings.columns(),
                )
            )
    print(f"limits: {operations / 1e12:.3g} TFLOP/s, {bandwidth / 1e12:.3g} TB/s, measured")


class Stopwatch:
    """Time of named calls, without that of named calls inside of them.

    Args:
        device: On a GPU time is taken by events of its stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: list[tuple[str, Any, Any, int | None]] = []
        self._open: list[int] = []

    def timed(self, stage: str, function: Callable) -> Callable:
        """`function`, with its calls timed."""

        def call(*arguments: Any, **options: Any) -> Any:
            index, outer = len(self._spans), self._open[-1] if self._open else None
            self._spans.append((stage, self._now(), None, outer))
            self._open.append(index)
            try:
                return function(*arguments, **options)
            finally:
                self._open.pop()
                stage_, begin, _, outer = self._spans[index]
                self._spans[index] = stage_, begin, self._now(), outer

        return call

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage since the last time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        total = dict.fromkeys(STAGES, 0.0)
        for stage, begin, end, outer in self._spans:
            taken = begin.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - begin
            total[stage] += taken
            if outer is not None:
                total[self._spans[outer][0]] -= taken
        self._spans.clear()
        return total

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def watching(model: EScAIP, watch: Stopwatch) -> mock._patch:
    """Time the stages of a model; it stays changed, the search for neighbours does not."""
    backbone = model.backbone
    parts = [("features", backbone, "_features")]
    parts += [("input block", backbone.input_block, n) for n in ("prepare", "forward")]
    for block in backbone.blocks:
        parts += [("attention GEMMs", block.attention, n) for n in ("prepare", "forward")]
        parts += [("attention", block.attention, "attend"), ("FFN", block.node_ffn, "forward")]
        if block.edge_used:
            parts.append(("FFN", block.edge_ffn, "forward"))
    for readout in (backbone.node_readout, backbone.edge_readout):
        if readout is not None:
            parts += [("readouts", readout, n) for n in ("add", "finish")]
    parts += [("heads", head, "forward") for head in model.output_heads.values()]
    for stage, owner, name in parts:
        setattr(owner, name, watch.timed(stage, getattr(owner, name)))
    from escaip_fairchem import backbone as module

    return mock.patch.object(module, "build_graph", watch.timed("graph", module.build_graph))


@dataclass
class Work:
    """Floating-point operations and bytes that a stage cannot do without."""

    operations: float = 0.0
    bytes: float = 0.0
    size: int = field(default=4, repr=False)

    def linear(self, rows: int, inputs: int, outputs: int) -> None:
        """A linear map: reads and writes its rows once, and its weight."""
        self.operations += 2.0 * rows * inputs * outputs
        self.bytes += self.size * (rows * (inputs + outputs) + inputs * outputs)

    def ffn(self, rows: int, size: int, multiplier: int) -> None:
        """Two linear maps."""
        self.linear(rows, size, multiplier * size)
        self.linear(rows, multiplier * size, size)


def work(backbone: EScAIPBackbone, graph: NeighborGraph, size: int) -> dict[str, Work]:
    """The `Work` of each stage of a model of preset ``v2`` with direct forces.

    Args:
        backbone: The model.
        graph: Of the batch.
        size: Bytes of a number.
    """
    c = backbone.config
    h, layers = c.hidden_size, c.num_layers
    n, e, u = len(graph.counts), len(graph.senders), len(graph.pair_lengths)
    needs = {stage: Work(size=size) for stage in STAGES}

    def attributes(stage: Work) -> None:
        stage.linear(u, c.rbf_size, c.rbf_dim)
        stage.linear(u, c.rbf_dim, h)
        for _ in range(2):
            stage.linear(n, c.boo_lmax + 1, c.boo_dim)
            stage.linear(n, c.boo_dim, h)
            stage.linear(n, c.species_dim, h)
        stage.bytes += size * 4 * e * h  # gathered from three places and written

    # senders, receivers, pairs; directions, envelope, existence
    needs["graph"].bytes = e * (3 * 8 + 5 * 4)
    needs["features"].bytes = 4 * (u * c.rbf_size + n * (c.boo_lmax + 1) + 4 * e)
    attributes(needs["input block"])
    needs["input block"].ffn(e, h, 1)
    squares = float(graph.counts.double().square().sum())
    for _ in range(layers):
        gemms = needs["attention GEMMs"]
        attributes(gemms)
        gemms.linear(n, h, 2 * h)
        for parts in (1, 3):  # of the edge, of the message
            gemms.linear(e, parts * h, h)
        gemms.linear(e, h, 3 * h)
        gemms.linear(e, h, h)
        needs["attention"].operations += 4.0 * squares * h
        needs["attention"].bytes += e * (4 * h * size + 4 * 4)
        needs["FFN"].ffn(n, h, c.ffn_multiplier)
        needs["FFN"].ffn(e, h, c.ffn_multiplier)
    for _ in range(layers + 1):
        for rows in (n, e):
            needs["readouts"].ffn(rows, h, c.readout_multiplier)
            needs["readouts"].linear(rows, h, h)
    for rows, outputs in ((n, 1), (n, 1), (e, 3)):
        needs["heads"].ffn(rows, h, c.output_multiplier)
        needs["heads"].linear(rows, h, outputs)
    return needs


def measured_limits(device: torch.device) -> tuple[float, float]:
    """Operations per second of a matrix product, in the precision that is set, and bytes of a copy.

    A copy reads and writes, which counts twice.
    """
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        a, b = a.to(dtype), b.to(dtype)
    source = torch.empty(COPIED[device.type] * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = _best(lambda: a @ b, device)
    copy = _best(lambda: target.copy_(source), device)
    return 2.0 * side**3 / product, 2.0 * len(source) / copy


def _best(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of five calls."""
    taken = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken)
