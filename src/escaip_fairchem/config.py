"""The flat model configuration: one dataclass, validated once, unknown keys refused."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from escaip_fairchem.errors import UserError

#: The authors' channel split over l = 0..4 for a head size of 64.
PUBLISHED_FREQUENCIES = (20, 10, 4, 10, 20)

#: What a preset fixes. The first four keys are structure, the rest are details.
PRESETS: dict[str, dict[str, Any]] = {
    # NeurIPS 2024; ASK-Berkeley/EScAIP at cea229e, energies summed over atoms.
    "paper": {
        "graph": "knn",
        "angular": "cosine",
        "message": "pair",
        "pooling": "mean",
        "layout": "paper",
        "cutoff": 12.0,
        "max_neighbors": 20,
        "max_num_elements": 90,
        "boo_scale": "component",
        "mlp_dropout": 0.05,
        "node_ffn_dropout": 0.05,
        "edge_ffn_dropout": 0.05,
        "scalar_output_dropout": 0.05,
        "vector_output_dropout": 0.05,
        "attention_dropout": 0.1,
        "energy_head_gain": 0.01,
    },
    # The authors' 2025 form; fairchem-core 2.24 models/escaip.
    "v2": {
        "graph": "soft_knn",
        "angular": "legendre",
        "message": "pair_and_edge",
        "pooling": "self",
        "layout": "v2",
        "cutoff": 6.0,
        "max_neighbors": 30,
        "max_num_elements": 110,
        "boo_scale": "unit",
        "mlp_dropout": 0.0,
        "node_ffn_dropout": 0.0,
        "edge_ffn_dropout": 0.0,
        "scalar_output_dropout": 0.0,
        "vector_output_dropout": 0.0,
        "attention_dropout": 0.0,
        "energy_head_gain": 1.0,
    },
}

#: Keys of fairchem's built-in EScAIP and of the authors' code -> ours.
ALIASES = {
    "atten_num_heads": "num_heads",
    "atten_dropout": "attention_dropout",
    "stochastic_depth_prob": "stochastic_depth",
    "max_radius": "cutoff",
    "knn_k": "max_neighbors",
    "knn_sigmoid_scale": "rank_scale",
    "knn_lse_scale": "envelope_scale",
    "freequency_list": "frequency_list",
    "atom_embedding_size": "species_dim",
    "node_direction_embedding_size": "boo_dim",
    "edge_distance_expansion_size": "rbf_size",
    "edge_distance_embedding_size": "rbf_dim",
    "ffn_hidden_layer_multiplier": "ffn_multiplier",
    "readout_hidden_layer_multiplier": "readout_multiplier",
    "output_hidden_layer_multiplier": "output_multiplier",
    "normalization": "norm",
    "direct_force": "direct_forces",
}

#: Foreign keys that change no number here: padding, batching and kernels are not settings.
WITHOUT_EFFECT = frozenset(
    [
        "use_compile",
        "use_padding",
        "max_atoms",
        "max_batch_size",
        "batch_size",
        "max_num_nodes_per_batch",
        "knn_pad_size",
        "atten_name",
        "dataset_list",
        "otf_graph",
        "use_pbc_single",
        "angle_expansion_size",
        "angle_embedding_size",
    ]
)

#: Foreign options of which only the published value exists here.
ONLY_VALUE = {
    "knn_soft": True,
    "knn_use_low_mem": True,
    "use_envelope": True,
    "use_fp16_backbone": False,
    "use_message_gate": False,
    "use_graph_attention": False,
    "use_global_readout": False,
    "enforce_max_neighbors_strictly": True,
    "distance_function": "gaussian",
}

#: The values that a key with a list of them may have.
CHOICES = {
    "preset": ("paper", "v2"),
    "graph": ("knn", "soft_knn"),
    "angular": ("none", "cosine", "legendre"),
    "message": ("pair", "pair_and_edge"),
    "pooling": ("mean", "self"),
    "layout": ("paper", "v2"),
    "boo_scale": ("component", "unit"),
    "energy_reduce": ("sum", "mean"),
    "force_weights": ("vector", "scalar"),
    "init": ("published", "resolved"),
    "checkpointing": ("none", "pointwise", "block"),
    "norm": ("rmsnorm", "layernorm", "skip"),
    "activation": ("gelu", "relu", "leaky_relu", "squared_relu", "smelu", "star_relu"),
    "neighbor_search": ("auto", "fairchem", "vesin", "nvidia"),
}


@dataclass(frozen=True)
class EScAIPConfig:
    """Every choice of the model, flat; build it with `EScAIPConfig.from_kwargs`.

    Lengths are in Angstrom. ``None`` in a field below means "as the preset has it".
    Sources: the paper (arXiv 2410.24169), ASK-Berkeley/EScAIP at cea229e for ``paper``,
    fairchem-core 2.24 ``models/escaip`` for ``v2``.
    """

    preset: str = "v2"

    # size
    hidden_size: int = 512
    num_layers: int = 10
    num_heads: int = 8

    # structure (see PRESETS)
    graph: str = None
    angular: str = None
    message: str = None
    pooling: str = None
    layout: str = None  # where the norms and residuals sit

    # neighbours
    cutoff: float = None
    max_neighbors: int = None
    rank_scale: float = 0.2  # soft_knn: width of a rank step, Angstrom
    envelope_scale: float = 0.1  # soft_knn: temperature of the soft maximum
    smooth: bool = False  # energy twice differentiable; False equals the publication
    use_pbc: bool = True  # False treats every structure as a molecule
    neighbor_search: str = "auto"

    # features
    max_num_elements: int = None  # atomic numbers must be below this
    species_dim: int = 128
    boo_lmax: int = 9
    boo_dim: int = 64
    boo_scale: str = None
    rbf_size: int = 600
    rbf_dim: int = 512
    rbf_width: float = 2.0  # Gaussian width in units of their spacing
    frequency_list: tuple[int, ...] = None  # channels per l; None scales [20,10,4,10,20]

    # layers
    activation: str = "gelu"
    norm: str = "rmsnorm"
    ffn_multiplier: int = 2
    readout_multiplier: int = 2
    output_multiplier: int = 2
    mlp_dropout: float = None
    node_ffn_dropout: float = None
    edge_ffn_dropout: float = None
    scalar_output_dropout: float = None
    vector_output_dropout: float = None
    attention_dropout: float = None
    stochastic_depth: float = 0.0

    # outputs
    direct_forces: bool = True
    regress_forces: bool = True
    regress_stress: bool = False
    direct_stress: bool = False
    energy_reduce: str = "sum"
    energy_head_norm: bool = True  # False: the built-in's gradient head, which skips it
    energy_head_gain: float = None
    force_weights: str = "vector"  # "scalar" makes direct forces exactly equivariant
    force_encoding: bool = False  # for denoising: forces as an input, in training only

    # training memory: keep everything | of a direct model, compute activations, norms and gathers
    # again in the backward pass | compute whole blocks again
    checkpointing: str = "pointwise"
    inference_chunk: int = 0  # without gradients, atoms at a time; 0: all at once

    # everything after the graph by torch.compile, for GPUs; in evaluation as CUDA graphs besides
    compile: bool = False
    cuda_graphs: bool = False

    init: str = "published"  # "resolved": distances and species tell edges apart from the start

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EScAIPConfig:
        """Resolve aliases, fill in the preset, validate.

        Args:
            **kwargs: Keys of this class, or of fairchem's built-in EScAIP.

        Returns:
            The validated configuration.

        Raises:
            UserError: An unknown key (the nearest valid one is named) or a bad value.
        """
        values = _translate(kwargs)
        preset = values.setdefault("preset", cls.preset)
        _require(preset in tuple(PRESETS), f"preset: {preset!r} is not one of {', '.join(PRESETS)}")
        for key, default in PRESETS[preset].items():
            if values.get(key) is None:
                values[key] = default
        if values.get("frequency_list") is not None:
            values["frequency_list"] = _channels(values["frequency_list"])
        config = cls(**values)
        config._validate_values()
        return config._with_frequencies()

    @property
    def head_size(self) -> int:
        """Channels per attention head."""
        return self.hidden_size // self.num_heads

    @property
    def edge_outputs(self) -> bool:
        """Whether a head reads edge features (direct forces or direct stress)."""
        return (self.regress_forces and self.direct_forces) or self.direct_stress

    @property
    def recompute(self) -> bool:
        """Whether cheap operations are repeated in the backward pass."""
        return self.checkpointing != "none"

    @property
    def is_random(self) -> bool:
        """Whether training drops anything out, so that a pass cannot simply be repeated."""
        rates = [name for name in vars(self) if name.endswith("_dropout")]
        return any(getattr(self, name) for name in (*rates, "stochastic_depth"))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, lists instead of tuples, as stored in a checkpoint."""
        values = dataclasses.asdict(self)
        values["frequency_list"] = list(self.frequency_list)
        return values

    def _validate_values(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field, getattr(self, field.name))
        for key, allowed in CHOICES.items():
            value = getattr(self, key)
            _require(value in allowed, f"{key}: {value!r} is not one of {', '.join(allowed)}")
        positive = [
            "hidden_size",
            "num_layers",
            "num_heads",
            "cutoff",
            "max_neighbors",
            "rank_scale",
            "envelope_scale",
            "max_num_elements",
            "species_dim",
            "boo_dim",
            "rbf_dim",
            "rbf_width",
            "ffn_multiplier",
            "readout_multiplier",
            "output_multiplier",
            "energy_head_gain",
        ]
        for key in positive:
            _require(getattr(self, key) > 0, f"{key}: {getattr(self, key)!r} must be positive")
        for field in dataclasses.fields(self):
            if field.name.endswith("dropout") or field.name == "stochastic_depth":
                value = getattr(self, field.name)
                _require(0 <= value < 1, f"{field.name}: {value!r} must be in [0, 1)")
        _require(self.rbf_size > 1, f"rbf_size: {self.rbf_size!r} must be at least 2")
        _require(self.inference_chunk >= 0, "inference_chunk must not be negative")
        _require(
            self.compile or not self.cuda_graphs,
            "cuda_graphs: true needs compile: true",
        )
        _require(
            not (self.compile and self.checkpointing == "block"),
            "compile: true decides itself what training keeps; set checkpointing to pointwise",
        )
        _require(self.boo_lmax >= 0, f"boo_lmax: {self.boo_lmax!r} must not be negative")
        _require(
            self.hidden_size % self.num_heads == 0,
            f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}",
        )
        _require(
            self.pooling != "self" or self.graph == "soft_knn",
            "pooling: self needs graph: soft_knn, where slot 0 is the atom itself",
        )
        _require(
            not self.smooth or self.graph == "soft_knn",
            "smooth: true needs graph: soft_knn (preset v2); a hard cut is not continuous",
        )
        _require(
            not (self.layout == "paper" and self.norm == "layernorm"),
            "norm: layernorm is not available in preset paper; use rmsnorm or skip",
        )
        _require(
            not (self.direct_stress and not self.direct_forces),
            "direct_stress: true needs direct_forces: true; use ConservativeHead's stress",
        )
        _require(
            not (self.regress_stress and self.direct_forces),
            "regress_stress: true needs direct_forces: false; a direct model has direct_stress",
        )

    def _with_frequencies(self) -> EScAIPConfig:
        frequencies = self.frequency_list
        if self.angular != "legendre":
            return dataclasses.replace(self, frequency_list=frequencies or ())
        if not frequencies:
            return dataclasses.replace(self, frequency_list=default_frequencies(self.head_size))
        _require(
            sum(frequencies) == self.head_size and min(frequencies) >= 0,
            f"frequency_list {list(frequencies)} sums to {sum(frequencies)}, but must sum to "
            f"hidden_size / num_heads = {self.head_size}",
        )
        return self


