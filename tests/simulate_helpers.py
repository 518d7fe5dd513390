"""Checkpoints and structures of the tests of simulations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from ase.build import add_adsorbate, bulk, fcc111
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint

from escaip_fairchem.simulate.model import Model
from helpers import small_model
from test_inference import task_config

if TYPE_CHECKING:
    from pathlib import Path

    from ase import Atoms

HEADS = {
    True: {"efs": {"module": "escaip_fairchem.ConservativeHead"}},
    False: {
        "energy": {"module": "escaip_fairchem.EnergyHead"},
        "forces": {"module": "escaip_fairchem.DirectForceHead"},
    },
}


def save_small(path: Path, *, conservative: bool, references: bool = True) -> Path:
    """Inference checkpoint of a small random model; with references its energies are total."""
    preset = {"preset": "v2", "smooth": True} if conservative else {}
    model = small_model(conservative=conservative, dtype=torch.float32, **preset)
    weights = model.state_dict()
    tasks = [task_config(name, name) for name in ("energy", "forces")]
    if conservative:
        tasks.append(task_config("stress", "stress"))
        tasks[-1]["out_spec"]["dim"] = [1, 9]
    if not references:
        tasks[0]["element_references"] = None
    checkpoint = MLIPInferenceCheckpoint(
        model_config={
            "_target_": "escaip_fairchem.EScAIP",
            "backbone": {
                "model": "escaip_fairchem.EScAIPBackbone",
                **model.backbone.config.to_dict(),
            },
            "heads": HEADS[conservative],
        },
        model_state_dict=weights,
        ema_state_dict={"n_averaged": torch.tensor(1)}
        | {f"module.{name}": value for name, value in weights.items()},
        tasks_config=tasks,
    )
    torch.save(checkpoint, path)
    return path


def emt(**options) -> Model:
    """ASE's EMT where a model would be."""
    return Model(EMT(**options), "EMT", settings={"checkpoint": "EMT"})


def copper_slab(seed: int = 0) -> Atoms:
    """N on Cu(111) with OC20's tags, the lower half fixed, rattled."""
    slab = fcc111("Cu", (2, 2, 3), vacuum=6.0, periodic=True)
    lower = slab.get_tags() > 1
    slab.set_tags(np.where(lower, 0, 1))
    add_adsorbate(slab, "N", 1.2, "fcc")
    slab.set_tags([*slab.get_tags()[:-1], 2])
    slab.rattle(0.05, seed=seed)
    slab.set_constraint(FixAtoms(indices=np.flatnonzero(lower)))
    return slab


def copper(seed: int = 0) -> Atoms:
    """A rattled and strained crystal of four atoms."""
    atoms = bulk("Cu", cubic=True)
    atoms.set_cell(atoms.cell * [1.02, 0.99, 1.0], scale_atoms=True)
    atoms.rattle(0.05, seed=seed)
    return atoms
