"""What a checkpoint is: read without running anything in it, and without a GPU."""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escaip_fairchem.config import EScAIPConfig
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

UNITS = {"energy": "eV", "forces": "eV/A", "stress": "eV/A^3", "noise": "A"}
_BACKBONES = ("escaip_fairchem.EScAIPBackbone", "escaip_fairchem.backbone.EScAIPBackbone", "escaip")
INFERENCE_NAME = "inference_ckpt.pt"


def describe(path: str | Path) -> dict[str, Any]:
    """Describe a checkpoint, or the newest one of a run.

    Args:
        path: Inference checkpoint, folder of a checkpoint, or folder of a run.

    Returns:
        Plain values: what `text` prints. Lengths in A, energies in eV, forces in eV/A.

    Raises:
        UserError: Nothing there, or not a checkpoint of this package.
    """
    from escaip_fairchem.train.denoising import belongs_to_denoising

    path = find_checkpoint(Path(path))
    checkpoint = load_safely(path)
    config = read_config(path, checkpoint.model_config["backbone"])
    weights = {k: v for k, v in checkpoint.model_state_dict.items() if k != "n_averaged"}
    sizes = {name: math.prod(weight.shape) for name, weight in weights.items()}
    denoising = sum(size for name, size in sizes.items() if belongs_to_denoising(name))
    heads = checkpoint.model_config["heads"]
    return {
        "checkpoint": str(path),
        "preset": config.preset,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "heads": {name: str(head["module"]).rpartition(".")[2] for name, head in heads.items()},
        "parameters": sum(sizes.values()) - denoising,
        "denoising_parameters": denoising,
        "cutoff": config.cutoff,
        "max_neighbors": config.max_neighbors,
        "graph": config.graph,
        "smooth": config.smooth,
        "forces": _kind_of_forces(config),
        "use_pbc": config.use_pbc,
        "changed": _changed(config),
        "tasks": [describe_task(task) for task in checkpoint.tasks_config],
        "averaged_steps": int((checkpoint.ema_state_dict or {}).get("n_averaged", 0)),
        "run": _run(path),
    }


