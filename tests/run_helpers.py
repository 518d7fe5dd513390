"""Runs for several tests: by the `fairchem` command, and made up without a training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from fairchem.core import _cli
from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint
from omegaconf import OmegaConf

from escaip_fairchem import EScAIP
from escaip_fairchem.data.convert import SplitOptions, convert
from helpers import SMALL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ase import Atoms

#: Steps of the quick start in the tests, and what makes them few and small.
STEPS = 12
SHRUNK = [f"steps={STEPS}", "epochs=null", "max_atoms=120", "evaluate_every_n_steps=5"]
REFERENCES = [0.01 * z for z in range(120)]
RMSD = 1.7
MEAN = -0.3
_SEARCHED: set[str] = set()
_UNIT = "fairchem.core.units.mlip_unit.mlip_unit."
_NORMALIZATION = "fairchem.core.modules.normalization."


def fairchem(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the `fairchem` command in a folder with its data in ``data``; it must succeed."""
    done = subprocess.run(
        [Path(sys.executable).with_name("fairchem"), *arguments],
        cwd=folder, capture_output=True, text=True, timeout=400, check=False,
        env={**os.environ, "ESCAIP_DATA": "data", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def compose_quickly(recipe: str, overrides: Sequence[str]) -> Any:
    """Compose a recipe as the command does, whose search for unused keys takes seconds.

    It is done once for each recipe.
    """
    search = without_search if recipe in _SEARCHED else _cli.get_canonical_config
    with mock.patch.object(_cli, "get_canonical_config", search):
        config = _cli.get_hydra_config_from_yaml(recipe, list(overrides))
    _SEARCHED.add(recipe)
    return config


def without_search(config: Any) -> Any:
    """fairchem's `get_canonical_config` less the search."""
    job = OmegaConf.to_object(config.job)
    job.__post_init__()
    config.job = job
    OmegaConf.resolve(config)
    kept = _cli.ALLOWED_TOP_LEVEL_KEYS & config.keys()
    return OmegaConf.masked_copy(config, [str(key) for key in kept])


def task_config(prop: str, dataset: str) -> dict[str, Any]:
    """A task as a run stores it."""
    references = {
        "_target_": _NORMALIZATION + "element_references.ElementReferences",
        "element_references": {"_target_": "torch.DoubleTensor", "_args_": [REFERENCES]},
    }
    energy = prop == "energy"
    return {
        "_target_": _UNIT + "Task",
        "name": prop,
        "level": "atom" if prop == "forces" else "system",
        "property": prop,
        "out_spec": {
            "_target_": _UNIT + "OutputSpec",
            "dim": {"energy": [1], "forces": [3], "stress": [1, 9]}[prop],
            "dtype": "float32",
        },
        "normalizer": {
            "_target_": _NORMALIZATION + "normalizer.Normalizer",
            "mean": MEAN if energy else 0.0,
            "rmsd": RMSD,
        },
        "element_references": references if energy else None,
        "datasets": [dataset],
        "metrics": ["mae"],
    }


def save_checkpoint(
    path: Path, *, conservative: bool, stress: bool, dataset: str, **changes: Any
) -> None:
    """An inference checkpoint as fairchem's trainer writes it, of a random small model."""
    backbone = {"model": "escaip_fairchem.EScAIPBackbone", "preset": "v2", **SMALL, **changes}
    if conservative:
        backbone |= {"direct_forces": False, "regress_stress": stress, "smooth": True}
        heads = {"efs": {"module": "escaip_fairchem.ConservativeHead"}}
    else:
        backbone |= {"direct_stress": stress}
        heads = {
            "energy": {"module": "escaip_fairchem.EnergyHead"},
            "forces": {"module": "escaip_fairchem.DirectForceHead"},
        }
        if stress:
            heads["stress"] = {"module": "escaip_fairchem.DirectStressHead"}
    torch.manual_seed(0)
    weights = EScAIP(backbone=backbone, heads=heads).state_dict()
    properties = ["energy", "forces", *(["stress"] if stress else [])]
    checkpoint = MLIPInferenceCheckpoint(
        model_config={"_target_": "escaip_fairchem.EScAIP", "backbone": backbone, "heads": heads},
        model_state_dict=weights,
        ema_state_dict={"n_averaged": torch.tensor(41)}
        | {f"module.module.{name}": weight for name, weight in weights.items()},
        tasks_config=[task_config(prop, dataset) for prop in properties],
    )
    path.parent.mkdir(parents=True)
    torch.save(checkpoint, path)


def make_run(folder: Path, frames: list[Atoms], *, conservative: bool, stress: bool) -> Path:
    """A run whose validation set is half of the frames; returns its folder."""
    from ase.io import write

    write(folder / "frames.extxyz", frames)
    split = SplitOptions(val_fraction=0.5)
    convert([str(folder / "frames.extxyz")], folder / "set", split=split, check_units=False)
    run = folder / "run"
    checkpoint = run / "checkpoints" / "final" / "inference_ckpt.pt"
    save_checkpoint(checkpoint, conservative=conservative, stress=stress, dataset="mine")
    dataset = {
        "_target_": "escaip_fairchem.data.datasets.create_dataset",
        "name": "mine",
        "split": "val",
        "src": str(folder / "set" / "val"),
        "stress": stress,
    }
    config = {"job": {"run_name": "r"}, "runner": {"eval_dataloader": {"dataset": dataset}}}
    OmegaConf.save(OmegaConf.create(config), run / "canonical_config.yaml")
    (run / "metrics.csv").write_text(
        "step,epoch,lr,wall_time_s,train_loss,val_loss,val_energy_mae,val_forces_mae,"
        "val_stress_mae,val_forces_cosine_similarity,val_efwt\n"
        "10,0,1e-3,1.0,5.0,,,,,,\n10,0,1e-3,1.5,,4.0,0.5,0.4,0.02,0.1,0.0\n"
        "20,1,1e-3,2.5,3.0,3.5,0.4,0.3,0.01,0.3,0.01\n"
    )
    return run
