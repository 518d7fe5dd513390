"""What several tests share: small random models, structures, batches, predictions."""

from __future__ import annotations

import stat
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from ase import Atoms
from ase.build import add_adsorbate, fcc111, molecule
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch

from escaip_fairchem import EScAIP

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Sizes of the models in the tests.
SMALL = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "rbf_size": 40,
    "rbf_dim": 24,
    "species_dim": 16,
    "boo_dim": 8,
}


@cache
def small_model(*, conservative: bool = False, dtype=torch.float64, **backbone) -> EScAIP:
    """A random model in eval mode whose weights are all far from zero; shared, so do not change."""
    torch.manual_seed(0)
    config = {"model": "escaip_fairchem.EScAIPBackbone", **SMALL, **backbone}
    if conservative:
        config |= {"direct_forces": False, "regress_stress": True}
        heads = {"efs": {"module": "escaip_fairchem.ConservativeHead"}}
    else:
        heads = {
            "energy": {"module": "escaip_fairchem.EnergyHead"},
            "forces": {"module": "escaip_fairchem.DirectForceHead"},
        }
    model = EScAIP(backbone=config, heads=heads).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model.to(dtype)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, so that sums are always done in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_batch(*structures: Atoms, dtype=torch.float64) -> AtomicData:
    """fairchem's batch of structures, atoms left where they are (fairchem wraps them)."""
    items = []
    for atoms in structures:
        item = AtomicData.from_ase(atoms, task_name="oc20", target_dtype=dtype)
        item.pos = torch.tensor(atoms.positions, dtype=dtype)
        items.append(item)
    return atomicdata_list_to_batch(items)


def predict(model: EScAIP, *structures: Atoms) -> dict[str, np.ndarray]:
    """Energy [B], forces [N, 3] and, from a conservative model, stress [B, 3, 3]."""
    batch = make_batch(*structures, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        outputs = model(batch)
    values = {key: output[key].numpy() for key, output in outputs.items()}
    if "stress" in values:
        values["stress"] = values["stress"].reshape(-1, 3, 3)
    return values


def relative_error(got: np.ndarray, expected: np.ndarray, scale: float | None = None) -> float:
    """Largest difference over ``scale``, by default the largest expected number.

    NaN must be in the same places.
    """
    assert got.shape == expected.shape
    assert (np.isnan(got) == np.isnan(expected)).all()
    return float(np.nanmax(np.abs(got - expected)) / (scale or np.nanmax(np.abs(expected))))


def slab(*, pbc=(True, True, True), height: float = 20.0) -> Atoms:
    """Cu(111), two layers, with CO on it, rattled so that no neighbours tie."""
    atoms = fcc111("Cu", (3, 3, 2), vacuum=4.0)
    add_adsorbate(atoms, molecule("CO"), 1.9, "ontop")
    atoms.cell[2, 2] = height
    atoms.pbc = pbc
    atoms.rattle(0.08, seed=25)
    return atoms


def gas() -> Atoms:
    """Ethanol without a cell, rattled."""
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=2)
    return atoms


def triclinic() -> Atoms:
    """Five atoms in a skewed cell smaller than any cutoff, rattled so that no neighbours tie."""
    cell = [[4.1, 0.0, 0.0], [1.3, 3.8, 0.0], [-0.9, 1.1, 4.4]]
    places = [[0, 0, 0], [0.5, 0.45, 0.1], [0.1, 0.5, 0.55], [0.6, 0, 0.5], [0.3, 0.8, 0.8]]
    atoms = Atoms("TiO2CuC", scaled_positions=places, cell=cell, pbc=True)
    atoms.rattle(0.2, seed=83)
    return atoms


def one_atom() -> Atoms:
    """One atom in a cell without symmetry, smaller than any cutoff."""
    cell = [[2.5, 0.0, 0.0], [0.7, 2.6, 0.0], [-0.4, 0.9, 2.8]]
    return Atoms("Cu", cell=cell, pbc=True)


def executable(path: Path, text: str) -> Path:
    """A program of `text`, for tests to run in place of another."""
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
