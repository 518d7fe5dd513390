"""Matrix products by oneDNN against torch's own, whatever CPU the tests run on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from escaip_fairchem.bench.pair import batch_of, outputs, own_model
from escaip_fairchem.bench.settings import Settings
from escaip_fairchem.bench.structures import batch_by_atoms
from escaip_fairchem.kernels import dense


@pytest.fixture
def taken(monkeypatch) -> list[tuple[int, ...]]:
    """Takes oneDNN for float32 on any CPU; the sides of the products that it got."""
    sides = []

    def recorded(x, weight, bias, *rest):
        sides.append((x.numel() // x.shape[-1], *weight.shape))
        return one_dnn(x, weight, bias, *rest)

    one_dnn = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(dense, "_has_slow_default", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", recorded)
    return sides


def derivatives(linear, x, weight, bias):
    """Value, gradient, and the gradient of a function of the gradient."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = linear(leaves[0], leaves[1][:, 7 : 7 + x.shape[-1]], leaves[2])
    first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    return y, *first, *second


@pytest.mark.parametrize("shape", [(301, 129), (7, 43, 129)], ids=["matrix", "batch"])
def test_value_and_two_derivatives_of_a_slice_of_a_weight_are_those_of_float64(taken, shape):
    """The slice has gaps between its rows, which oneDNN would only do slowly."""
    x, weight, bias = torch.randn(shape), torch.randn(77, 150), torch.randn(77)
    found = derivatives(dense.linear, x, weight, bias)
    expected = derivatives(F.linear, x.double(), weight.double(), bias.double())
    rows = x.numel() // 129
    # y = x W^T; the gradients g W and g^T x or x^T g, each again in the second derivative
    assert {(rows, 77, 129), (rows, 129, 77)} <= set(taken)
    assert {(77, 129, rows), (129, 77, rows)} & set(taken)
    for name, a, b in zip(["y", "x", "W", "b", "xx", "WW", "bb"], found, expected, strict=True):
        assert_close(
            a.double(),
            b,
            rtol=0,
            atol=2e-5 * float(b.detach().abs().max()),
            msg=lambda m, n=name: n + m,
        )


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("sides", [(50, 3000, 90), (90, 3000, 50), (3000, 50, 90)])
def test_product_of_any_layout(taken, sides, transposed):
    m, k, n = sides
    a = torch.randn(k, m).t() if transposed[0] else torch.randn(m, k)
    b = torch.randn(n, k).t() if transposed[1] else torch.randn(k, n)
    assert_close(dense.product(a, b), (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-3)
    assert len(taken) == 1


def test_small_or_thin_products_other_precisions_and_autocast_stay_with_torch(taken):
    wide = torch.randn(3000, 64), torch.randn(64, 64)
    others = [
        (torch.randn(10, 64), wide[1]),
        (torch.randn(300_000, 8), torch.randn(64, 8)),
        (torch.randn(300_000, 64), torch.randn(1, 64)),
        (wide[0].double(), wide[1].double()),
        (wide[0].bfloat16(), wide[1].bfloat16()),
    ]
    for x, weight in others:
        assert torch.equal(dense.linear(x, weight), F.linear(x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dense.linear(*wide).dtype == torch.bfloat16
    assert taken == []
    dense.linear(*wide)
    assert taken == [(3000, 64, 64)]


def test_the_reference_backend_keeps_torch(monkeypatch):
    monkeypatch.setenv("ESCAIP_KERNELS", "reference")
    assert dense._has_slow_default.__wrapped__() is False


@pytest.mark.parametrize("kind", ["direct", "conservative"])
def test_a_model_has_the_same_forces_and_gradients(taken, monkeypatch, kind):
    settings = Settings(hidden=64, layers=1, neighbors=12, kind=kind)
    torch.manual_seed(0)
    model = own_model(settings.config()).train()
    batch = batch_of(batch_by_atoms("slabs", 130, 0))

    def run():
        model.zero_grad()
        found = outputs(model, batch)
        (found["energy"].sum() + found["forces"].square().sum()).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return found["energy"].detach(), found["forces"].detach(), grads

    energy, forces, grads = run()
    assert len(taken) > 20
    monkeypatch.setattr(dense, "_has_slow_default", lambda: False)
    count = len(taken)
    assert_close(energy, (plain := run())[0], rtol=1e-5, atol=0)
    assert len(taken) == count
    assert_close(forces, plain[1], rtol=0, atol=1e-5 * float(plain[1].abs().max()))
    for name, grad in plain[2].items():
        scale = float(grad.abs().max()) + 1e-4 * float(plain[1].abs().max())
        assert_close(grads[name], grad, rtol=0, atol=3e-5 * scale, msg=lambda m, n=name: n + m)
