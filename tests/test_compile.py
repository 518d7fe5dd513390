"""`compile: true`: graphs counted, the same numbers, copies, what cannot be compiled."""

from __future__ import annotations

import copy
import logging
import pickle
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from fairchem.core.units.mlip_unit import InferenceSettings
from torch import nn

from escaip_fairchem import EScAIP, EScAIPBackbone, UserError, calculator
from escaip_fairchem.compiled import Compiled
from escaip_fairchem.config import EScAIPConfig
from escaip_fairchem.curvature import hessian_vector_product
from escaip_fairchem.graph import build_graph
from escaip_fairchem.neighbors import Structures
from escaip_fairchem.shapes import Edges, Shapes
from helpers import SMALL, gas, make_batch, one_atom, slab, small_model, triclinic
from run_helpers import save_checkpoint

if TYPE_CHECKING:
    from ase import Atoms

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
        self.graphs, self.code = 0, ""

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        self.graphs += 1
        self.code = graph.code
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


def test_copies_share_graphs_and_checkpoints_are_the_same():
    plain, compiled, counting = pair()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    expected = results(plain, BATCHES[0], training=False)
    require_equal(results(compiled, BATCHES[0], training=False), expected)
    average = copy.deepcopy(compiled)
    with torch.no_grad():
        for model in (plain, average):
            for parameter in model.parameters():
                parameter.mul_(0.9)
    changed = results(plain, BATCHES[1], training=False)
    require_equal(results(average, BATCHES[1], training=False), changed)
    assert counting.graphs == 1
    again = pickle.loads(pickle.dumps(compiled))
    assert isinstance(again.backbone.compiled, Compiled)
    require_equal(results(again, BATCHES[0], training=False), expected)


def test_what_cannot_be_compiled_runs_without(caplog):
    def broken(graph, inputs):
        raise FileNotFoundError("no compiler here\nmore of it")

    for conservative in (False, True):
        plain, compiled, _ = pair(conservative=conservative)
        compiled.backbone.compiled = Compiled(broken)
        with caplog.at_level(logging.WARNING):
            for structures in BATCHES[:2]:
                expected = results(plain, structures, training=False)
                require_equal(results(compiled, structures, training=False), expected)
    assert [r.getMessage() for r in caplog.records] == [
        "not compiled: FileNotFoundError: no compiler here"
    ] * 2


