"""Predictions of a run's checkpoint on its validation set, beside those of trivial models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.data.energies import exact_energy
from escaip_fairchem.predict.metrics import means, structure_sums
from escaip_fairchem.train.baselines import energy_baseline, evenly_spaced
from escaip_fairchem.train.runner import instantiate

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from escaip_fairchem.predict.metrics import Sums

BATCH_ATOMS = 2000
#: Part of a trivial model's error from which on one of so many labelled structures is pointed out.
LARGE_PART, MANY = 0.1, 50


@dataclass(frozen=True)
class Parity:
    """Labels and predictions of S structures with N atoms together, F of them free.

    Attributes:
        n_atoms: Atoms per structure, (S,).
        energy: Energy labels, eV, (S,). Labels are NaN where there are none.
        energy_model: Predicted energies, eV, (S,).
        energy_baseline: Sum of element references plus the mean, eV, (S,).
        numbers: Atomic numbers of all atoms, (N,).
        free: Whether an atom is free, (N,).
        forces: Force labels of free atoms, eV/A, (F, 3).
        forces_model: Predicted forces of free atoms, eV/A, (F, 3).
        stress: Stress labels, eV/A^3, (S, 9), or (0, 9) for a model without stress.
        stress_model: Predicted stress, eV/A^3, of the same shape.
        names: Of the structures, (S,), if known: system and frame, or the place in the data set.
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
    names: np.ndarray | None = None

    def errors(self) -> dict[str, tuple[float, float]]:
        """Mean absolute errors as (model, baseline); zero is the baseline of forces and stress."""
        found = means(self._sums())
        errors = {
            "energy MAE, eV": found["energy_mae"],
            "energy MAE, eV/atom": found["energy_per_atom_mae"],
            "force MAE, eV/A": found["forces_mae"],
            "stress MAE, eV/A^3": found.get("stress_mae", (0.0, 0.0, 0)),
        }
        return {name: values[:2] for name, values in errors.items() if values[2]}

    def force_cosine(self) -> float:
        """Mean cosine between predicted and labelled forces of free atoms."""
        return means(self._sums())["forces_cosine_similarity"][0]

    def dominant(self) -> list[str]:
        """Which one structure has much of a trivial model's error, and the ratio without it.

        Returns:
            A line for each of energy, forces and stress where there is such a structure: a mean
            says little about the others then.
        """
        n = len(self.n_atoms)
        sums = structure_sums(self, np.arange(n), n)
        lines = []
        for name in ("energy", "forces", "stress"):
            model, trivial, counts = sums.get(f"{name}_mae", np.zeros((n, 3))).T
            if np.count_nonzero(counts) < MANY:
                continue
            largest = trivial.argmax()
            others = np.delete(trivial, largest).sum()
            if trivial[largest] > LARGE_PART * trivial.sum() and others > 0:
                named = largest if self.names is None else self.names[largest]
                lines.append(
                    f"{name}: structure {named} alone has {trivial[largest] / trivial.sum():.0%} "
                    "of the baseline's error; ratio without it "
                    f"{np.delete(model, largest).sum() / others:.3f}"
                )
        return lines

    def _sums(self) -> Sums:
        return structure_sums(self, np.zeros(len(self.n_atoms), int), 1)

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
        lines += self.dominant()
        return "\n".join(lines)


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
    chosen = evenly_spaced(dataset, max_structures)
    columns: list[tuple[np.ndarray, ...]] = []
    for structures in _batches(dataset[index] for index in chosen):
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
                np.array(batch.sid, str),
            )
        )
    *values, names = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Parity(*values, np.where(names == "", np.array(chosen, str), names))


def _stress(batch: Any, predicted: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Labels, NaN for a molecule, and predictions, (S, 9) each, or (0, 9) without any."""
    if "stress" not in predicted or "stress" not in batch:
        return np.zeros((0, 9)), np.zeros((0, 9))
    label = batch.stress.numpy().reshape(-1, 9)
    return np.where(np.isfinite(label), label, np.nan), predicted["stress"].reshape(-1, 9)


def _batches(structures: Any) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for structure in structures:
        if batch and sum(len(other.pos) for other in batch) + len(structure.pos) > BATCH_ATOMS:
            yield batch
            batch = []
        batch.append(structure)
    yield batch
