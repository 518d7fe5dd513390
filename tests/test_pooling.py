"""Sums of edges by atom: PyTorch's and Triton's against loops, and their derivatives."""

from __future__ import annotations

import importlib

import pytest
import torch

from escaip_fairchem.kernels.edges import sum_edges
from kernel_helpers import DEVICE, Calls, derivatives, errors

try:
    pool_op = importlib.import_module("escaip_fairchem.kernels.triton_pool").pool_op
except ImportError:
    pool_op = None

triton_only = pytest.mark.skipif(pool_op is None, reason="triton is not installed")
BOTH = [sum_edges, pytest.param(pool_op, id="triton", marks=triton_only)]
COUNTS = [3, 0, 1, 20, 9, 0]


def index_of(counts: list[int]) -> tuple[torch.Tensor, ...]:
    counts = torch.tensor(counts, dtype=torch.long, device=DEVICE)
    receivers = torch.repeat_interleave(torch.arange(len(counts), device=DEVICE), counts)
    return receivers, counts.cumsum(0) - counts, counts


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("size", [1, 37, 200])
def test_sums_of_each_atom(function, size):
    torch.manual_seed(0)
    edge = torch.randn(sum(COUNTS), size, device=DEVICE)
    expected = torch.stack([part.double().sum(0) for part in edge.split(COUNTS)])
    found = function(edge, *index_of(COUNTS))
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    # columns of a wider array, as a chunk or a part may be
    part = torch.cat([edge, edge], 1)[:, :size]
    assert torch.equal(function(part, *index_of(COUNTS)), found)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(function, dtype):
    """In bf16 256 + 1 is 256."""
    edge = torch.ones(4099, 3, dtype=dtype, device=DEVICE)
    found = function(edge, *index_of([4099]))
    assert found.dtype == torch.float32
    assert found.tolist() == [[4099.0] * 3]


@triton_only
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_derivatives(dtype):
    torch.manual_seed(0)
    index = index_of(COUNTS)
    edge = torch.randn(sum(COUNTS), 12, dtype=torch.float64, device=DEVICE).to(dtype)
    cotangents = [torch.randn(len(COUNTS), 12), torch.randn(edge.shape)]
    found = []
    for function in (pool_op, sum_edges):
        # squared, so that the second derivative is not zero
        leaves = {"edge": edge.clone().requires_grad_()}
        weights = [c.to(DEVICE) for c in cotangents]
        found.append(
            derivatives(lambda edge, f=function: f(edge, *index).square(), leaves, weights)
        )
    assert found[0]["dd edge"].any()
    assert max(errors(*found).values()) < {torch.float64: 1e-14}.get(dtype, 1e-6)


@triton_only
def test_no_edges_and_no_atoms():
    for counts in ([0, 0], []):
        edge = torch.randn(0, 5, device=DEVICE, requires_grad=True)
        out = pool_op(edge, *index_of(counts))
        assert out.tolist() == [[0.0] * 5] * len(counts)
        out.sum().backward()
        assert edge.grad.shape == (0, 5)


@triton_only
def test_operators_pass_the_checks_of_torch():
    edge = torch.randn(sum(COUNTS), 6, device=DEVICE, requires_grad=True)
    with Calls() as calls:
        pool_op(edge, *index_of(COUNTS)).square().sum().backward()
    assert [name for name, _ in calls.seen] == ["pool", "spread"]
    for name, args in calls.seen:
        op = getattr(torch.ops.escaip_fairchem, name).default
        torch.library.opcheck(op, args, test_utils=["test_schema", "test_faketensor"])


@triton_only
def test_compiles_to_one_graph():
    index = index_of(COUNTS)

    def loss(edge):
        return pool_op(edge, *index).sin().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    edge = torch.randn(sum(COUNTS), 6, device=DEVICE, requires_grad=True)
    found = [torch.autograd.grad(f(edge), edge)[0] for f in (compiled, loss)]
    torch.testing.assert_close(*found)
