"""``escaip bench md``: steps of molecular dynamics in ASE, through the package's calculator.

fairchem 2.24 cannot build a calculator of its built-in EScAIP, so that one is called without
any calculator around it; ours is measured both ways, except in TF32, which fairchem's predict
unit switches off. eSEN of the installed fairchem can stand beside them.
"""

from __future__ import annotations

import tempfile
import time
from bisect import bisect_right
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ase import units
from ase.calculators.calculator import Calculator, all_changes
from ase.md.verlet import VelocityVerlet
from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint

from escaip_fairchem.bench.compare import BUILTIN, OURS, Comparison
from escaip_fairchem.bench.measure import (
    Call,
    Spread,
    interleaved,
    kept_attention_switches,
    precision,
)
from escaip_fairchem.bench.models import Models
from escaip_fairchem.bench.pair import batch_of, outputs, own_model_config
from escaip_fairchem.bench.peers import esen_models
from escaip_fairchem.bench.report import Row
from escaip_fairchem.bench.structures import solid
from escaip_fairchem.bench.sweep import expected_memory
from escaip_fairchem.inference import calculator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ase import Atoms

    from escaip_fairchem.bench.report import Report
    from escaip_fairchem.bench.settings import Settings

#: Random weights give forces of any size; a step this short leaves the atoms where they are.
TIME_STEP = 1e-3 * units.fs

CALCULATOR = f"{OURS}, calculator"


def run(
    settings: Settings,
    report: Report,
    sizes: list[int],
    steps: int,
    peers: Sequence[str] = (),
    fits: float | None = None,
) -> None:
    """Time velocity Verlet of a rattled crystal of each size.

    Args:
        settings: Model, device, precision, repeats (of `steps` steps each).
        report: Takes the rows, in milliseconds per step.
        sizes: About how many atoms.
        steps: Steps of each measurement.
        peers: Sizes of eSEN, keys of `peers.ESEN`, with the same limit of neighbours.
        fits: GiB; how many atoms a step of each model can have in them is estimated.
    """
    comparison = Comparison(settings)
    # as steps of dynamics are compiled: with CUDA graphs
    compiled = "cuda-graphs" if settings.compile else False
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inference_ckpt.pt"
        _save(comparison.models[OURS], settings, path)
        with settings.chosen_kernels():
            own = calculator(path, device=settings.device, compile=compiled)
    peer_models = esen_models(peers, [settings.neighbors], settings)
    models = Models(settings, comparison.models | peer_models, BUILTIN)
    models.set_training(False)
    calculators: dict[str, Calculator] = {
        f"{name}, bare model": _BareModel(model, settings) for name, model in models.models.items()
    }
    if settings.precision != "tf32":
        calculators[CALCULATOR] = own
    used: dict[str, list[tuple[int, float]]] = {name: [] for name in models.models}
    for size in sorted(sizes):
        atoms = solid(size, settings.seed)
        comparison.errors([atoms])
        calls = {name: _steps(atoms, each, steps) for name, each in calculators.items()}
        with precision(settings.precision, comparison.device):
            spreads = _timed(calls, settings.repeats, comparison.device)
        for name, spread in spreads.items():
            report.add(_row(name, spreads, spread, settings, atoms, steps))
            print(f"  {steps / spread.min:.3g} steps per second")
        if fits is not None:
            for row in models.rows(("peak of inference",), [atoms]):
                report.add(row)
                used[row.model].append((len(atoms), row.max))
    if fits is not None:
        for name, past in used.items():
            report.add(_largest(name, past, fits, settings))


def _largest(name: str, past: list[tuple[int, float]], fits: float, settings: Settings) -> Row:
    """The atoms of one system that fit, by the growth between the two largest that were measured.

    See `sweep.expected_memory`.
    """
    sizes = range(2, 2**24)
    fitting = 1 + bisect_right(sizes, fits * 2**10, key=lambda size: expected_memory(past, size))
    print(f"{name}: about {fitting} atoms fit into {fits:g} GiB, by the growth up to {past[-1][0]}")
    return Row(
        model=name, quantity=f"fits into {fits:g} GiB, estimated", unit="atoms", systems=1,
        atoms=past[-1][0], min=fitting, median=fitting, max=fitting, repeats=1,
        common=settings.columns() | {"domain": "solid"},
    )  # fmt: skip


def _row(
    name: str,
    spreads: dict[str, Spread],
    spread: Spread,
    settings: Settings,
    atoms: Atoms,
    steps: int,
) -> Row:
    reference = next(iter(spreads))
    scale = 1e3 / steps
    return Row(
        model=name,
        quantity="md step",
        unit="ms",
        systems=1,
        atoms=len(atoms),
        min=scale * spread.min,
        median=scale * spread.median,
        max=scale * spread.max,
        repeats=spread.repeats,
        ratio=None if name == reference else spreads[reference].min / spread.min,
        common=settings.columns() | {"domain": "solid"},
    )


def _steps(atoms: Atoms, used: Calculator, steps: int) -> Call:
    def prepare() -> VelocityVerlet:
        moving = atoms.copy()
        moving.calc = used
        dynamics = VelocityVerlet(moving, TIME_STEP)
        dynamics.run(1)  # evaluates the first forces
        return dynamics

    return Call(prepare, lambda dynamics: dynamics.run(steps))


def _timed(calls: dict[str, Call], repeats: int, device: torch.device) -> dict[str, Spread]:
    """On a GPU by the wall clock: between kernels the host works too, and a step waits for it."""
    if device.type != "cuda":
        return interleaved(calls, repeats, device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            dynamics = call.prepare()
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            call.run(dynamics)
            torch.cuda.synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: Spread.of(values) for name, values in seconds.items()}


class _BareModel(Calculator):
    """A model called on fairchem's batch of one structure, without units or references."""

    implemented_properties = ("energy", "forces")

    def __init__(self, model: torch.nn.Module, settings: Settings) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | tuple[str, ...] = ("energy",),
        system_changes: list[str] = all_changes,
    ) -> None:
        """Energy and forces of the current atoms."""
        super().calculate(atoms, properties, system_changes)
        batch = batch_of([self.atoms]).to(self.settings.torch_device)
        gradients = torch.set_grad_enabled(not self.settings.direct)
        with gradients, kept_attention_switches():
            found = outputs(self.model, batch)
        self.results["energy"] = float(found["energy"].detach())
        self.results["forces"] = found["forces"].detach().cpu().double().numpy()


def _save(model: torch.nn.Module, settings: Settings, path: Path) -> None:
    """An inference checkpoint, as fairchem's trainer writes it, of a model with random weights."""
    weights = model.state_dict()
    checkpoint = MLIPInferenceCheckpoint(
        model_config={"_target_": "escaip_fairchem.EScAIP", **own_model_config(settings.config())},
        model_state_dict=weights,
        ema_state_dict={"n_averaged": torch.tensor(1)}
        | {f"module.{name}": value for name, value in weights.items()},
        tasks_config=[_task("energy", "system", 1), _task("forces", "atom", 3)],
    )
    torch.save(checkpoint, path)


def _task(name: str, level: str, size: int) -> dict[str, Any]:
    unit = "fairchem.core.units.mlip_unit.mlip_unit."
    return {
        "_target_": unit + "Task",
        "name": name,
        "level": level,
        "property": name,
        "out_spec": {"_target_": unit + "OutputSpec", "dim": [size], "dtype": "float32"},
        "normalizer": {
            "_target_": "fairchem.core.modules.normalization.normalizer.Normalizer",
            "mean": 0.0,
            "rmsd": 1.0,
        },
        "datasets": ["oc20"],
    }
