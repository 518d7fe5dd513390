"""The lean forms of attention, norms and linear maps against plain ones, derivatives included."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from escaip_fairchem import EScAIP
from escaip_fairchem.errors import UserError
from escaip_fairchem.features import RadialBasis, gaussian_basis
from escaip_fairchem.kernels import (
    AttentionGeometry,
    attention_backend,
    banded_linear,
    neighbor_attention,
    packed_attention,
    recomputed_linear,
    rms_norm,
)
from helpers import SMALL, make_batch, slab

DOUBLE = {"dtype": torch.float64}


def attention_case(counts: list[int], size: int, angular: str, heads: int = 3, seed: int = 0):
    """Packed q, k, v, directions (zero for the first edge of an atom), log-envelopes."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.tensor(counts)
    receivers = torch.arange(len(counts)).repeat_interleave(number)
    starts = number.cumsum(0) - number
    edges, width = len(receivers), max(counts)
    directions = torch.randn(edges, 3, generator=generator, **DOUBLE)
    directions = F.normalize(directions, dim=-1)
    directions[starts] = 0
    leaves = [
        torch.randn(edges, 3, heads, size, generator=generator, **DOUBLE),
        directions,
        -torch.rand(edges, generator=generator, **DOUBLE),
    ]
    if angular == "cosine":
        leaves.append(torch.tensor(0.7, **DOUBLE))
    slots = receivers * width + torch.arange(edges) - starts[receivers]
    return [leaf.requires_grad_() for leaf in leaves], number, slots


@pytest.mark.parametrize(
    ("angular", "frequencies"),
    [("legendre", (5, 3, 0, 2, 6)), ("legendre", (16,)), ("cosine", ()), ("none", ())],
)
@pytest.mark.parametrize("counts", [[5, 1, 7, 3, 7, 2], [1, 1], [1, 20]])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_the_reference(angular, frequencies, counts, masked, monkeypatch):
    """Values, first and second derivatives; with dropout both get the same mask."""
    leaves, number, slots = attention_case(counts, 16, angular)
    if masked:
        n, k = len(counts), max(counts)
        keep = torch.rand(n, 3, k, k, **DOUBLE).round().mul(2)
        monkeypatch.setattr(torch.Tensor, "bernoulli", lambda _: 0.5 * keep)
        monkeypatch.setattr(F, "dropout", lambda x, p: x * keep if p else x)

    def derivatives(function) -> list[torch.Tensor]:
        geometry = AttentionGeometry.build(
            *leaves[1:3],
            number,
            slots,
            max(counts),
            angular=angular,
            lmax=len(frequencies) - 1,
        )
        out = function(
            leaves[0],
            geometry,
            scale=0.3,
            frequencies=frequencies,
            cosine_scale=leaves[3] if angular == "cosine" else None,
            dropout=0.5 if masked else 0.0,
        )
        ask = {"allow_unused": True, "materialize_grads": True}
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True, **ask)
        mixed = sum((g * torch.linspace(-1, 1, g.numel()).view(g.shape)).sin().sum() for g in first)
        return [out, *first, *torch.autograd.grad(mixed, leaves, **ask)]

    def reference(qkv, geometry, **options):
        return neighbor_attention(*qkv.unbind(1), geometry, **options)

    for ours, theirs in zip(derivatives(packed_attention), derivatives(reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def check_derivatives(function, *inputs: torch.Tensor) -> None:
    """First and second derivatives against finite differences."""
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True, **DOUBLE)


def test_rms_norm():
    torch.manual_seed(0)
    x, weight = leaf(4, 3, 5), leaf(5)
    torch.testing.assert_close(rms_norm(x, weight), F.rms_norm(x, (5,), weight))
    check_derivatives(rms_norm, x, weight)
    x, weight = x.bfloat16(), weight.float()
    expected = F.rms_norm(x.float(), (5,), weight)
    torch.testing.assert_close(rms_norm(x, weight).float(), expected, rtol=8e-3, atol=1e-3)


def test_recomputed_linear():
    torch.manual_seed(0)
    x, scale, weight, bias = leaf(2, 3, 5), leaf(5), leaf(4, 10), leaf(4)

    def prologue(x, scale):
        return rms_norm(x, scale), F.gelu(x)

    def ours(x, scale, weight, bias):
        return recomputed_linear(prologue, weight, bias, x, scale)

    expected = F.linear(torch.cat(prologue(x, scale), dim=-1), weight, bias)
    torch.testing.assert_close(ours(x, scale, weight, bias), expected)
    check_derivatives(ours, x, scale, weight, bias)


def test_recomputed_linear_keeps_inputs_only():
    x, weight = torch.randn(50, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        recomputed_linear(lambda x: F.gelu(x.exp()), weight, None, x)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), weight.data_ptr()}


def test_banded_linear():
    torch.manual_seed(0)
    blocks, weight, bias = [leaf(3, 4), leaf(2, 5)], leaf(3, 10), leaf(3)
    dense = torch.zeros(5, 10, **DOUBLE)
    dense[:3, 1:5], dense[3:, 5:] = blocks[0].detach(), blocks[1].detach()

    def ours(weight, bias, *blocks):
        return banded_linear(blocks, (1, 5), weight, bias)

    torch.testing.assert_close(ours(weight, bias, *blocks), F.linear(dense, weight, bias))
    check_derivatives(ours, weight, bias, *blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_radial_basis_leaves_out_only_what_vanishes(dtype):
    torch.manual_seed(0)
    # clusters of lengths, self edges at 0, and one far beyond the cutoff
    lengths = torch.cat([1 + torch.rand(300), 5 + torch.rand(200), torch.tensor([0.0, 1e4])])
    lengths = lengths.to(dtype)
    rows = torch.randint(len(lengths), (900,))
    basis = RadialBasis.build(lengths, rows, 6.0, 600, 2.0)
    assert sum(block.numel() for block in basis.blocks) < 0.25 * len(lengths) * 600
    weight = torch.randn(7, 600, dtype=dtype)
    out = banded_linear(basis.blocks, basis.starts, weight, torch.zeros(7, dtype=dtype))
    expected = gaussian_basis(lengths, 6.0, 600, 2.0)[rows] @ weight.t()
    bound = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(out[basis.rows], expected, rtol=bound, atol=bound)
    assert torch.equal(out[basis.rows][rows == len(lengths) - 1].unique(), out.new_zeros(1))


def test_backends_of_a_whole_model(monkeypatch):
    """The chosen kernel is used, and each gives the same energy and forces."""
    batch, results = make_batch(slab()), {}
    names = ["torch", "reference"] + ["triton"] * (importlib.util.find_spec("triton") is not None)
    for name in names:
        monkeypatch.setenv("ESCAIP_KERNELS", name)
        torch.manual_seed(0)
        model = EScAIP(
            backbone={"model": "escaip_fairchem.EScAIPBackbone", "preset": "v2", **SMALL},
            heads={"forces": {"module": "escaip_fairchem.DirectForceHead"}},
        )
        model = model.double().eval()
        assert name in model.backbone.blocks[0].attention.attend.__name__.replace("packed", "torch")
        results[name] = model(batch.clone())["forces"]["forces"].detach()
    for forces in results.values():
        torch.testing.assert_close(forces, results["reference"], rtol=1e-5, atol=1e-9)
    monkeypatch.setenv("ESCAIP_KERNELS", "cuda")
    with pytest.raises(UserError, match="ESCAIP_KERNELS=cuda is not one of torch, triton"):
        attention_backend(dropout=0.0)
