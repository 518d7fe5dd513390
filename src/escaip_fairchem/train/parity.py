"""Predictions of a run's checkpoint on its validation set, beside those of trivial models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.data.energies import exact_energy
from escaip_fairchem.train.baselines import energy_baseline, evenly_spaced
from escaip_fairchem.train.runner import instantiate

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BATCH_ATOMS = 2000


@dataclass(frozen=True)
class Parity:
    """Labels and predictions of S structures with N atoms together, F of them free.

    Attributes:
        n_atoms: Atoms per structure, (S,).
        energy: Energy labels, eV, (S,).
        energy_model: Predicted energies, eV, (S,).
        energy_baseline: Sum of element references plus the mean, eV, (S,).
        numbers: Atomic numbers of all atoms, (N,).
        free: Whether an atom is free, (N,).
        forces: Force labels of free atoms, eV/A, (F, 3).
        forces_model: Predicted forces of free atoms, eV/A, (F, 3).
        stress: Stress labels of the structures that have one, eV/A^3, (T, 9); T is 0 for a model
            without stress.
        stress_model: Predicted stress of the same, eV/A^3, (T, 9).
    """

    n_atoms: np.ndarray
    energy: np.ndarray
    energy_model: np.ndarray
    energy_baseline: np.ndarray
    numbers: np.ndarray
    free: np.ndarray
    forces: np.ndarray
    forces_model: np.ndarray
    stress: np.ndarray
    stress_model: np.ndarray

    def errors(self) -> dict[str, tuple[float, float]]:
        """Mean absolute errors as (model, baseline); zero is the baseline of forces and stress."""
        model, baseline = self.energy_model - self.energy, self.energy_baseline - self.energy
        errors = {
            "energy MAE, eV": (_mean_abs(model), _mean_abs(baseline)),
            "energy MAE, eV/atom": (
                _mean_abs(model / self.n_atoms),
                _mean_abs(baseline / self.n_atoms),
            ),
            "force MAE, eV/A": (_mean_abs(self.forces_model - self.forces), _mean_abs(self.forces)),
        }
        if len(self.stress):
            stress = _mean_abs(self.stress_model - self.stress), _mean_abs(self.stress)
            errors["stress MAE, eV/A^3"] = stress
        return errors

    def force_cosine(self) -> float:
        """Mean cosine between predicted and labelled forces of free atoms."""
        dots = (self.forces * self.forces_model).sum(1)
        norms = np.linalg.norm(self.forces, axis=1) * np.linalg.norm(self.forces_model, axis=1)
        return float((dots / np.maximum(norms, 1e-12)).mean())

    def table(self) -> str:
        """The errors beside those of the trivial models, one a line."""
        lines = [f"{'validation set':<24}{'model':>12}{'baseline':>12}{'ratio':>8}"]
        for name, (model, baseline) in self.errors().items():
            ratio = f"{model / baseline:8.3f}" if baseline else ""
            lines.append(f"{name:<24}{model:12.5f}{baseline:12.5f}{ratio}")
        lines.append(f"{'force cosine':<24}{self.force_cosine():12.5f}")
        lines.append(
            f"{len(self.energy)} structures; baseline: element references for the energy, "
            "zero for forces and stress"
        )
        return "\n".join(lines)


def _mean_abs(values: np.ndarray) -> float:
    return float(np.abs(values).mean())


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
    energy_task = next(task for task in unit.tasks.values() if task.property == "energy")
    columns: list[tuple[np.ndarray, ...]] = []
    for structures in _batches(dataset[index] for index in evenly_spaced(dataset, max_structures)):
        batch = atomicdata_list_to_batch(structures)
        # predict moves its batch to the GPU
        predicted = {k: v.detach().cpu().numpy() for k, v in unit.predict(batch.clone()).items()}
        free = (batch.fixed == 0).numpy()
        numbers = [data.atomic_numbers.numpy() for data in structures]
        columns.append(
            (
                batch.natoms.numpy(),
                exact_energy(batch).numpy(),
                predicted["energy"],
                np.array([energy_baseline(energy_task, each) for each in numbers]),
                np.concatenate(numbers),
                free,
                batch.forces.numpy()[free],
                predicted["forces"][free],
                *_stress(batch, predicted),
            )
        )
    return Parity(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def _stress(batch: Any, predicted: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions where both exist, (T, 9) each; a molecule's stress is NaN."""
    if "stress" not in predicted or "stress" not in batch:
        return np.zeros((0, 9)), np.zeros((0, 9))
    label = batch.stress.numpy().reshape(-1, 9)
    model = predicted["stress"].reshape(-1, 9)
    known = np.isfinite(label).all(axis=1) & np.isfinite(model).all(axis=1)
    return label[known], model[known]


def _batches(structures: Any) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for structure in structures:
        if batch and sum(len(other.pos) for other in batch) + len(structure.pos) > BATCH_ATOMS:
            yield batch
            batch = []
        batch.append(structure)
    yield batch
