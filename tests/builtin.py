"""fairchem's built-in EScAIP beside this package's, on the same weights and structures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ase.build import add_adsorbate, bulk, fcc111, fcc211, molecule

from data_helpers import read_sample
from escaip_fairchem.bench import pair
from escaip_fairchem.bench.pair import batch_of, model_pair, outputs

if TYPE_CHECKING:
    from pathlib import Path

    from ase import Atoms

__all__ = ["batch_of", "model_pair", "outputs"]

#: Sizes of the models in the tests; nothing overflows 60 slots, whatever the structure.
SMALL = {
    "hidden_size": 128,
    "num_layers": 2,
    "edge_distance_embedding_size": 64,
    "atten_num_heads": 2,
    "atten_name": "math",
    "max_batch_size": 16,
    "knn_pad_size": 60,
}


def builtin_config(**changes) -> dict:
    """Backbone keys of the built-in model, small; padding and compile off."""
    return pair.builtin_config(**(SMALL | changes))


def periodic_structures(data: Path | None) -> dict[str, list[Atoms]]:
    """Named batches with pbc TTT (the built-in ignores `pbc`): slabs, crystals, boxed molecules."""
    slab = fcc111("Cu", (3, 3, 4), vacuum=8, periodic=True)
    add_adsorbate(slab, "O", 1.5, "fcc")
    step = fcc211("Pt", (3, 2, 3), vacuum=8, orthogonal=True)
    step.pbc = True
    large = fcc111("Al", (5, 5, 8), vacuum=8, periodic=True)
    crystals = {
        "fe_1": bulk("Fe"),
        "cu_4": bulk("Cu", cubic=True),
        "nacl_8": bulk("NaCl", "rocksalt", 5.6, cubic=True),
        "si_2": bulk("Si"),
        "mg_2": bulk("Mg"),
        "zno_4": bulk("ZnO", "wurtzite", 3.25, c=5.2),
        "cscl_2": bulk("CsCl", "cesiumchloride", 4.1),
        "triclinic_8": bulk("NaCl", "rocksalt", 5.6) * (2, 2, 1),
    }
    molecules = {name: molecule(name) for name in ("H2O", "CH3CH2OH", "C6H6", "NH3", "CO")}
    for atoms in molecules.values():
        atoms.center(vacuum=9)
        atoms.pbc = True
    single = {"fcc111_37": slab, "fcc211_18": step, "fcc111_200": large} | crystals | molecules
    for index, atoms in enumerate(single.values()):
        atoms.rattle(0.08, seed=index)
    batches = {name: [atoms] for name, atoms in single.items()}
    batches["mixed"] = [slab, crystals["fe_1"], molecules["C6H6"], crystals["nacl_8"]]
    if data is not None:
        for file, picks in {"oc20": "::300", "oc22": "::8", "mptrj": "3:680:70"}.items():
            for index, atoms in enumerate(read_sample(data / f"{file}_sample.extxyz.gz", picks)):
                if len(atoms) <= 90:
                    batches[f"{file}_{index}"] = [atoms]
    return batches


def molecular_structures(data: Path | None) -> dict[str, list[Atoms]]:
    """Named batches without a cell, one atom included."""
    batches = {"H": [molecule("H")], "mixed": [molecule("CH4"), molecule("O"), molecule("C60")]}
    if data is not None:
        for index, atoms in enumerate(read_sample(data / "spice_sample.extxyz.gz", "::100")):
            batches[f"spice_{index}"] = [atoms]
    return batches
