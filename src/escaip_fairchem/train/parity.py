"""Predictions of a run's checkpoint on its validation set, beside those of trivial models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.errors import UserError
from escaip_fairchem.train.runner import instantiate

if TYPE_CHECKING:
    from pathlib import Path

BATCH_ATOMS = 2000


@dataclass(frozen=True)
class Parity:
    """Labels and predictions of S structures with N atoms together.

    Attributes:
        n_atoms: Atoms per structure, (S,).
        energy: Energy labels, eV, (S,).
        energy_model: Predicted energies, eV, (S,).
        energy_baseline: Sum of element references plus the mean, eV, (S,).
        forces: Force labels of free atoms, eV/A, (N, 3).
        forces_model: Predicted forces of free atoms, eV/A, (N, 3).
    """

    n_atoms: np.ndarray
    energy: np.ndarray
    energy_model: np.ndarray
    energy_baseline: np.ndarray
    forces: np.ndarray
    forces_model: np.ndarray

    def errors(self) -> dict[str, tuple[float, float]]:
        """Mean absolute errors as (model, baseline); the baseline of forces is zero."""
        model, baseline = self.energy_model - self.energy, self.energy_baseline - self.energy
        return {
            "energy MAE, eV": (_mean_abs(model), _mean_abs(baseline)),
            "energy MAE, eV/atom": (
                _mean_abs(model / self.n_atoms),
                _mean_abs(baseline / self.n_atoms),
            ),
            "force MAE, eV/A": (_mean_abs(self.forces_model - self.forces), _mean_abs(self.forces)),
        }

    def force_cosine(self) -> float:
        """Mean cosine between predicted and labelled forces of free atoms."""
        dots = (self.forces * self.forces_model).sum(1)
        norms = np.linalg.norm(self.forces, axis=1) * np.linalg.norm(self.forces_model, axis=1)
        return float((dots / np.maximum(norms, 1e-12)).mean())

    def table(self) -> str:
        """The errors beside those of the trivial models, one a line."""
        lines = [f"{'validation set':<24}{'model':>12}{'baseline':>12}{'ratio':>8}"]
        for name, (model, baseline) in self.errors().items():
            lines.append(f"{name:<24}{model:12.5f}{baseline:12.5f}{model / baseline:8.3f}")
        lines.append(f"{'force cosine':<24}{self.force_cosine():12.5f}")
        lines.append("baseline: element references for the energy, zero for the forces")
        return "\n".join(lines)


def _mean_abs(values: np.ndarray) -> float:
    return float(np.abs(values).mean())


def newest_checkpoint(run_dir: Path) -> Path:
    """The inference checkpoint that a run wrote last.

    Args:
        run_dir: Folder of the run.

    Raises:
        UserError: If there is none.
    """
    found = sorted(
        run_dir.glob("checkpoints/*/inference_ckpt.pt"), key=lambda path: path.stat().st_mtime
    )
    if not found:
        raise UserError(f"no checkpoints/*/inference_ckpt.pt in {run_dir}; let the run finish")
    return found[-1]


def evaluate(config: Any, checkpoint: Path, max_structures: int = 1000) -> Parity:
    """Predict the validation set of a run.

    Args:
        config: Canonical configuration of the run.
        checkpoint: Its inference checkpoint.
        max_structures: Evaluate at most so many, evenly spaced.

    Returns:
        Labels, predictions and baselines.
    """
    from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch
    from fairchem.core.units.mlip_unit import InferenceSettings, load_predict_unit

    dataset = instantiate(config.runner.eval_dataloader.dataset)
    unit = load_predict_unit(checkpoint, inference_settings=InferenceSettings(compile=False))
    references, mean = _references(config)
    chosen = np.linspace(0, len(dataset) - 1, min(len(dataset), max_structures)).astype(int)
    columns: list[tuple[np.ndarray, ...]] = []
    for structures in _batches(dataset[int(index)] for index in chosen):
        batch = atomicdata_list_to_batch(structures)
        predicted = unit.predict(batch.clone())  # predict moves its batch to the GPU
        free = (batch.fixed == 0).numpy()
        atom_references = references[batch.atomic_numbers.numpy()]
        columns.append(
            (
                batch.natoms.numpy(),
                batch.energy.numpy(),
                predicted["energy"].detach().cpu().numpy(),
                np.bincount(batch.batch.numpy(), atom_references) + mean,
                batch.forces.numpy()[free],
                predicted["forces"].detach().cpu().numpy()[free],
            )
        )
    return Parity(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def _batches(structures: Any) -> Any:
    batch: list[Any] = []
    for structure in structures:
        if batch and sum(len(other.pos) for other in batch) + len(structure.pos) > BATCH_ATOMS:
            yield batch
            batch = []
        batch.append(structure)
    yield batch


def _references(config: Any) -> tuple[np.ndarray, float]:
    """Element references of the energy task by atomic number, eV, and the energy mean, eV."""
    tasks = config.runner.train_eval_unit.tasks
    energy = next(task for task in tasks if task.property == "energy")
    references = energy.element_references.element_references._args_[0]
    return np.array(references), float(energy.normalizer.mean)