def default_frequencies(head_size: int) -> tuple[int, ...]:
    """Scale the authors' channel split to a head size, by largest remainders.

    Args:
        head_size: Channels per head, D.

    Returns:
        Channels of each l = 0..4, summing to D; [20, 10, 4, 10, 20] for D = 64.
    """
    shares = [head_size * f / sum(PUBLISHED_FREQUENCIES) for f in PUBLISHED_FREQUENCIES]
    counts = [math.floor(s) for s in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: head_size - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


def _translate(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Our key for each given key; refuses unknown keys and options that do not exist here."""
    own = {field.name for field in dataclasses.fields(EScAIPConfig)}
    values: dict[str, Any] = {}
    for key, given in kwargs.items():
        if key in ONLY_VALUE:
            only = ONLY_VALUE[key]
            _require(given == only, f"{key}: {given!r} is not supported; the only value is {only}")
        if key in ONLY_VALUE or key in WITHOUT_EFFECT:
            continue
        target, value = _own(key, given)
        if target is None:
            continue
        if target not in own:  # the message takes long
            raise UserError(_unknown_key(key, own))
        _require(target not in values, f"{key} and another key both set {target}; keep one")
        values[target] = value
    return values


def _own(key: str, value: Any) -> tuple[str | None, Any]:
    """Our name and value of one foreign setting; no name if it says nothing here."""
    if key == "node_direction_expansion_size":
        _require(isinstance(value, int), f"{key}: {value!r} is not of type int")
        return "boo_lmax", value - 1
    if key == "use_angle_embedding":
        return _angular(value)
    if key == "use_frequency_embedding":
        return "angular", "legendre" if value else "none"
    return ALIASES.get(key, key), value


def _channels(value: Any) -> tuple[int, ...]:
    """`frequency_list` as a tuple; anything but a list of whole numbers is refused."""
    whole = isinstance(value, Sequence) and all(isinstance(count, int) for count in value)
    _require(whole, f"frequency_list: {value!r} is not a list of whole numbers")
    return tuple(value)


def _angular(value: Any) -> tuple[str | None, Any]:
    """`use_angle_embedding` is a flag in the authors' V1 and a name in V2."""
    if value is True:
        return "angular", "cosine"
    if value is False:
        return "angular", "none"
    _require(
        value == "none",
        f"use_angle_embedding: {value!r} is not supported (it drops the envelope upstream); "
        "use none with use_frequency_embedding: true",
    )
    return None, None


def _unknown_key(key: str, own: set[str]) -> str:
    known = sorted(own | set(ALIASES) | WITHOUT_EFFECT | set(ONLY_VALUE))
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"unknown model key {key!r}; did you mean {near[0]!r}?"


def _check_type(field: dataclasses.Field, value: Any) -> None:
    kind = str(field.type)
    ok = {
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value),
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
    }.get(kind, True)
    _require(ok, f"{field.name}: {value!r} is not of type {kind}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
