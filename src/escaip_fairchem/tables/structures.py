"""Structures to evaluate models on, and predictions for many at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ase import Atoms

    #: Energies, eV, (S,), and forces, eV/A, [(N, 3)] of structures.
    Predict = Callable[[Sequence[Atoms]], tuple[np.ndarray, list[np.ndarray]]]


def draw_structures(source: str, number: int, seed: int) -> list[Atoms]:
    """Some structures of a data set, drawn at random without repetition.

    Args:
        source: Folder or file in ASE-LMDB format (looked for in the data root too), or any file
            that ASE reads.
        number: How many; all if there are fewer.
        seed: Of the draw.

    Raises:
        UserError: Nothing there, or nothing that can be read.
    """
    from escaip_fairchem.bench.structures import from_file
    from escaip_fairchem.data.datasets import DATABASE_SUFFIXES, create_dataset

    path = Path(source)
    if path.is_file() and path.suffix not in DATABASE_SUFFIXES:
        found = from_file(path, ":")
        return [found[index] for index in _draw(len(found), number, seed)]
    dataset = create_dataset("any", "data", source, no_shuffle=True).datasets[0].dataset
    return [dataset.get_atoms(int(index)) for index in _draw(len(dataset), number, seed)]


def _draw(size: int, number: int, seed: int) -> np.ndarray:
    if seed < 0:
        raise UserError(f"--seed is {seed}; it must not be negative")
    return np.sort(np.random.default_rng(seed).permutation(size)[:number])


def predictor(
    checkpoint: str | Path,
    *,
    task: str | None = None,
    device: str | None = None,
    double: bool = False,
    max_atoms: int = 2000,
) -> Predict:
    """Predictions of a checkpoint.

    Args:
        checkpoint: Inference checkpoint, its folder, or the folder of a run (its newest is taken).
        task: Data set whose tasks are predicted, if the checkpoint knows several.
        device: ``cpu`` or ``cuda``; a GPU if there is one by default.
        double: Compute in float64.
        max_atoms: Atoms of a batch.

    Raises:
        UserError: No checkpoint there, or `task` is needed or unknown.
    """
    unit, name = load_unit(checkpoint, task=task, device=device, double=double)
    return predict_with(unit, name, double=double, max_atoms=max_atoms)


def predict_with(unit: Any, task: str, *, double: bool = False, max_atoms: int = 2000) -> Predict:
    """Predictions of a predict unit, see `predictor`."""
    from escaip_fairchem.data.loaders import pack
    from escaip_fairchem.predict.runner import predict_batch

    names = {each.property: each.name for each in unit.dataset_to_tasks[task]}
    if not {"energy", "forces"} <= names.keys():
        raise UserError(f"a checkpoint predicts {', '.join(names)}; energy and forces are needed")

    def predict(structures: Sequence[Atoms]) -> tuple[np.ndarray, list[np.ndarray]]:
        energies, forces = [], []
        for chosen in pack(map(len, structures), max_atoms):
            batch = batch_of([structures[i] for i in chosen], task, double=double)
            found = predict_batch(unit, batch)
            energies.append(found[names["energy"]].detach().cpu().double().numpy().reshape(-1))
            of_batch = found[names["forces"]].detach().cpu().double().numpy()
            ends = np.cumsum([len(structures[i]) for i in chosen])[:-1]
            forces += np.split(of_batch, ends)
        return np.concatenate(energies), forces

    return predict


def batch_of(structures: Sequence[Atoms], task: str, *, double: bool = False) -> Any:
    """A batch without labels: with them, one of some with and some without cannot be made."""
    import torch
    from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch

    dtype = torch.float64 if double else torch.float32
    return atomicdata_list_to_batch(
        [AtomicData.from_ase(a.copy(), task_name=task, target_dtype=dtype) for a in structures]
    )


def load_unit(
    checkpoint: str | Path,
    *,
    task: str | None = None,
    device: str | None = None,
    double: bool = False,
) -> tuple[Any, str]:
    """Load a checkpoint of any model: its predict unit, and the data set that it predicts.

    Args:
        checkpoint: As `predictor` takes it.
        task: As `predictor` takes it.
        device: As `predictor` takes it.
        double: Compute in float64.

    Raises:
        UserError: No checkpoint there, or `task` is needed or unknown.
    """
    import torch
    from fairchem.core.units.mlip_unit import InferenceSettings, load_predict_unit

    from escaip_fairchem.describe import find_checkpoint
    from escaip_fairchem.train.evaluation import device_type

    path = find_checkpoint(Path(checkpoint))
    settings = InferenceSettings(
        compile=False, base_precision_dtype=torch.float64 if double else torch.float32
    )
    unit = load_predict_unit(path, device=device or device_type(), inference_settings=settings)
    known = sorted(unit.dataset_to_tasks)
    if task is None and len(known) == 1:
        task = known[0]
    if task not in known:
        raise UserError(f"--task {task}: {path} knows {', '.join(known)}; name one")
    return unit, task


def free_atoms(atoms: Atoms) -> np.ndarray:
    """Atoms that no FixAtoms holds, (N,) bool."""
    from ase.constraints import FixAtoms

    free = np.ones(len(atoms), bool)
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms):
            free[constraint.index] = False
    return free


def short_names(checkpoints: Sequence[str | Path]) -> list[str]:
    """Names for a legend: those of the runs, or as given where these are the same.

    Args:
        checkpoints: As `predictor` takes them.
    """
    names = [_run_name(Path(path)) for path in checkpoints]
    return names if len(set(names)) == len(names) else [str(path) for path in checkpoints]


def _run_name(path: Path) -> str:
    parts = path.resolve().parts
    if "checkpoints" in parts[1:]:
        return parts[parts.index("checkpoints") - 1]
    return path.stem if path.is_file() else path.resolve().name
