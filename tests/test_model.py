"""What training relies on: weight-decay groups, gradients, the published sizes, the stress head."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from fairchem.core.units.mlip_unit.mlip_unit import _get_optimizer_wd
from torch import nn

from escaip_fairchem import EScAIP
from escaip_fairchem.bench.measure import saved_bytes
from escaip_fairchem.config import PRESETS
from escaip_fairchem.train.optim import Muon
from helpers import SMALL, gas, make_batch, slab, triclinic

PAPER, V2, SMOOTH = {"preset": "paper"}, {"preset": "v2"}, {"preset": "v2", "smooth": True}
FORCES = {"energy": "EnergyHead", "forces": "DirectForceHead"}
STRESS = {**FORCES, "stress": "DirectStressHead"}
CONSERVATIVE = {"efs": "ConservativeHead"}
WITH_STRESS = {"direct_stress": True}
GRADIENT = {"direct_forces": False, "regress_stress": True}

#: Backbone, heads.
MODELS = {
    f"{name}-{kind}": (preset | keys, heads)
    for name, preset in {"paper": PAPER, "v2": V2, "v2-smooth": SMOOTH}.items()
    for kind, keys, heads in [
        ("forces", {}, FORCES),
        ("stress", WITH_STRESS, STRESS),
        ("conservative", GRADIENT, CONSERVATIVE),
    ]
}
all_models = pytest.mark.parametrize("backbone, heads", MODELS.values(), ids=MODELS)


def build(backbone: dict, heads: dict[str, str]) -> EScAIP:
    """A model in double precision with the initial weights of a training."""
    torch.manual_seed(0)
    return EScAIP(
        backbone={"model": "escaip_fairchem.EScAIPBackbone", **backbone},
        heads={name: {"module": f"escaip_fairchem.{head}"} for name, head in heads.items()},
    ).double()


@all_models
def test_weight_decay_groups(backbone, heads):
    """Decayed are the matrices of linear layers and nothing else, by fairchem's own grouping."""
    model = build(SMALL | backbone, heads)
    optimizer = _get_optimizer_wd(partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1), model)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0.1]
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(groups[0] + groups[1]) == sorted(names)

    tables_and_norms = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.RMSNorm)
        for name, _ in module.named_parameters()
    }
    others = {n for n in names.values() if n.rpartition(".")[2] in ("bias", "cosine_scale")}
    assert tables_and_norms
    assert any(n.endswith("cosine_scale") for n in others) == (backbone["preset"] == "paper")
    assert {names[i] for i in groups[0]} == tables_and_norms | others
    assert {names[i] for i in groups[1]} == {
        f"{prefix}.weight"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.dim() == 2
    }


@all_models
def test_every_parameter_learns(backbone, heads):
    """An unused one would stop distributed training, which waits for every gradient."""
    model = build(SMALL | backbone, heads).train()
    outputs = model(make_batch(slab(), triclinic()))
    assert set(outputs) == ({"energy", "forces", "stress"} if heads != FORCES else set(FORCES))
    losses = [(output[key] - 1.0).square().mean() for key, output in outputs.items()]
    torch.stack(losses).sum().backward()
    idle = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None
        or not parameter.grad.isfinite().all()
        or not parameter.grad.abs().max() > 0
    ]
    assert idle == []


def size(width: int, layers: int, heads: int) -> dict[str, int]:
    return {"hidden_size": width, "num_layers": layers, "num_heads": heads}


#: Backbone, heads, millions of parameters of the published configuration.
PUBLISHED = {
    "paper-small": (PAPER | size(512, 10, 8), FORCES, 83.3),
    "paper-medium": (PAPER | size(768, 8, 12), FORCES, 146.2),
    "paper-large": (PAPER | size(1024, 10, 16), FORCES, 311.8),
    "v2-small": (V2 | size(512, 10, 8), FORCES, 88.6),
    "v2-small-gradient": (V2 | size(512, 10, 8) | GRADIENT, CONSERVATIVE, 71.0),
    "v2-h1024l8": (V2 | size(1024, 8, 16), FORCES, 271.6),
    "v2-h640l6": (V2 | size(640, 6, 10), FORCES, 85.2),
}


@pytest.mark.parametrize("backbone, heads, millions", PUBLISHED.values(), ids=PUBLISHED)
def test_published_sizes(backbone, heads, millions):
    with torch.device("meta"):  # shapes only: the largest would take 2.5 GB
        model = build(backbone, heads)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("preset", [PAPER, V2, SMOOTH], ids=["paper", "v2", "v2-smooth"])
def test_direct_stress(preset):
    """Symmetric; its parts are a multiple of the identity and traceless.

    It does not turn along with the structure: the head is not linear in the components.
    """
    model = build(SMALL | preset | WITH_STRESS, STRESS).eval()
    head = model.output_heads["stress"]

    def stress(*structures) -> torch.Tensor:
        with torch.no_grad():
            return model(make_batch(*structures))["stress"]["stress"].view(-1, 3, 3)

    structures = [slab(), triclinic(), gas()]
    whole = stress(*structures)
    assert len(whole) == len(structures)
    torch.testing.assert_close(whole, whole.mT, rtol=0, atol=1e-14)

    isotropic_weight = head.isotropic.final.weight.data.clone()
    head.isotropic.final.weight.data.zero_()
    anisotropic = stress(*structures)
    traces = anisotropic.diagonal(dim1=1, dim2=2).sum(1)
    assert traces.abs().max() < 1e-12 * anisotropic.abs().max()

    head.isotropic.final.weight.data.copy_(isotropic_weight)
    head.anisotropic.final.weight.data.zero_()
    isotropic = stress(*structures)
    pressure = isotropic[:, 0, 0]
    assert pressure.abs().min() > 1e-6
    torch.testing.assert_close(isotropic, pressure[:, None, None] * torch.eye(3).double())
    torch.testing.assert_close(isotropic + anisotropic, whole)


