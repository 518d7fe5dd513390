"""`compile: true`: how many graphs, the same numbers, checkpoints, copies, what it falls back to."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch
from torch import nn

from escaip_fairchem import UserError
from escaip_fairchem.compiled import Compiled
from escaip_fairchem.config import EScAIPConfig
from escaip_fairchem.curvature import hessian_vector_product
from helpers import gas, make_batch, one_atom, slab, small_model, triclinic

#: One small layer: tracing takes seconds.
TINY = {"num_layers": 1, "boo_lmax": 2, "frequency_list": (4, 4), "cutoff": 4.0, "max_neighbors": 8}

#: Of different numbers of atoms, edges, slots, pairs and structures.
BATCHES = (
    [slab(), gas()],
    [gas()],
    [triclinic()],
    [gas(), triclinic(), gas()],
    [slab(), slab()],
    [one_atom(), one_atom(), triclinic()],
)


class Counting:
    """A backend that counts what it is given, and runs it as it is."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        self.graphs += 1
        return graph


def pair(**keys) -> tuple[nn.Module, nn.Module, Counting]:
    """A model, its compiled copy, and the count of the latter's graphs."""
    plain = copy.deepcopy(small_model(**TINY | keys))
    compiled, counting = copy.deepcopy(plain), Counting()
    compiled.backbone.compiled = Compiled(counting)
    return plain, compiled, counting


def results(model: nn.Module, structures: list, *, training: bool) -> dict[str, torch.Tensor]:
    """Outputs, and in training gradients of all parameters."""
    model.train(training).zero_grad()
    with torch.set_grad_enabled(training):
        found = {key: value[key] for key, value in model(make_batch(*structures)).items()}
    if training:
        sum(value.square().sum() for value in found.values()).backward()
        found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().nan_to_num() for name, value in found.items()}


def require_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / value.abs().max().clamp(min=1.0)
        assert error < 1e-5, name


@pytest.mark.parametrize("preset", ["v2", "paper"])
@pytest.mark.parametrize("conservative", [False, True], ids=["direct", "conservative"])
def test_one_graph_of_each_mode_and_the_same_numbers(conservative, preset):
    dropouts = dict.fromkeys([k for k in vars(EScAIPConfig) if k.endswith("dropout")], 0.0)
    keys = {"preset": preset, **dropouts}
    if preset == "paper":
        keys["frequency_list"] = None
    plain, compiled, counting = pair(conservative=conservative, **keys)
    for modes, training in enumerate((False, True), start=1):
        for structures in BATCHES if preset == "v2" else BATCHES[:2]:
            expected = results(plain, structures, training=training)
            require_equal(results(compiled, structures, training=training), expected)
            assert counting.graphs == modes
    assert not compiled.backbone.compiled.failed
