"""What the tests of the training unit share, in this process and in spawned ranks."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from fairchem.core.common import distutils
from fairchem.core.modules.loss import DDPMTLoss, L2NormLoss, MAELoss, PerAtomMAELoss
from fairchem.core.modules.normalization.element_references import ElementReferences
from fairchem.core.modules.normalization.normalizer import Normalizer
from fairchem.core.units.mlip_unit.mlip_unit import (
    OutputSpec,
    Task,
    _get_consine_lr_scheduler,
    mt_collater_adapter,
)
from omegaconf import OmegaConf
from torch import nn

from escaip_fairchem import EScAIP
from escaip_fairchem.data.corruption import NOISE
from escaip_fairchem.data.datasets import create_dataset
from escaip_fairchem.data.loaders import EvaluationBatchSampler, get_dataloader
from escaip_fairchem.data.store import SplitWriter
from escaip_fairchem.train.denoising import Denoising
from escaip_fairchem.train.evaluation import EvalUnit
from escaip_fairchem.train.unit import TrainEvalUnit
from helpers import SMALL

if TYPE_CHECKING:
    from pathlib import Path

DROPOUTS = [
    *("mlp_dropout", "node_ffn_dropout", "edge_ffn_dropout", "attention_dropout"),
    *("scalar_output_dropout", "vector_output_dropout"),
]
MEAN, ENERGY_RMSD, FORCE_RMSD = -0.4, 1.7, 0.6
REFERENCES = np.linspace(-3.0, 2.0, 120)


@contextmanager
def ranks(folder: Path, rank: int = 0, size: int = 1):
    """A process group on the CPU, as fairchem makes one."""
    before = os.environ.get(distutils.CURRENT_DEVICE_TYPE_STR)
    distutils.assign_device_for_local_rank(True, rank)
    store = f"file://{folder / f'store{size}'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        os.environ.pop(distutils.CURRENT_DEVICE_TYPE_STR)
        if before is not None:
            os.environ[distutils.CURRENT_DEVICE_TYPE_STR] = before


def write_frames(folder: Path, n_frames: int = 11) -> None:
    """Copper and gold of 4 to 16 atoms with EMT labels; atoms of the first frame are all fixed."""
    writer = SplitWriter(folder)
    rng = np.random.default_rng(4)
    for index in range(n_frames):
        atoms = bulk("Cu", cubic=True).repeat((1, 1 + index % 2, 1 + index % 3 // 2))
        atoms.symbols[rng.permutation(len(atoms))[:2]] = "Au"
        atoms.rattle(0.15, rng=rng)
        atoms.calc = EMT()
        labels = {
            "energy": atoms.get_potential_energy(),
            "forces": atoms.get_forces(),
            "stress": atoms.get_stress(),
        }
        atoms.calc = SinglePointCalculator(atoms, **labels)
        atoms.set_constraint(FixAtoms(range(len(atoms)) if index == 0 else [0]))
        writer.add(atoms)
    writer.close()


def dataset(folder: Path) -> Any:
    return create_dataset("cu", "val", str(folder), stress=True, no_shuffle=True)


def make_tasks(form: str = "paper", *, stress: bool = False) -> list[Task]:
    """Energy and force tasks with the losses of a preset, and mean absolute stress."""
    scale = partial(Normalizer, mean=0.0)
    by_structure = form == "v2"
    energy_loss = PerAtomMAELoss() if by_structure else MAELoss()
    reduction = "per_structure" if by_structure else "mean"
    tasks = [
        Task(
            "energy", "system", "energy", OutputSpec([1], "float32"),
            Normalizer(mean=MEAN, rmsd=ENERGY_RMSD), ["cu"],
            DDPMTLoss(energy_loss, coefficient=4.0),
            ElementReferences(torch.tensor(REFERENCES)), ["mae", "per_atom_mae"],
        ),
        Task(
            "forces", "atom", "forces", OutputSpec([3], "float32"), scale(rmsd=FORCE_RMSD), ["cu"],
            DDPMTLoss(L2NormLoss(), reduction=reduction, coefficient=10.0),
            metrics=["mae", "cosine_similarity", "magnitude_error"],
        ),
    ]  # fmt: skip
    if stress:
        loss = DDPMTLoss(MAELoss(), coefficient=2.0)
        spec = OutputSpec([1, 9], "float32")
        tasks.append(
            Task("stress", "system", "stress", spec, scale(rmsd=0.1), ["cu"], loss, metrics=["mae"])
        )
    return tasks


def batches(folder: Path, groups: list[list[int]], *, stress: bool = False) -> list[Any]:
    """Batches of the given structures."""
    data = dataset(folder)
    collate = mt_collater_adapter(make_tasks(stress=stress))
    return [collate([data[index] for index in group]) for group in groups]


#: Noise on most of the atoms that can have it.
DENOISING = Denoising(prob=0.7, std=0.1, corrupt_ratio=0.6, weight=0.3)


def corrupted(batches: list[Any], denoising: Denoising = DENOISING) -> list[Any]:
    """The batches with noise that their place in the list decides."""
    for place, batch in enumerate(batches):
        denoising.corrupt([batch], make_tasks(), place)
    return batches


def small_model(preset: str = "paper", *, denoising: bool = False, **backbone: Any) -> EScAIP:
    torch.manual_seed(0)
    head = {NOISE: {"module": "escaip_fairchem.DenoisingHead"}} if denoising else {}
    return EScAIP(
        backbone={
            "model": "escaip_fairchem.EScAIPBackbone", "preset": preset, **SMALL,
            **dict.fromkeys(DROPOUTS, 0.0), "force_encoding": denoising, **backbone,
        },
        heads={
            "energy": {"module": "escaip_fairchem.EnergyHead"},
            "forces": {"module": "escaip_fairchem.DirectForceHead"},
            **head,
        },
    )  # fmt: skip


def job_config(folder: Path) -> Any:
    path = folder / "config.yaml"
    text = {"job": {}, "runner": {"train_eval_unit": {"model": None, "tasks": None}}}
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(text)))
    metadata = {"config_path": str(path)}
    return OmegaConf.create({"debug": True, "logger": None, "seed": 0, "metadata": metadata})


def make_unit(
    folder: Path,
    form: str = "paper",
    *,
    optimizer: Any = None,
    kind: type[TrainEvalUnit] = TrainEvalUnit,
    **settings: Any,
):
    """A training unit ready for `train_step`, with 20 steps to an epoch."""
    backbone = settings.pop("backbone", {})
    denoising = settings.get("denoising") is not None
    model = settings.pop("model", None) or small_model(form, denoising=denoising, **backbone)
    # a large eps, or AdamW would move by the sign of gradients that are rounding errors
    adamw = partial(torch.optim.AdamW, lr=1e-3, eps=1e-3, weight_decay=1e-3)
    unit = kind(
        job_config=job_config(folder),
        model=model,
        optimizer_fn=optimizer or adamw,
        cosine_lr_scheduler_fn=partial(
            _get_consine_lr_scheduler, warmup_factor=0.2, warmup_epochs=0.1, lr_min_factor=0.1,
            epochs=2,
        ),
        tasks=make_tasks(form),
        clip_grad_norm=100.0,
        **settings,
    )  # fmt: skip
    unit.load_scheduler(20 * unit.accumulate)
    unit.previous_wall_time = 0.0
    return unit


def train(unit: TrainEvalUnit, steps: list[list[Any]]) -> None:
    for step in steps:
        unit.train_step(None, [batch.clone() for batch in step])
        unit.train_progress.increment_step()


def weights(unit: TrainEvalUnit) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in unit.model.parameters()])


def gradient(unit: TrainEvalUnit, step: list[Any]) -> torch.Tensor:
    unit._backward([batch.clone() for batch in step])
    grads = torch.cat([p.grad.flatten() for p in unit.model.parameters()])
    unit.optimizer.zero_grad()
    return grads


class Answers(nn.Module):
    """A model that gives written predictions, eV, eV/A and eV/A^3, recognised by their label."""

    def __init__(self, table: dict[float, dict[str, np.ndarray]]) -> None:
        super().__init__()
        self.table = table

    def forward(self, batch: Any) -> dict[str, dict[str, torch.Tensor]]:
        batch["atomic_numbers_full"], batch["batch_full"] = batch.atomic_numbers, batch.batch
        rows = [self.table[float(energy)] for energy in batch.energy]
        energy = torch.tensor(np.array([row["energy"] for row in rows]))
        forces = torch.tensor(np.concatenate([row["forces"] for row in rows]))
        stress = torch.tensor(np.array([row["stress"] for row in rows])).reshape(-1, 9)
        sums = torch.zeros_like(energy).index_add(
            0, batch.batch, torch.tensor(REFERENCES)[batch.atomic_numbers]
        )
        # what fairchem will undo, in its float32 numbers
        scale = {key: float(np.float32(value)) for key, value in SCALES.items()}
        energy = (energy - sums - float(np.float32(MEAN))) / scale["energy"]
        return {
            "energy": {"energy": energy.requires_grad_()},
            "forces": {"forces": (forces / scale["forces"]).requires_grad_()},
            "stress": {"stress": (stress / scale["stress"]).requires_grad_()},
        }


SCALES = {"energy": ENERGY_RMSD, "forces": FORCE_RMSD, "stress": 0.1}


def evaluate(model: nn.Module, folder: Path, max_atoms: int, tasks: list[Task], **settings: Any):
    """Metrics of a model on all frames, by the evaluation unit and loader of the recipes."""
    unit = EvalUnit(job_config(folder), None, tasks, **settings)
    unit.setup_train_eval_unit(model)
    loader = get_dataloader(
        dataset(folder / "frames"),
        partial(EvaluationBatchSampler, max_atoms=max_atoms),
        mt_collater_adapter(tasks),
        num_workers=0,
    )
    state = SimpleNamespace(eval_state=SimpleNamespace(dataloader=loader))
    with torch.no_grad():
        unit.on_eval_epoch_start(state)
        for batch in loader:
            unit.eval_step(state, batch)
        unit.on_eval_epoch_end(state)
    return unit.last_metrics