@pytest.mark.parametrize("preset", [PAPER, V2], ids=["paper", "v2"])
def test_resolved_init(preset):
    """Distances and species make more of an edge's attributes than with published weights."""
    structure = make_batch(slab())
    lost = {}
    for init in ("published", "resolved"):
        model = build(SMALL | preset | {"init": init}, FORCES).eval()
        attributes = model.backbone.input_block.attributes
        seen = []
        hook = model.backbone.input_block.register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.extend(inputs)
        )
        with torch.no_grad():
            model(structure.clone())
            hook.remove()
            x = seen[1]
            nothing = [torch.zeros_like(block) for block in x.rbf.blocks]
            blind = dataclasses.replace(x, rbf=dataclasses.replace(x.rbf, blocks=nothing))
            uniform = dataclasses.replace(x, species=torch.full_like(x.species, 29))
            full, *others = (
                attributes.gather(x, *attributes.terms(y)) for y in (x, blind, uniform)
            )
            lost[init] = [((other - full).norm() / full.norm()).item() for other in others]
    (distance, species), (resolved_distance, resolved_species) = lost.values()
    assert resolved_distance > 1.5 * distance
    assert resolved_species > 20 * species


@pytest.mark.parametrize("preset", [PAPER, V2], ids=["paper", "v2"])
def test_resolved_magnitudes_start_at_one(preset):
    head = build(SMALL | preset | {"init": "resolved"}, FORCES).eval().output_heads["forces"]
    without_features = torch.zeros(3, SMALL["hidden_size"], dtype=torch.float64)
    torch.testing.assert_close(head.magnitude(without_features), torch.ones(3, 1).double())


def test_muon_trains_the_model():
    """By fairchem's grouping: every parameter moves, and one structure's forces are learnt."""
    model = build(SMALL | V2 | {"init": "resolved", "norm": "skip"}, FORCES).train()
    optimizer = _get_optimizer_wd(partial(Muon, lr=2e-3, adam_lr=5e-4, weight_decay=1e-3), model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    structure = make_batch(slab())
    target = torch.randn(structure.pos.shape, dtype=torch.float64)
    losses = []
    for _ in range(150):
        outputs = model(structure.clone())
        loss = (outputs["forces"]["forces"] - target).square().mean()
        loss = loss + outputs["energy"]["energy"].square().sum() / 1000
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [name for name, p in model.named_parameters() if torch.equal(p, start[name])] == []
    assert losses[-1] < 0.5 * target.square().mean()


@pytest.mark.parametrize(("preset", "dropout"), [("paper", 0.0), ("v2", 0.0), ("v2", 0.2)])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "conservative"])
def test_checkpointing_changes_memory_only(direct, preset, dropout):
    """Same outputs and gradients to rounding, with fewer and fewer bytes kept."""
    batch = make_batch(slab())
    kept, results = [], []
    for mode in ("none", "pointwise", "block"):
        config = {"preset": preset, "direct_forces": direct, "checkpointing": mode}
        rates = {key: 0.0 for key in PRESETS["paper"] if key.endswith("dropout")}
        # what is dropped is the same when a block is repeated
        rates["node_ffn_dropout"] = dropout
        model = build(SMALL | rates | config, FORCES if direct else CONSERVATIVE).train()
        kept.append(saved_bytes(lambda model=model: model(batch.clone()), model))
        torch.manual_seed(1)
        out = model(batch.clone())
        loss = sum(value[key].square().sum() for key, value in out.items())
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert kept[1] < (0.7 if direct else 0.95) * kept[0]
    if direct or not dropout:  # repeating what is random, a second derivative keeps its graph
        assert kept[2] < 0.6 * kept[1]
    for other in results[1:]:
        for plain, checkpointed in zip(results[0], other, strict=True):
            torch.testing.assert_close(checkpointed, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("preset", ["paper", "v2"])
def test_chunks_change_nothing_but_memory(preset):
    """Chunks of any size, the last one smaller; an isolated atom and several structures."""
    batch = make_batch(slab(), gas(), triclinic())
    results = []
    for size in (0, 1, 7, 10_000):
        model = build(SMALL | {"preset": preset, "inference_chunk": size}, FORCES).eval()
        seen = []
        model.backbone.blocks[0].register_forward_hook(lambda *_, seen=seen: seen.append(1))
        with torch.no_grad():
            results.append(model(batch.clone()))
        atoms = len(batch["pos"])
        assert len(seen) == (-(-atoms // size) if size else 1)
    for other in results[1:]:
        for key, value in results[0].items():
            torch.testing.assert_close(other[key][key], value[key], rtol=1e-10, atol=1e-12)
