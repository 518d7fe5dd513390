"""Whether the data of a training can be read, and fit its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Subset

from escaip_fairchem.data import checks
from escaip_fairchem.data.frames import Frame
from escaip_fairchem.data.limits import judge, limits_of
from escaip_fairchem.data.references import NUM_REFERENCES
from escaip_fairchem.data.report import Inspection
from escaip_fairchem.data.survey import Facts, add_structure
from escaip_fairchem.errors import UserError
from escaip_fairchem.train.baselines import evenly_spaced
from escaip_fairchem.train.runner import instantiate

if TYPE_CHECKING:
    from escaip_fairchem.check.report import Report
    from escaip_fairchem.data.limits import Limits

#: Structures of each split that are looked at, evenly spaced.
SAMPLE = 100


def open_splits(config: Any, report: Report) -> dict[str, Any]:
    """Open train and val as the training does; those that can be opened.

    Args:
        config: The composed recipe.
        report: Takes sizes and problems.
    """
    splits = {}
    for name, loader in (("train", "train_dataloader"), ("val", "eval_dataloader")):
        with report.watch("data"):
            dataset = instantiate(config.runner[loader].dataset)
            natoms = atoms_of(dataset)
            splits[name] = dataset
            report.record(name, structures=len(natoms), atoms=int(natoms.sum()))
            report.ok(
                "data",
                f"{name}: {len(natoms):,} structures, {natoms.sum():,} atoms, "
                f"{natoms.min()} to {natoms.max()} each ({_where(dataset)})",
            )
    return splits


def atoms_of(dataset: Any) -> np.ndarray:
    """Atoms of every structure, (F,)."""
    return np.array(dataset.get_metadata("natoms", list(range(len(dataset)))))


def check_splits(config: Any, splits: dict[str, Any], report: Report) -> None:
    """Compare a sample of the structures with what the recipe assumes.

    Args:
        config: The composed recipe.
        splits: From `open_splits`.
        report: Takes the findings.
    """
    limits = limits_of(config)
    facts = Facts()
    for name, dataset in splits.items():
        with report.watch("data"):
            _look_at(dataset, name, facts, limits)
    if not len(facts):
        return
    references = limits.references[:NUM_REFERENCES]
    references = np.pad(references, (0, NUM_REFERENCES - len(references)))
    found = Inspection(facts, references, "of the recipe", limits.cutoff, limits.max_neighbors)
    above = found.residual * facts.natoms
    rms = float(np.sqrt(np.mean(np.square(above[np.isfinite(above)]))))
    natoms = np.concatenate([atoms_of(dataset) for dataset in splits.values()])
    for line in judge(facts, limits, found.cut()[1], rms, natoms):
        report.add(line[:5].strip(), "data", line[6:])


def _look_at(dataset: Any, split: str, facts: Facts, limits: Limits) -> None:
    """Read a sample of one split as the training does, and judge labels and units."""
    force_rms, stress_rms = [], []
    for index in evenly_spaced(dataset, SAMPLE):
        place = f"{split}, structure {index}"
        data = dataset[index]
        atoms = _atoms(dataset, index)
        add_structure(facts, split, Frame(atoms, Path(split), index), limits.cutoff, limits.use_pbc)
        forces = data.forces.numpy()
        try:
            checks.check_structure(
                atoms.numbers,
                atoms.positions,
                atoms.cell.array,
                atoms.pbc,
                energy=float(data.energy),
                forces=forces,
            )
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        force_rms.append(checks.component_rms(forces))
        if limits.stress and data.stress.isfinite().all():
            stress_rms.append(checks.component_rms(data.stress.numpy()))
    try:
        checks.check_scales(np.array(force_rms), np.array(stress_rms))
    except UserError as error:
        raise UserError(f"{split}: {error}") from None


def _atoms(dataset: Any, index: int) -> Any:
    """Structure `index` with all its labels."""
    part, within = dataset._get_dataset_and_sample_index(index)
    source = dataset.datasets[part]
    while isinstance(source, Subset):
        source, within = source.dataset, source.indices[within]
    return source.get_atoms(within)


def _where(dataset: Any) -> str:
    source = dataset.datasets[0]
    while isinstance(source, Subset):
        source = source.dataset
    return str(source.paths[0])
