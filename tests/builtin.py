"""fairchem's built-in EScAIP beside this package's, on the same weights and structures."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from ase.build import add_adsorbate, bulk, fcc111, fcc211, molecule
from ase.io import read
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.models.base import HydraModel

from escaip_fairchem import EScAIP
from escaip_fairchem.checkpoint import convert_state_dict

if TYPE_CHECKING:
    from pathlib import Path

    from ase import Atoms

BUILTIN = "fairchem.core.models.escaip.EScAIP."


def builtin_config(*, direct: bool, stress: bool = False, use_pbc: bool = True, **changes) -> dict:
    """Backbone keys of the built-in model, small; padding and compile off."""
    config = {
        "regress_forces": True,
        "direct_forces": direct,
        "regress_stress": stress,
        "use_pbc": use_pbc,
        "hidden_size": 128,
        "num_layers": 2,
        "edge_distance_embedding_size": 64,
        "atten_num_heads": 2,
        "atten_name": "math",
        "max_num_elements": 110,
        "max_atoms": 300,
        "max_batch_size": 16,
        "max_radius": 6.0,
        "knn_k": 30,
        "knn_soft": True,
        "knn_sigmoid_scale": 0.2,
        "knn_lse_scale": 0.1,
        "knn_use_low_mem": True,
        "knn_pad_size": 60,
        "use_compile": False,
        "use_padding": False,
    }
    return config | changes


def model_pair(config: dict, seed: int = 0) -> tuple[HydraModel, EScAIP]:
    """The built-in model with random weights away from their start, and ours with the same."""
    torch.manual_seed(seed)
    direct = config["direct_forces"]
    if direct:
        heads = {"energy": "EScAIPEnergyHead", "forces": "EScAIPDirectForceHead"}
        heads = {name: {"module": BUILTIN + cls} for name, cls in heads.items()}
        own_heads = {
            "energy": {"module": "escaip_fairchem.EnergyHead"},
            "forces": {"module": "escaip_fairchem.DirectForceHead"},
        }
    else:
        # wrap_property: True crashes upstream (a dict is taken for a tensor)
        cls = BUILTIN + "EScAIPGradientEnergyForceStressHead"
        heads = {"efs": {"module": cls, "wrap_property": False}}
        own_heads = {"efs": {"module": "escaip_fairchem.ConservativeHead"}}
    reference = HydraModel(
        backbone={"model": BUILTIN + "EScAIPBackbone", **copy.deepcopy(config)},
        heads=heads,
        pass_through_head_outputs=not direct,
    )
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    own = EScAIP(
        backbone={
            "model": "escaip_fairchem.EScAIPBackbone",
            "preset": "v2",
            "energy_head_norm": direct,
            **config,
        },
        heads=own_heads,
    )
    own.load_state_dict(convert_state_dict(reference.state_dict(), conservative=not direct))
    return reference.eval(), own.eval()


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
            for index, atoms in enumerate(read(data / f"{file}_sample.extxyz.gz", picks)):
                if len(atoms) <= 90:
                    batches[f"{file}_{index}"] = [atoms]
    return batches


def molecular_structures(data: Path | None) -> dict[str, list[Atoms]]:
    """Named batches without a cell, one atom included."""
    batches = {"H": [molecule("H")], "mixed": [molecule("CH4"), molecule("O"), molecule("C60")]}
    if data is not None:
        for index, atoms in enumerate(read(data / "spice_sample.extxyz.gz", "::100")):
            batches[f"spice_{index}"] = [atoms]
    return batches


def batch_of(structures: list[Atoms]) -> AtomicData:
    """fairchem's batch of the structures."""
    return atomicdata_list_to_batch([AtomicData.from_ase(a, task_name="oc20") for a in structures])


def outputs(model, batch: AtomicData) -> dict[str, torch.Tensor]:
    """{property: tensor} of either model, computed on a copy of the batch."""
    result = model(batch.clone())
    return {k: v[k] if isinstance(v, dict) else v for k, v in result.items()}
