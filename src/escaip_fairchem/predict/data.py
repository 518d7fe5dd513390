"""What a run of predictions reads: structures of all splits, in batches that the plan fixes."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch
from torch.utils.data import Dataset

from escaip_fairchem.data.datasets import create_dataset
from escaip_fairchem.data.energies import EXACT_ENERGY
from escaip_fairchem.data.formats.spice_molecules import subset_name
from escaip_fairchem.data.loaders import pack
from escaip_fairchem.errors import UserError
from escaip_fairchem.predict.parts import Split

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from fairchem.core.datasets.atomic_data import AtomicData

    from escaip_fairchem.predict.parts import Plan

Arrays = dict[str, np.ndarray]


class Structures(Dataset):
    """Structures of several splits by ``(split, row)``, each with its names and labels.

    Args:
        splits: Folders or files of each split, as `escaip_fairchem.data.datasets.create_dataset`
            takes them.
        task: Data set of the checkpoint whose tasks are predicted.
        dtype: Of the positions and cells that are predicted from; float32 if None.

    Raises:
        UserError: If a path holds no data.
    """

    def __init__(
        self,
        splits: Mapping[str, str | Sequence[str]],
        task: str,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.task = task
        self.precision = {} if dtype is None else {"target_dtype": dtype}
        # below fairchem's concatenation and shuffling, which the rows of a plan do without
        self.splits = {
            name: create_dataset(task, name, src, no_shuffle=True).datasets[0].dataset
            for name, src in splits.items()
        }

    def __getitem__(self, place: tuple[str, int]) -> tuple[AtomicData, Arrays]:
        """A structure without labels, and its arrays of a part."""
        split, row = place
        dataset = self.splits[split]
        atoms = dataset.get_atoms(row)
        data = dataset.a2g(atoms, sid="", **self.precision)
        data.dataset = self.task
        info = atoms.info
        arrays = {
            "row": np.array([row], np.int64),
            "natoms": np.array([len(atoms)], np.int32),
            "numbers": atoms.numbers.astype(np.uint8),
            "fixed": data.fixed.numpy().astype(bool),
            "sid": np.array([str(info.get("sid", row))]),
            "fid": np.array([str(info.get("fid", ""))]),
            # MACE-OFF's files of SPICE have it under the second name
            "subset": np.array([subset_name(str(info.get("subset", info.get("config_type", ""))))]),
            **_labels(data, atoms.calc.results if atoms.calc is not None else {}),
        }
        for name in ("energy", "forces", "stress", EXACT_ENERGY):
            if name in data:
                del data[name]
        return data, arrays


def _labels(data: AtomicData, results: Mapping[str, Any]) -> Arrays:
    """Labels of a structure, NaN where it has none."""
    labels = {
        "energy_label": np.full(1, np.nan),
        "forces_label": np.full((len(data.pos), 3), np.nan, np.float32),
        "stress_label": np.full((1, 9), np.nan, np.float32),
    }
    if EXACT_ENERGY in data:
        labels["energy_label"] = data[EXACT_ENERGY].numpy()
    if "forces" in data:
        labels["forces_label"] = data.forces.numpy()
    if "stress" in results:
        from ase.stress import voigt_6_to_full_3x3_stress

        stress = np.asarray(results["stress"], np.float32)
        full = voigt_6_to_full_3x3_stress(stress) if stress.size == 6 else stress
        labels["stress_label"] = full.reshape(1, 9)
    return labels


def collate(items: list[tuple[AtomicData, Arrays]]) -> tuple[AtomicData, Arrays]:
    """Make a batch, and the arrays of its structures in one."""
    structures, arrays = zip(*items, strict=True)
    return atomicdata_list_to_batch(list(structures)), join(list(arrays))


def join(pieces: list[Arrays]) -> Arrays:
    """Arrays of several pieces, one behind the other, as far as all of them have them."""
    common = [name for name in pieces[0] if all(name in piece for piece in pieces)]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in common}


def describe_splits(structures: Structures, sources: Mapping[str, str | Sequence[str]]) -> dict:
    """Splits of a plan: rows, and what tells the data from others."""
    return {
        name: Split(
            sources=(src,) if isinstance(src, str) else tuple(src),
            rows=len(structures.splits[name]),
            sha256=_digest(structures.splits[name]),
        )
        for name, src in sources.items()
    }


def _digest(dataset: Any) -> str:
    """Of names and sizes of the files, and of the atom counts, wherever the data lies."""
    digest = hashlib.sha256()
    for path in dataset.paths:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.suffix in (".aselmdb", ".db", ".lmdb"):
                digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            elif file.name == "metadata.npz":
                digest.update(file.read_bytes())
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """Of the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def batches_of(structures: Structures, plan: Plan, split: str, index: int) -> list[list[tuple]]:
    """The batches of a part, in the order of its rows; a large structure has one of its own."""
    rows = plan.rows(split, index)
    dataset = structures.splits[split]
    natoms = dataset.get_metadata("natoms", list(rows))
    if natoms is None:
        raise UserError(
            f"split {split}: {', '.join(plan.splits[split].sources)} has no metadata.npz with "
            "natoms, which batches are made by; convert it (escaip convert)"
        )
    return [[(split, rows[i]) for i in batch] for batch in pack(natoms, plan.settings["max_atoms"])]


def to_numpy(tensor: torch.Tensor, name: str) -> np.ndarray:
    """A prediction in the form of a part."""
    array = tensor.detach().cpu().numpy()
    if name == "energy":
        return array.reshape(-1).astype(np.float64)
    return array.reshape(-1, 3 if name == "forces" else 9).astype(np.float32)
