"""Times the authors' model in its own environment: ``PYTHON authors_worker.py TASK ANSWER``.

Run by `authors` with the Python of that environment; needs nothing of this package. TASK is a JSON
file: their folder, a configuration in it and what to change there, threads and structures. ANSWER
is a file of torch: random weights by the names of their modules, energy and forces. Then each line
of the input makes a turn, and its seconds are a line of the output.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main(task_file: str, answer_file: str) -> None:
    """Write ANSWER, then take turns until the input ends."""
    # what their packages print must not come between the seconds
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    with open(task_file) as file:
        task = json.load(file)
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    sys.path[0] = task["folder"]  # instead of the folder of this file
    modules = _modules(task)
    batch = _batch(task["structures"])
    weights = _perturbed(modules, task["perturbation"])

    def evaluate() -> dict:
        data = batch.clone()
        with torch.no_grad():
            embedding = modules["backbone"](data)
            heads = (modules["energy_head"], modules["force_head"])
            energy, forces = (head(data, embedding) for head in heads)
        return {"energy": energy["energy"].flatten(), "forces": forces["forces"]}

    answer = {**evaluate(), "weights": weights, "versions": _versions()}
    torch.save(answer, answer_file)
    for _ in sys.stdin:
        start = time.process_time()
        evaluate()
        print(time.process_time() - start, file=results, flush=True)


def _modules(task: dict) -> dict:
    """Backbone and heads in eval mode."""
    import torch
    import yaml
    from src.EScAIP import EScAIPBackbone, EScAIPDirectForceHead, EScAIPEnergyHead

    with open(os.path.join(task["folder"], task["config"])) as file:
        config = yaml.safe_load(file)["model"]["backbone"]
    config.pop("model")
    backbone = EScAIPBackbone(**{**config, **task["changes"]})
    torch.set_float32_matmul_precision("highest")  # which the backbone lowers
    heads = {"energy_head": EScAIPEnergyHead, "force_head": EScAIPDirectForceHead}
    modules = {"backbone": backbone, **{name: head(backbone) for name, head in heads.items()}}
    return {name: module.eval() for name, module in modules.items()}


def _perturbed(modules: dict, by: float) -> dict:
    """Their weights, moved so that none is zero or one."""
    import torch

    with torch.no_grad():
        for module in modules.values():
            for parameter in module.parameters():
                parameter.add_(by * torch.randn_like(parameter))
    return {
        f"{module}/{name}": tensor
        for module in modules
        for name, tensor in modules[module].state_dict().items()
    }


def _batch(structures: list):
    from ase import Atoms
    from fairchem.core.datasets import data_list_collater
    from fairchem.core.preprocessing import AtomsToGraphs

    convert = AtomsToGraphs(r_edges=False, r_pbc=True).convert
    graphs = [convert(Atoms(**structure)) for structure in structures]
    return data_list_collater(graphs, otf_graph=True)


def _versions() -> str:
    from importlib.metadata import version

    import torch

    return f"fairchem-core {version('fairchem-core')}, torch {torch.__version__}"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
