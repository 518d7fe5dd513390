"""``escaip bench peers``: other models on the same structures, all with random weights.

The backbones of the installed fairchem run in turn with EScAIP in this process. Models that need
other packages run in an environment of their own, see `others` and `authors`.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ase.calculators.emt import EMT
from fairchem.core.models.base import HydraModel

from escaip_fairchem.bench.compare import OURS
from escaip_fairchem.bench.measure import Call, interleaved
from escaip_fairchem.bench.models import Models
from escaip_fairchem.bench.others import (
    FROM_OTHERS,
    OTHERS,
    check_environment,
    guide,
    measure_other,
    peer_row,
)
from escaip_fairchem.bench.pair import model_pair
from escaip_fairchem.bench.structures import solid
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ase import Atoms

    from escaip_fairchem.bench.report import Report, Row
    from escaip_fairchem.bench.settings import Settings

#: Sizes of eSEN by fairchem's names: layers, lmax. K4L2 is what UMA-S runs, without its experts.
ESEN = {"K2L2": (2, 2), "K4L2": (4, 2), "K10L4": (10, 4)}

UMA = "fairchem.core.models.uma.escn_md."


def describe() -> str:
    """Which peers there are and how to make their environments."""
    return guide([f"esen_{name}" for name in ESEN])


def run(
    settings: Settings,
    report: Report,
    structures: list[Atoms],
    quantities: tuple[str, ...],
    peers: list[str],
    max_neighbors: list[int],
    python: Path | None,
) -> None:
    """Measure EScAIP and peers on one batch.

    Args:
        settings: Size and kind of EScAIP; kind, device and repeats of all.
        report: Takes the rows.
        structures: The batch.
        quantities: See `compare.QUANTITIES`; of other environments those of `FROM_OTHERS`.
        peers: Names, ``esen_*`` or keys of `OTHERS`.
        max_neighbors: Limits of neighbours of eSEN; each is measured.
        python: Python of the environment of `OTHERS`.

    Raises:
        UserError: An unknown peer, or one that needs another Python.
    """
    esen = [name.removeprefix("esen_") for name in peers if name.startswith("esen_")]
    others = [name for name in peers if not name.startswith("esen_")]
    for name in [e for e in esen if e not in ESEN] + [o for o in others if o not in OTHERS]:
        raise UserError(f"no peer {name!r}; escaip bench peers --list names them")
    check_environment(others, python, settings)
    measured = [quantity for quantity in FROM_OTHERS if quantity in quantities]
    if others and not measured:
        raise UserError(f"{', '.join(others)}: --measure forward or memory")
    if "lammps" in others and "forward" not in measured:
        raise UserError("lammps: --measure forward; its memory is not torch's")
    with settings.chosen_kernels():
        models = {OURS: model_pair(settings.config(), **settings.own_keys())[1]}
    models |= esen_models(esen, max_neighbors, settings)
    for name, model in models.items():
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    rows = Models(settings, models, OURS).rows(quantities, structures)
    for row in rows:
        report.add(row)
    ours = {row.quantity: row.min for row in rows if row.model == OURS}
    if "forward" in quantities:
        report.add(_emt(settings, metals(structures), ours["forward"]))
    for name, quantity in itertools.product(others, measured):
        task = settings, structures
        if name == "lammps":
            task = replace(settings, domain="solid"), metals(structures)
        report.add(measure_other(name, python, *task, quantity, ours[quantity]))


def esen_models(
    sizes: Sequence[str], max_neighbors: Sequence[int], settings: Settings
) -> dict[str, HydraModel]:
    """Each size of eSEN with each limit of neighbours, by the names of the tables."""
    return {
        f"eSEN {size} {limit}": esen_model(size, limit, settings)
        for size in sizes
        for limit in max_neighbors
    }


def esen_model(size: str, max_neighbors: int, settings: Settings) -> HydraModel:
    """Fairchem's eSEN backbone, as UMA configures it, with random weights.

    Args:
        size: Key of `ESEN`.
        max_neighbors: Limit of neighbours of an atom within 6 Angstrom.
        settings: The kind decides about the heads, the domain about periodic images.

    Returns:
        The model, in eval mode.
    """
    layers, lmax = ESEN[size]
    backbone = {
        "model": UMA + "eSCNMDBackbone",
        "max_num_elements": 100,
        "sphere_channels": 128,
        "lmax": lmax,
        "mmax": 2,
        "otf_graph": True,
        "max_neighbors": max_neighbors,
        "always_use_pbc": settings.domain != "molecules",
        "cutoff": 6.0,
        "edge_channels": 128,
        "num_distance_basis": 64,
        "regress_forces": True,
        "regress_stress": settings.stress,
        "direct_forces": settings.direct,
        "num_layers": layers,
        "hidden_channels": 128,
        "norm_type": "rms_norm_sh",
        "act_type": "gate",
        "ff_type": "spectral",
        "chg_spin_emb_type": "rand_emb",
        "use_dataset_embedding": False,
    }
    if settings.direct:
        heads: dict[str, Any] = {
            "energy": {"module": UMA + "MLP_Energy_Head"},
            "forces": {"module": UMA + "Linear_Force_Head"},
        }
    else:
        heads = {"efs": {"module": UMA + "MLP_EFS_Head", "wrap_property": False}}
    passed = not settings.direct
    return HydraModel(backbone=backbone, heads=heads, pass_through_head_outputs=passed).eval()


def metals(structures: list[Atoms]) -> list[Atoms]:
    """As many atoms of copper and gold, which classical potentials know."""
    return [solid(len(atoms), seed) for seed, atoms in enumerate(structures)]


def _emt(settings: Settings, structures: list[Atoms], ours: float) -> Row:
    """ASE's EMT on crystals of copper and gold, one after the other."""

    def evaluate(batch: list[Atoms]) -> None:
        for atoms in batch:
            atoms.calc = EMT()
            atoms.get_forces()

    call = Call(lambda: [atoms.copy() for atoms in structures], evaluate)
    spread = interleaved({"EMT": call}, settings.repeats, settings.torch_device)["EMT"]
    columns = settings.columns() | {"config": "ASE", "domain": "solid", "kind": "conservative"}
    return peer_row("EMT", spread, columns | {"precision": "fp64"}, structures, ours)