def find_checkpoint(path: Path) -> Path:
    """The inference checkpoint that a path means.

    Args:
        path: The file, its folder, or the folder of a run (its newest is taken).

    Raises:
        UserError: If there is none.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"no checkpoint at {path}; a run writes checkpoints/*/{INFERENCE_NAME}")
    found = [*path.glob(INFERENCE_NAME), *path.glob(f"checkpoints/*/{INFERENCE_NAME}")]
    if not found:
        raise UserError(
            f"no {INFERENCE_NAME} and no checkpoints/*/{INFERENCE_NAME} in {path}; give a "
            "checkpoint or the folder of a run"
        )
    return max(found, key=lambda file: file.stat().st_mtime)


def load_safely(path: Path) -> Any:
    """Read an inference checkpoint of fairchem with an allow-list: no code in it is run.

    Args:
        path: The file.

    Returns:
        fairchem's ``MLIPInferenceCheckpoint``; weights stay on disk until they are used.

    Raises:
        UserError: Not such a checkpoint, or one that holds other objects than fairchem writes.
    """
    import torch
    from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint
    from omegaconf import DictConfig, ListConfig
    from omegaconf.base import ContainerMetadata, Metadata
    from omegaconf.nodes import AnyNode

    known = [MLIPInferenceCheckpoint, DictConfig, ListConfig, AnyNode, ContainerMetadata, Metadata]
    known += [(Any, "typing.Any"), defaultdict, dict, int, list]
    wrong = f"{path} is no inference checkpoint; a run writes checkpoints/*/{INFERENCE_NAME}"
    if not zipfile.is_zipfile(path):
        raise UserError(wrong)
    try:
        with torch.serialization.safe_globals(known):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{wrong}, and this file holds other objects") from error
    except (RuntimeError, EOFError) as error:
        raise UserError(f"{wrong}, and this file cannot be read") from error
    if not isinstance(checkpoint, MLIPInferenceCheckpoint):
        raise UserError(wrong)
    return checkpoint


def rises(metric: str) -> bool:
    """Whether a metric is better when it is larger."""
    return any(part in metric for part in ("cosine", "efwt", "within_threshold"))


def read_config(path: Path, backbone: Mapping[str, Any]) -> EScAIPConfig:
    """The configuration of a checkpoint's backbone, its preset filled in.

    Args:
        path: The checkpoint, for the message.
        backbone: As the checkpoint holds it.

    Raises:
        UserError: Another model's.
    """
    model = str(backbone["model"])
    if model not in _BACKBONES:
        builtin = model.startswith("fairchem") and "escaip" in model.lower()
        hint = ": import it with `escaip import-checkpoint IN OUT`" if builtin else ""
        owner = "fairchem's built-in EScAIP" if builtin else model
        raise UserError(f"{path} is a checkpoint of {owner}, not of this package{hint}")
    return EScAIPConfig.from_kwargs(**{k: v for k, v in backbone.items() if k != "model"})


def _kind_of_forces(config: EScAIPConfig) -> str:
    if not config.regress_forces:
        return "none"
    if not config.direct_forces:
        return "conservative"
    return "direct, equivariant" if config.force_weights == "scalar" else "direct"


def _changed(config: EScAIPConfig) -> dict[str, Any]:
    """Settings in which the model differs from its preset, sizes aside."""
    sizes = {key: getattr(config, key) for key in ("hidden_size", "num_layers", "num_heads")}
    plain = EScAIPConfig.from_kwargs(preset=config.preset, **sizes).to_dict()
    return {key: value for key, value in config.to_dict().items() if value != plain[key]}


def describe_task(task: Any) -> dict[str, Any]:
    """Plain values of a task, as a checkpoint stores it.

    Args:
        task: One of ``tasks_config``.

    Returns:
        Its name, property, unit, data sets, mean, rmsd, and element references by atomic number
        (those that are not zero).
    """
    references = task.get("element_references")
    energies = []
    if references is not None:
        energies = [float(value) for value in references["element_references"]["_args_"][0]]
    return {
        "name": task["name"],
        "property": task["property"],
        "unit": UNITS.get(task["property"], ""),
        "datasets": list(task["datasets"]),
        "mean": float(task["normalizer"]["mean"]),
        "rmsd": float(task["normalizer"]["rmsd"]),
        "references": {number: energy for number, energy in enumerate(energies) if energy},
    }


def _run(checkpoint: Path) -> dict[str, Any] | None:
    """What the folder of the run says, if the checkpoint still lies in it."""
    from omegaconf import OmegaConf

    if len(checkpoint.resolve().parents) < 3:
        return None
    folder = checkpoint.resolve().parents[2]
    config_path, summary_path = folder / "canonical_config.yaml", folder / "summary.json"
    if not config_path.exists():
        return None
    config = OmegaConf.load(config_path)
    loaders = OmegaConf.to_container(config.runner, resolve=True)
    summary = json.loads(summary_path.read_text()) if summary_path.exists() else {}
    sources = {
        split: loaders[f"{loader}_dataloader"]["dataset"]["src"]
        for split, loader in (("train", "train"), ("val", "eval"))
    }
    return {
        "folder": str(folder),
        "name": config.job.run_name,
        "data": sources,
        **{key: summary.get(key) for key in ("epochs", "wall_time_s", "device", "ranks")},
        "metrics": {name: values["last"] for name, values in summary.get("metrics", {}).items()},
        "versions": summary.get("versions"),
    }


def text(found: dict[str, Any]) -> str:
    """Lines that describe a checkpoint.

    Args:
        found: What `describe` returns.
    """
    from ase.data import chemical_symbols

    denoising = found["denoising_parameters"]
    cut = "soft" if found["graph"] == "soft_knn" else "strict"
    heads = ", ".join(f"{name} ({module})" for name, module in found["heads"].items())
    forces = {
        "conservative": "conservative: the gradient of the energy",
        "direct": "direct: not the gradient of the energy, equivariant as far as learnt",
        "direct, equivariant": "direct: not the gradient of the energy; exactly equivariant",
    }.get(found["forces"], found["forces"])
    lines = {
        "checkpoint": found["checkpoint"],
        "model": f"EScAIP, preset {found['preset']}, hidden {found['hidden_size']}, "
        f"{found['num_layers']} layers, {found['num_heads']} heads; "
        f"{found['parameters']:,} parameters"
        + (f", and {denoising:,} that only denoising uses, in training" if denoising else ""),
        "heads": heads,
        "forces": forces,
        "neighbours": f"{cut} nearest {found['max_neighbors']} within {found['cutoff']:g} A"
        + ("" if found["use_pbc"] else ", periodicity ignored"),
        "smooth": "yes" if found["smooth"] else "no: as published (docs/model.md)",
    }
    if found["changed"]:
        lines["set"] = ", ".join(f"{key}: {value}" for key, value in found["changed"].items())
    for task in found["tasks"]:
        lines[f"task {task['name']}"] = (
            f"{task['unit']}, mean {task['mean']:g}, rmsd {task['rmsd']:g}, "
            f"data set {', '.join(task['datasets'])}"
        )
        if task["property"] == "energy":
            known = [number for number in task["references"] if number < len(chemical_symbols)]
            elements = [chemical_symbols[number] for number in known]
            lines["energies"] = (
                f"total, element references of {len(elements)} elements: {' '.join(elements)}"
                if elements
                else "as labelled (adsorption or formation energies): no element references"
            )
    lines["trained"] = f"{found['averaged_steps']:,} steps in its average of weights"
    run = found["run"]
    if run is None:
        lines["run"] = "not beside this file, so its data and versions are not known"
    else:
        lines |= _run_lines(run)
    width = max(map(len, lines)) + 2
    return "\n".join(f"{name + ':':<{width}}{value}" for name, value in lines.items())


def _run_lines(run: dict[str, Any]) -> dict[str, str]:
    lines = {"run": f"{run['folder']} ({run['name']})"}
    lines["data"] = ", ".join(f"{split} {source}" for split, source in run["data"].items())
    if run["versions"] is None:
        return lines | {"versions": "no summary.json: the run has not ended"}
    lines["run took"] = f"{run['epochs']:g} epochs, {run['wall_time_s']:,.0f} s, {run['device']}"
    metrics = {
        name: value
        for name, value in run["metrics"].items()
        if name.startswith("val_") and isinstance(value, float)
    }
    lines["validation"] = ", ".join(f"{name[4:]} {value:.4g}" for name, value in metrics.items())
    lines["versions"] = ", ".join(f"{name} {value}" for name, value in run["versions"].items())
    return lines
