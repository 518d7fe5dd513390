"""Checkpoints of fairchem's built-in EScAIP: names of weights, and the import.

fairchem-core 2.24 cannot load its own EScAIP checkpoints for inference. The built-in model
and preset ``v2`` are the same function of the same weights, up to names, to q, k, v in one
matrix, and to the sign of edge directions (ours point from the neighbour to the atom).
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from escaip_fairchem.config import EScAIPConfig
from escaip_fairchem.errors import UserError
from escaip_fairchem.files import whole_file

_ATTRIBUTES = [
    ("source_atomic_embedding", "attributes.source_species"),
    ("target_atomic_embedding", "attributes.target_species"),
    ("source_direction_embedding.0", "attributes.source_boo"),
    ("target_direction_embedding.0", "attributes.target_boo"),
    ("edge_distance_embedding.0", "attributes.distance"),
    ("edge_attr_linear.0", "attributes.output"),
    ("edge_attr_norm", "attribute_norm"),
]

#: Built-in module names -> ours, inside of the part named by the key's first component.
_BACKBONE = {
    "input_block": [
        (r"input_layer\.", ""),
        (r"edge_ffn\.0\.0", "ffn.up"),
        (r"edge_ffn\.1\.0", "ffn.down"),
        (r"^norm_node", "node_norm"),
        (r"^norm_edge", "edge_norm"),
    ],
    "transformer_blocks": [
        (r"graph_attention\.", "attention."),
        (r"node_hidden_linear\.0", "pair"),
        (r"edge_hidden_linear\.0", "edge"),
        (r"message_linear\.0", "message"),
        (r"attn_out_proj", "out"),
        (r"attn_in_proj_([qkv])", r"\1"),
        (r"feedforward\.mlp_(node|edge)\.0\.0", r"\1_ffn.up"),
        (r"feedforward\.mlp_(node|edge)\.1\.0", r"\1_ffn.down"),
        (r"norm_attn_(node|edge)", r"\1_attention_norm"),
        (r"norm_ffn_(node|edge)", r"\1_ffn_norm"),
    ],
    "readout_layers": [
        (r"^(\d+)\.(node|edge)_ffn\.0\.0", r"\2_readout.ffns.\1.up"),
        (r"^(\d+)\.(node|edge)_ffn\.1\.0", r"\2_readout.ffns.\1.down"),
        (r"^(\d+)\.pre_(node|edge)_norm", r"\2_readout.norms.\1"),
    ],
    "output_projection": [
        (r"(node|edge)_projection\.0", r"\1_readout.projection"),
        (r"output_norm_(node|edge)", r"\1_readout.output_norm"),
    ],
}
_PART = {
    "input_block": "input_block.",
    "transformer_blocks": "blocks.",
    "readout_layers": "",
    "output_projection": "",
}

_HEAD = [
    (r"^head\.", ""),
    (r"energy_layer", "energy"),
    (r"force_direction_layer", "direction"),
    (r"force_magnitude_layer", "magnitude"),
    (r"ffn\.0\.0", "ffn.up"),
    (r"ffn\.1\.0", "ffn.down"),
    (r"final_output\.0", "final"),
]

#: Classes of the built-in model -> ours.
_CLASSES = {
    "EScAIPEnergyHead": "escaip_fairchem.EnergyHead",
    "EScAIPDirectForceHead": "escaip_fairchem.DirectForceHead",
    "EScAIPGradientEnergyForceStressHead": "escaip_fairchem.ConservativeHead",
    "EScAIP_energy_head": "escaip_fairchem.EnergyHead",
    "EScAIP_direct_force_head": "escaip_fairchem.DirectForceHead",
    "EScAIP_grad_energy_force_stress_head": "escaip_fairchem.ConservativeHead",
}


def import_checkpoint(source: str | Path, target: str | Path) -> None:
    """Turn an inference checkpoint of the built-in EScAIP into one of this package.

    Args:
        source: ``inference_ckpt.pt`` of fairchem's built-in EScAIP, direct or gradient.
        target: File to write; must not exist.

    Raises:
        UserError: Not such a checkpoint, options that do not exist here, or weights that
            do not fit the configuration.
    """
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise UserError(f"no checkpoint at {source}")
    if target.exists():
        raise UserError(f"{target} exists; name a file that does not")
    if not zipfile.is_zipfile(source):
        raise UserError(f"{source} is no inference checkpoint of fairchem's EScAIP")
    # fairchem's own format: a pickled dataclass, so only for files that the user trusts
    checkpoint = torch.load(source, map_location="cpu", weights_only=False)
    model = getattr(checkpoint, "model_config", None)
    if model is None or "escaip" not in str(model.get("backbone", {}).get("model", "")).lower():
        raise UserError(f"{source} is no inference checkpoint of fairchem's EScAIP")
    model = _plain(model)
    checkpoint.model_config = _model_config(model)
    conservative = not checkpoint.model_config["backbone"]["direct_forces"]
    if (
        checkpoint.ema_state_dict is None
    ):  # trained with ema_decay: null, which fairchem cannot load
        weights = {f"module.{k}": v for k, v in checkpoint.model_state_dict.items()}
        checkpoint.ema_state_dict = {"n_averaged": torch.tensor(1)} | weights
    for name in ("model_state_dict", "ema_state_dict"):
        weights = getattr(checkpoint, name)
        setattr(checkpoint, name, _converted(weights, conservative=conservative))
    _check_fit(checkpoint, source)
    with whole_file(target) as partial:
        torch.save(checkpoint, partial)


def convert_state_dict(weights: dict[str, Tensor], *, conservative: bool) -> dict[str, Tensor]:
    """Weights of the built-in HydraModel under the names of `escaip_fairchem.EScAIP`.

    Args:
        weights: ``backbone.*`` and ``output_heads.*`` of the built-in model.
        conservative: Whether forces come by differentiation; drops the head norm that the
            built-in gradient head owns and never applies.

    Returns:
        The same tensors, renamed; q, k and v in one; the force direction with its sign turned.

    Raises:
        UserError: A weight that has no place here.
    """
    converted: dict[str, Tensor] = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        name = _renamed(key)
        projection = re.fullmatch(r"(.*attention)\.([qkv])\.(weight|bias)", name)
        if projection:
            stem, which, kind = projection.groups()
            qkv.setdefault(f"{stem}.qkv.{kind}", {})[which] = value
        elif conservative and re.fullmatch(r"output_heads\..*\.node_norm\.\w+", name):
            continue
        else:
            turned = name.endswith("direction.final.weight")
            converted[name] = -value if turned else value
    for name, parts in qkv.items():
        converted[name] = torch.cat([parts[which] for which in "qkv"])
    return converted


def _renamed(key: str) -> str:
    top, _, rest = key.partition(".")
    if top == "backbone":
        part, _, inner = rest.partition(".")
        if part in _BACKBONE:
            for old, new in _ATTRIBUTES:
                inner = inner.replace(old, new)
            return f"backbone.{_PART[part]}{_substituted(inner, _BACKBONE[part])}"
    if top == "output_heads":
        head, _, inner = rest.partition(".")
        return f"output_heads.{head}.{_substituted(inner, _HEAD)}"
    raise UserError(f"weight {key!r} of the checkpoint has no place in this package's EScAIP")


def _substituted(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _converted(weights: dict[str, Tensor], *, conservative: bool) -> dict[str, Tensor]:
    """Convert under the ``module.`` prefixes of DDP and EMA, whose counter stays."""
    counter = {k: v for k, v in weights.items() if k == "n_averaged"}
    named = {k: v for k, v in weights.items() if k != "n_averaged"}
    prefix = re.match(r"(module\.)*", next(iter(named))).group()
    stripped = {k.removeprefix(prefix): v for k, v in named.items()}
    converted = convert_state_dict(stripped, conservative=conservative)
    return counter | {prefix + k: v for k, v in converted.items()}


def _model_config(model: dict[str, Any]) -> dict[str, Any]:
    backbone = {k: v for k, v in model["backbone"].items() if k != "model"}
    config = EScAIPConfig.from_kwargs(preset="v2", **backbone)
    if not config.direct_forces:
        backbone["energy_head_norm"] = False
    config = EScAIPConfig.from_kwargs(preset="v2", **backbone)
    heads = {name: _head_config(head) for name, head in model["heads"].items()}
    return {
        "_target_": "escaip_fairchem.EScAIP",
        "backbone": {"model": "escaip_fairchem.EScAIPBackbone", **config.to_dict()},
        "heads": heads,
    }


def _head_config(head: dict[str, Any]) -> dict[str, Any]:
    """Our head for a built-in one, bare or in fairchem's per-dataset wrapper."""
    if head["module"].endswith("DatasetSpecificSingleHeadWrapper"):
        inner = _head_class(head["head_cls"])
        if not inner.endswith("ConservativeHead"):
            raise UserError(f"head {head['head_cls']!r} in a per-dataset wrapper is not supported")
        return {"module": inner, "prefix": list(head["dataset_names"])}
    module = {"module": _head_class(head["module"])}
    return module | ({"prefix": head["prefix"]} if head.get("prefix") else {})


def _head_class(name: str) -> str:
    short = name.rpartition(".")[2]
    if short not in _CLASSES:
        raise UserError(f"head {name!r} of the checkpoint has no counterpart in this package")
    return _CLASSES[short]


def _plain(value: Any) -> Any:
    """Plain dictionaries and lists from OmegaConf's."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _check_fit(checkpoint: Any, source: Path) -> None:
    """The converted weights must fill the model exactly."""
    import hydra

    model = hydra.utils.instantiate(checkpoint.model_config)
    weights = {k.removeprefix("module."): v for k, v in checkpoint.model_state_dict.items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"weights of {source} do not fit its configuration: {reason}") from error
