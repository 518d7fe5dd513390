"""What training in reduced precision must leave alone, and gradients that must stay finite."""

from __future__ import annotations

import pytest
import torch
from ase.build import fcc111, molecule

from builtin import batch_of
from escaip_fairchem import EScAIP

SMALL = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "rbf_size": 64,
    "rbf_dim": 32,
    "species_dim": 8,
    "boo_dim": 8,
}


def model(preset: str, *, direct: bool) -> EScAIP:
    torch.manual_seed(0)
    heads = {
        "energy": {"module": "escaip_fairchem.EnergyHead"},
        "forces": {"module": "escaip_fairchem.DirectForceHead"},
    }
    if not direct:
        heads = {"efs": {"module": "escaip_fairchem.ConservativeHead"}}
    backbone = {"model": "escaip_fairchem.EScAIPBackbone", "preset": preset, **SMALL}
    backbone |= {"direct_forces": direct, "regress_stress": not direct}
    return EScAIP(backbone=backbone, heads=heads)


def embedding(net: EScAIP, batch):
    seen = {}
    original = net.backbone._encode

    def spy(inputs):
        seen["inputs"] = inputs
        return original(inputs)

    net.backbone._encode = spy
    seen["graph"] = net.backbone(batch.clone())["graph"]
    return seen


@pytest.mark.parametrize("preset", ["paper", "v2"])
def test_autocast_leaves_geometry_alone(preset):
    """In bf16 a cell of 20 A has steps of 0.06 A: neighbours and angles would be wrong."""
    net = model(preset, direct=True).eval()
    slab = fcc111("Cu", (3, 3, 3), vacuum=7, periodic=True)
    slab.rattle(0.05, seed=2)
    batch = batch_of([slab, molecule("H2O")])
    exact = embedding(net, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = embedding(net, batch)
    for name in ("senders", "lengths", "directions", "log_envelope"):
        torch.testing.assert_close(
            getattr(cast["graph"], name), getattr(exact["graph"], name), rtol=0, atol=0
        )
    ours, theirs = cast["inputs"], exact["inputs"]
    torch.testing.assert_close(ours.boo, theirs.boo, rtol=0, atol=0)
    torch.testing.assert_close(ours.rbf.blocks, theirs.rbf.blocks, rtol=0, atol=0)
    ours, theirs = ours.attention, theirs.attention
    torch.testing.assert_close(ours.cosines, theirs.cosines, rtol=0, atol=0)
    assert ours.cosines.dtype == torch.float32


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("preset", ["paper", "v2"])
def test_residuals_and_readouts_are_added_in_float32(preset, kernels, monkeypatch):
    """A bf16 sum loses what is 256 times smaller than the features, layer after layer."""
    if kernels == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("ESCAIP_KERNELS", kernels)
    net, sums, products = model(preset, direct=True).eval(), {}, {}
    backbone = net.backbone
    for name, module in net.named_modules():
        if module in (backbone.input_block, *backbone.blocks):
            module.register_forward_hook(lambda m, a, out, name=name: sums.update({name: out}))
        if name.endswith("attention"):
            module.register_forward_hook(lambda m, a, out, name=name: products.update({name: out}))
    for readout in (backbone.node_readout, backbone.edge_readout):
        original = readout.finish

        def finish(total, readout=readout, original=original):
            sums[readout] = total[:1]
            return original(total)

        monkeypatch.setattr(readout, "finish", finish)
    slab = fcc111("Cu", (2, 2, 1), vacuum=7, periodic=True)
    slab.rattle(0.05, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        net(batch_of([slab]))
    assert len(sums) == 3 + 2
    assert {x.dtype for out in sums.values() for x in out} == {torch.float32}
    # what is added to the edges comes from products in bf16
    assert {edge.dtype for _, edge in products.values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "conservative"])
@pytest.mark.parametrize("preset", ["paper", "v2"])
def test_training_under_autocast(preset, direct, dtype):
    """Gradients point where those in float32 do; the backward pass is outside, as in training."""
    net = model(preset, direct=direct).train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for block in net.backbone.blocks:
        block.attention.attention_dropout = 0.0
    slab = fcc111("Cu", (3, 3, 3), vacuum=7, periodic=True)
    slab.rattle(0.05, seed=2)
    batch = batch_of([slab, molecule("H2O")])
    gradients = []
    for enabled in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            out = net(batch.clone())
        sum(x.float().square().sum() for v in out.values() for x in v.values()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert gradients[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.97


@pytest.mark.parametrize("preset", ["paper", "v2"])
def test_conservative_training_stays_finite_with_an_isolated_atom(preset):
    net = model(preset, direct=False).train()
    slab = fcc111("Cu", (2, 2, 2), vacuum=7, periodic=True)
    slab.rattle(0.05, seed=3)
    result = net(batch_of([slab, molecule("H")]))
    loss = sum(value.square().sum() for task in result.values() for value in task.values())
    loss.backward()
    for name, parameter in net.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    assert float(result["forces"]["forces"][-1].detach().abs().max()) == 0
