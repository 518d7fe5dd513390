"""Errors of trivial models: element references and the mean for the energy, zero for the rest."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.data.energies import exact_energy

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def evenly_spaced(dataset: Sequence, most: int) -> list[int]:
    """At most `most` indices of a data set, evenly spaced over it."""
    return np.linspace(0, len(dataset) - 1, min(len(dataset), most)).astype(int).tolist()


def energy_baseline(task: Any, atomic_numbers: np.ndarray) -> float:
    """Energy that a task gives to a structure before anything is learnt.

    Args:
        task: fairchem's task of the energy, with its normalizer and element references.
        atomic_numbers: Atomic numbers, (N,).

    Returns:
        Sum of the element references plus the normalizer's mean, eV.
    """
    mean = float(task.normalizer.mean)
    if task.element_references is None:
        return mean
    references = task.element_references.element_references.cpu().numpy()
    return float(references[atomic_numbers].sum()) + mean


def baseline_metrics(structures: Iterable[Any], tasks: Sequence[Any]) -> dict[str, float]:
    """Mean absolute errors of the trivial models, under the names of fairchem's metrics.

    Args:
        structures: fairchem's structures with their labels.
        tasks: fairchem's tasks.

    Returns:
        Values by names of the form ``val/{dataset},{task},{metric}``, metrics mae and, for the
        energy, per_atom_mae; in eV, eV/A and eV/A^3.
    """
    errors: dict[str, list[np.ndarray]] = defaultdict(list)
    for data in structures:
        for task in tasks:
            if data.dataset not in task.datasets or task.name not in data:
                continue
            name = f"val/{data.dataset_name},{task.name}"
            label = data[task.name].double().numpy()
            if task.property == "energy":
                label = exact_energy(data).numpy()
                error = np.abs(label - energy_baseline(task, data.atomic_numbers.numpy()))
                errors[f"{name},mae"].append(error)
                errors[f"{name},per_atom_mae"].append(error / len(data.pos))
            else:
                if task.level == "atom" and task.eval_on_free_atoms:
                    label = label[data.fixed.numpy() == 0]
                # a structure without stress has infinities, which no metric counts
                errors[f"{name},mae"].append(np.abs(label[np.isfinite(label)]))
    joined = {name: np.concatenate(parts) for name, parts in errors.items()}
    return {name: float(values.mean()) for name, values in joined.items() if len(values)}