def test_dropping_autocast_and_ddp_keep_one_graph(tmp_path):
    _, compiled, counting = pair(stochastic_depth=0.5, mlp_dropout=0.1, attention_dropout=0.1)
    for structures in BATCHES[:2]:
        assert all(
            x.isfinite().all() for x in results(compiled, structures, training=True).values()
        )
    assert counting.graphs == 1
    plain, compiled, counting = pair(dtype=torch.float32)
    batch = make_batch(*BATCHES[0], dtype=torch.float32)
    with torch.no_grad():
        exact = plain(batch.clone())["forces"]["forces"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            forces, expected = (m(batch.clone())["forces"]["forces"] for m in (compiled, plain))
    errors = [float((x - exact).abs().max() / exact.abs().max()) for x in (forces, expected)]
    assert 0 < errors[0] < 2 * errors[1] < 0.2, errors
    plain, compiled, counting = pair()
    expected = results(plain, BATCHES[1], training=True)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(compiled, bucket_cap_mb=0.001)
        found = results(wrapped, BATCHES[1], training=True)
    finally:
        torch.distributed.destroy_process_group()
    require_equal({k.removeprefix("module."): v for k, v in found.items()}, expected)
    assert counting.graphs == 1


def test_triton_kernels_inside_of_a_derivative(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("ESCAIP_KERNELS", "triton")
    keys = TINY | {"conservative": True}
    plain = small_model.__wrapped__(**keys)
    compiled, counting = copy.deepcopy(plain), Counting()
    compiled.backbone.compiled = Compiled(counting)
    water = [molecule("H2O")]
    expected = results(plain, water, training=True)
    require_equal(results(compiled, water, training=True), expected)
    assert counting.graphs == 1
    assert "escaip_fairchem.attention" in counting.code


def test_second_derivatives_need_no_compilation():
    plain, compiled, counting = pair(conservative=True)
    batch, vectors = make_batch(triclinic()), torch.randn(5, 3, dtype=torch.float64)
    expected = hessian_vector_product(plain, batch.clone(), vectors)
    torch.testing.assert_close(hessian_vector_product(compiled, batch, vectors), expected)
    assert counting.graphs == 0


def test_settings():
    settings = InferenceSettings(compile=True)  # as fairchem's defaults have it
    assert EScAIPBackbone.build_inference_settings(settings) == {}
    assert settings.compile is False
    with pytest.raises(UserError, match="set checkpointing to pointwise"):
        EScAIPConfig.from_kwargs(compile=True, checkpointing="block")
    config = {"model": "escaip_fairchem.EScAIPBackbone", **SMALL, "compile": True}
    heads = {"energy": {"module": "escaip_fairchem.EnergyHead"}}
    assert EScAIP(backbone=config, heads=heads).backbone.compiled.backend == "inductor"


# CUDA graphs: all but the capture


@pytest.mark.parametrize("preset", ["v2", "paper"])
@pytest.mark.parametrize("conservative", [False, True], ids=["direct", "conservative"])
def test_padding_changes_nothing(conservative, preset):
    keys = {"frequency_list": None} if preset == "paper" else {}
    plain = copy.deepcopy(small_model(**TINY | keys, conservative=conservative, preset=preset))
    padded, counting = copy.deepcopy(plain), Counting()
    padded.backbone.compiled = Compiled(counting, slots=9)
    for structures in (*BATCHES, [one_atom()]):
        expected = results(plain, structures, training=False)
        found = results(padded, structures, training=False)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].shape == value.shape
            assert (found[name] - value).abs().max() < 1e-6 * value.abs().max().clamp(min=1.0)
    assert counting.graphs == 1
    # nothing is padded in training
    shapes = copy.deepcopy(padded.backbone.compiled.shapes.sizes)
    results(padded, BATCHES[0], training=True)
    assert padded.backbone.compiled.shapes.sizes == shapes


def test_a_trajectory_has_one_shape_or_two():
    config = EScAIPConfig.from_kwargs(max_neighbors=12, neighbor_search="fairchem")
    shapes, random = Shapes(slots=13), np.random.default_rng(0)
    perfect = bulk("Cu", cubic=True) * (4, 4, 4)

    def sizes(atoms: Atoms) -> tuple[int, tuple[int, ...]]:
        """Edges of the structure, and the sizes that it is padded to."""
        batch = make_batch(atoms)
        structures = Structures(batch.pos, batch.cell, batch.pbc, batch.natoms, batch.batch)
        graph = build_graph(structures, config)
        edges = Edges(graph, batch.atomic_numbers, batch.batch, None, None)
        padded = shapes.pad(edges).graph
        assert int(padded.counts.sum()) == len(padded.senders)
        assert 1 <= int(padded.counts.min()) <= int(padded.counts.max()) <= padded.num_slots
        assert bool((padded.receivers.diff() >= 0).all())
        assert len(padded.senders) < 1.3 * len(graph.senders)
        return len(graph.senders), tuple(map(len, (padded.counts, padded.senders, padded.pairs)))

    found = []
    for step in range(12):
        moved = perfect.copy()
        moved.positions += random.normal(0, 0.05 + 0.01 * step, moved.positions.shape)
        found.append(sizes(moved))
    assert len({edges for edges, _ in found}) > 8
    assert len({shape for _, shape in found}) <= 2
    wide = perfect.copy()
    wide.set_cell(3.0 * wide.cell, scale_atoms=True)
    edges, shape = sizes(wide)
    assert edges < 0.8 * found[0][0]
    assert shape not in {shape for _, shape in found}
    assert sizes(moved) == found[-1]


def test_calculators(tmp_path, monkeypatch):
    monkeypatch.setattr("escaip_fairchem.backbone.Compiled", partial(Compiled, "eager"))
    for conservative in (False, True):
        path = tmp_path / str(conservative) / "inference_ckpt.pt"
        save_checkpoint(path, conservative=conservative, stress=False, dataset="cu")
        found = {}
        for mode in (False, True, "cuda-graphs"):
            atoms = gas()
            atoms.calc = calculator(path, device="cpu", compile=mode)
            found[mode] = atoms.get_forces()
            backbone = atoms.calc.predictor.model.module.backbone
            assert backbone.config.compile == bool(mode)
            assert backbone.config.cuda_graphs == (mode == "cuda-graphs")
        for forces in found.values():
            assert np.abs(forces - found[False]).max() < 1e-5 * np.abs(found[False]).max()
    with pytest.raises(UserError, match="compile: 'fast' is not one of False, True"):
        calculator(path, compile="fast")
