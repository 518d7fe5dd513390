"""What the user gets for a mistake: one line that says what to change."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ase import Atoms
from fairchem.core.units import mlip_unit

from escaip_fairchem import EScAIP, calculator
from escaip_fairchem.checkpoint import import_checkpoint
from escaip_fairchem.config import EScAIPConfig
from escaip_fairchem.errors import UserError
from helpers import SMALL, gas, make_batch, slab, small_model

REGRESSED_STRESS = (
    "regress_stress: true needs direct_forces: false; a direct model has direct_stress"
)
CONFIGS = {
    "misspelt": (
        {"hidden_sise": 64},
        "unknown model key 'hidden_sise'; did you mean 'hidden_size'?",
    ),
    "misspelt-alias": ({"knnk": 30}, "unknown model key 'knnk'; did you mean 'knn_k'?"),
    "unknown-preset": ({"preset": "v3"}, "preset: 'v3' is not one of paper, v2"),
    "list-for-preset": ({"preset": ["v2"]}, "preset: ['v2'] is not one of paper, v2"),
    "text-for-int": ({"hidden_size": "64"}, "hidden_size: '64' is not of type int"),
    "float-for-int": ({"num_layers": 2.5}, "num_layers: 2.5 is not of type int"),
    "int-for-bool": ({"preset": "v2", "smooth": 1}, "smooth: 1 is not of type bool"),
    "infinite-cutoff": ({"cutoff": float("inf")}, "cutoff: inf is not of type float"),
    "negative-cutoff": ({"cutoff": -6.0}, "cutoff: -6.0 must be positive"),
    "no-layers": ({"num_layers": 0}, "num_layers: 0 must be positive"),
    "heads-do-not-divide": (
        {"hidden_size": 64, "num_heads": 5},
        "hidden_size 64 is not divisible by num_heads 5",
    ),
    "frequency-sum": (
        {"hidden_size": 64, "num_heads": 1, "frequency_list": [20, 10]},
        "frequency_list [20, 10] sums to 30, but must sum to hidden_size / num_heads = 64",
    ),
    "frequency-type": (
        {"frequency_list": 64},
        "frequency_list: 64 is not a list of whole numbers",
    ),
    "boo-type": (
        {"node_direction_expansion_size": "10"},
        "node_direction_expansion_size: '10' is not of type int",
    ),
    "message-gate": (
        {"use_message_gate": True},
        "use_message_gate: True is not supported; the only value is False",
    ),
    "hard-knn": ({"knn_soft": False}, "knn_soft: False is not supported; the only value is True"),
    "bessel-angles": (
        {"use_angle_embedding": "bessel"},
        "use_angle_embedding: 'bessel' is not supported (it drops the envelope upstream); "
        "use none with use_frequency_embedding: true",
    ),
    "two-names": (
        {"max_neighbors": 20, "knn_k": 30},
        "knn_k and another key both set max_neighbors; keep one",
    ),
    "smooth-knn": (
        {"preset": "paper", "smooth": True},
        "smooth: true needs graph: soft_knn (preset v2); a hard cut is not continuous",
    ),
    "dropout-of-one": ({"attention_dropout": 1.0}, "attention_dropout: 1.0 must be in [0, 1)"),
    "pooling": (
        {"preset": "paper", "pooling": "self"},
        "pooling: self needs graph: soft_knn, where slot 0 is the atom itself",
    ),
    "layernorm": (
        {"preset": "paper", "norm": "layernorm"},
        "norm: layernorm is not available in preset paper; use rmsnorm or skip",
    ),
    "two-stresses": ({"direct_stress": True, "regress_stress": True}, REGRESSED_STRESS),
    "regressed-stress-of-a-direct-model": ({"regress_stress": True}, REGRESSED_STRESS),
    "stress-without-direct-forces": (
        {"direct_stress": True, "direct_forces": False},
        "direct_stress: true needs direct_forces: true; use ConservativeHead's stress",
    ),
}

NEEDS_EDGES = (
    " needs a backbone with direct_forces: true and regress_forces: true (or direct_stress: true)"
)
HEADS = {
    "conservative-on-direct": (
        {},
        "ConservativeHead",
        "ConservativeHead needs a backbone with direct_forces: false",
    ),
    "forces-on-conservative": (
        {"direct_forces": False},
        "DirectForceHead",
        "DirectForceHead" + NEEDS_EDGES,
    ),
    "stress-on-conservative": (
        {"direct_forces": False},
        "DirectStressHead",
        "DirectStressHead" + NEEDS_EDGES,
    ),
}


def coincide(first: int, second: int, distance: str) -> str:
    return (
        f"atoms {first} and {second} of the batch are {distance} A apart; "
        "remove one of them, or check that positions are in Angstrom"
    )


def pair(distance: float) -> Atoms:
    return Atoms("H2", [[0, 0, 0], [0, 0, distance]], cell=[9, 9, 9], pbc=True)


NO_CELL = (
    "structure 1 of the batch is periodic along an axis whose cell vector is zero or parallel "
    "to another; set its cell, or pbc to False there"
)
NOT_FINITE = "positions or cell of the batch are not finite (NaN or inf)"
ELEMENT = "is outside of the model's range 0..109; set max_num_elements when training"
#: Structures, a change to their batch as (field, index, value), message.
STRUCTURES = {
    "coincident": ([pair(0.0)], None, coincide(0, 1, "0")),
    "too-close": ([gas(), pair(0.05)], None, coincide(9, 10, "0.05")),
    "coincident-image": ([pair(9.0)], None, coincide(0, 1, "0")),
    "too-close-image": ([pair(8.95)], None, coincide(0, 1, "0.05")),
    "own-image": ([Atoms("H", cell=[0.05, 5, 5], pbc=True)], None, coincide(0, 0, "0.05")),
    "nan-position": ([gas(), slab()], ("pos", (3, 1), torch.nan), NOT_FINITE),
    "infinite-cell": ([gas(), slab()], ("cell", (1, 0, 0), torch.inf), NOT_FINITE),
    "zero-cell-vector": ([gas(), slab()], ("cell", (1, 2), 0.0), NO_CELL),
    "zero-cell": ([gas(), slab()], ("cell", 1, 0.0), NO_CELL),
    "parallel-cell": ([gas(), slab()], ("cell", (1, slice(2)), 5.0), NO_CELL),
    "element-too-heavy": ([gas()], ("atomic_numbers", 3, 118), f"atomic number 118 {ELEMENT}"),
    "element-negative": ([gas()], ("atomic_numbers", 3, -1), f"atomic number -1 {ELEMENT}"),
    "empty": ([gas()], ("natoms", 0, 0), "a structure of the batch has no atoms; remove it"),
}


@pytest.mark.parametrize("config, message", CONFIGS.values(), ids=CONFIGS)
def test_configuration(config, message):
    with pytest.raises(UserError) as error:
        EScAIPConfig.from_kwargs(**config)
    assert str(error.value) == message


@pytest.mark.parametrize("config, head, message", HEADS.values(), ids=HEADS)
def test_heads(config, head, message):
    backbone = {"model": "escaip_fairchem.EScAIPBackbone", **SMALL, **config}
    with pytest.raises(UserError) as error:
        EScAIP(backbone=backbone, heads={"head": {"module": f"escaip_fairchem.{head}"}})
    assert str(error.value) == message


@pytest.mark.parametrize("preset", ["paper", "v2"])
@pytest.mark.parametrize("structures, change, message", STRUCTURES.values(), ids=STRUCTURES)
def test_structures(structures, change, message, preset):
    batch = make_batch(*structures)
    if change:
        field, index, value = change
        batch[field][index] = value
    with pytest.raises(UserError) as error:
        small_model(preset=preset, max_num_elements=110)(batch)
    assert str(error.value) == message


def test_vesin_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        small_model(preset="v2", neighbor_search="vesin")(make_batch(gas()))
    assert str(error.value) == "neighbor_search: vesin needs the package vesin; install it"


A_RUN = "a run writes checkpoints/*/inference_ckpt.pt"


def test_calculator_without_checkpoint(tmp_path):
    with pytest.raises(UserError) as error:
        calculator(tmp_path / "none.pt")
    assert str(error.value) == f"no checkpoint at {tmp_path / 'none.pt'}; {A_RUN}"


def test_calculator_of_something_else():
    with pytest.raises(UserError) as error:
        calculator(__file__)
    assert str(error.value) == f"{Path(__file__)} is no checkpoint; {A_RUN}"


@pytest.mark.parametrize("task", ["oc22", None])
def test_calculator_of_an_unknown_task(task, tmp_path, monkeypatch):
    unit = SimpleNamespace(dataset_to_tasks={"omat": [], "oc20": []})
    monkeypatch.setattr(mlip_unit, "load_predict_unit", lambda *_, **__: unit)
    torch.save({}, tmp_path / "model.pt")
    with pytest.raises(UserError) as error:
        calculator(tmp_path / "model.pt", task=task)
    assert str(error.value) == f"task {task!r}: the checkpoint knows oc20, omat; name one"


@pytest.mark.parametrize("kind", ["missing", "text", "other-pickle"])
def test_import_of_something_else(kind, tmp_path):
    source = tmp_path / "source.pt"
    if kind == "text":
        source.write_text("not a checkpoint")
    elif kind == "other-pickle":
        torch.save({"state_dict": {}}, source)
    with pytest.raises(UserError) as error:
        import_checkpoint(source, tmp_path / "target.pt")
    expected = {"missing": f"no checkpoint at {source}"}
    other = f"{source} is no inference checkpoint of fairchem's EScAIP"
    assert str(error.value) == expected.get(kind, other)


def test_import_overwrites_nothing(tmp_path):
    source = tmp_path / "source.pt"
    torch.save({}, source)
    with pytest.raises(UserError) as error:
        import_checkpoint(source, source)
    assert str(error.value) == f"{source} exists; name a file that does not"
