"""Weight names of the authors' V1 code (ASK-Berkeley/EScAIP at cea229e) and of this package."""

from __future__ import annotations

from typing import Any

from escaip_fairchem.errors import UserError

ATTRIBUTES = {
    "source_atomic_embedding": "source_species",
    "target_atomic_embedding": "target_species",
    "source_direction_embedding.0": "source_boo",
    "target_direction_embedding.0": "target_boo",
    "edge_distance_embedding.0": "distance",
    "edge_linear.0": "output",
}
ATTENTION = {
    "node_linear.0": "pair",
    "message_linear.0": "message",
    "multi_head_attention.out_proj": "out",
}
FEED_FORWARD = {"0.0": "up", "1.0": "down"}
OUTPUTS = {
    "energy_head/energy_layer": "output_heads.energy.energy",
    "force_head/force_direction_layer": "output_heads.forces.direction",
    "force_head/force_magnitude_layer": "output_heads.forces.magnitude",
}
_FOREIGN = "the weights are not those of the authors' cea229e"
WITHOUT_BIAS = ("embedding", "norm", "norm_attn", "final_output.0")


def names(layers: int, *, direct: bool = True) -> dict[str, str]:
    """Their name -> ours, for a model with direct forces, or with a conservative head."""
    modules = {
        "backbone/input_block.input_layer.norm": "backbone.input_block.attribute_norm",
        "backbone/input_block.norm.node_norm": "backbone.input_block.node_norm",
        "backbone/input_block.norm.edge_norm": "backbone.input_block.edge_norm",
    }
    tensors = {}

    def several(theirs: str, ours: str, parts: dict[str, str]) -> None:
        modules.update({f"{theirs}.{a}": f"{ours}.{b}" for a, b in parts.items()})

    several("backbone/input_block.input_layer", "backbone.input_block.attributes", ATTRIBUTES)
    several("backbone/input_block.input_layer.edge_ffn", "backbone.input_block.ffn", FEED_FORWARD)
    for index in range(layers):
        theirs, ours = f"backbone/transformer_blocks.{index}", f"backbone.blocks.{index}"
        attention = f"{theirs}.graph_attention"
        several(attention, f"{ours}.attention.attributes", ATTRIBUTES)
        several(attention, f"{ours}.attention", ATTENTION)
        product = f"{attention}.multi_head_attention.in_proj"
        tensors[f"{product}_weight"] = f"{ours}.attention.qkv.weight"
        tensors[f"{product}_bias"] = f"{ours}.attention.qkv.bias"
        tensors[f"{attention}.attn_scalar"] = f"{ours}.attention.cosine_scale"
        modules[f"{theirs}.norm_attn"] = f"{ours}.node_attention_norm"
        for kind in ("node", "edge"):
            modules[f"{theirs}.norm_ffn.{kind}_norm"] = f"{ours}.{kind}_ffn_norm"
            several(f"{theirs}.feedforward.mlp_{kind}", f"{ours}.{kind}_ffn", FEED_FORWARD)
    for kind, purpose in (("node", "energy"), ("edge", "force")):
        ours = f"backbone.{kind}_readout"
        for index in range(layers + 1):
            theirs = f"backbone/readout_layers.{index}.{purpose}"
            several(f"{theirs}_ffn", f"{ours}.ffns.{index}", FEED_FORWARD)
            modules[f"{theirs}_norm"] = f"{ours}.norms.{index}"
        theirs = "backbone/output_projection"
        modules[f"{theirs}.{kind}_projection.0"] = f"{ours}.projection"
        modules[f"{theirs}.readout_norm.{kind}_norm"] = f"{ours}.concat_norm"
        modules[f"{theirs}.output_norm.{kind}_norm"] = f"{ours}.output_norm"
    for theirs, ours in OUTPUTS.items():
        several(f"{theirs}.ffn", f"{ours}.ffn", FEED_FORWARD)
        modules[f"{theirs}.final_output.0"] = f"{ours}.final"
    for theirs, ours in modules.items():
        tensors[f"{theirs}.weight"] = f"{ours}.weight"
        if not theirs.endswith(WITHOUT_BIAS):
            tensors[f"{theirs}.bias"] = f"{ours}.bias"
    return tensors if direct else {a: b for a, b in tensors.items() if not _edge_only(b)}


def _edge_only(ours: str) -> bool:
    """Whether a tensor of ours exists for direct forces only."""
    return any(part in ours for part in ("edge_", "output_heads.forces"))


def to_package(
    weights: dict[str, Any], own: dict[str, Any], layers: int, *, direct: bool = True
) -> dict[str, Any]:
    """Weights under our names.

    Args:
        weights: Their name -> tensor, of a model with direct forces.
        own: State of our model, whose names and shapes the result has.
        layers: Of both models.
        direct: Whether our model has direct forces; otherwise theirs of the edges are left out.

    Raises:
        UserError: A name of either side has no counterpart, or one of another shape.
    """
    table = names(layers, direct=direct)
    alone = (set(names(layers)) ^ set(weights)) | (set(table.values()) ^ set(own))
    if alone:
        raise UserError(f"{_FOREIGN}: {min(alone)}")
    named = {ours: weights[theirs] for theirs, ours in table.items()}
    for name, tensor in named.items():
        found, expected = list(tensor.shape), list(own[name].shape)
        if found != expected:
            raise UserError(f"{_FOREIGN}: {name} is {found}, not {expected}")
    return named
