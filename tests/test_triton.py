"""Triton attention against the plain reference: values, first and second derivatives."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

from escaip_fairchem.kernels import AttentionGeometry, neighbor_attention
from kernel_helpers import DEVICE, Calls, derivatives, errors

pytest.importorskip("triton")
triton_attention = importlib.import_module("escaip_fairchem.kernels.triton_attention")

PUBLISHED = (20, 10, 4, 10, 20)
# counts of the atoms, heads, channels, frequencies, with cosine scale
CASES = [
    pytest.param((5, 1, 3), 1, 20, (5, 4, 0, 7, 4), True, id="every-term"),
    pytest.param((17,), 3, 64, PUBLISHED, False, id="published"),
    pytest.param((33, 2), 1, 16, (), True, id="cosine"),
    pytest.param((1, 1), 1, 16, (0, 6, 10), False, id="one-slot"),
]


class Problem:
    """Random edges of atoms with `counts` neighbours; the first has no direction."""

    def __init__(self, counts, heads, size, frequencies, cosine, *, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

        self.counts = torch.tensor(counts, device=DEVICE)
        self.starts = self.counts.cumsum(0) - self.counts
        self.num_slots, self.frequencies, edges = max(counts), frequencies, sum(counts)
        atom = torch.repeat_interleave(self.counts)
        offset = torch.arange(edges, device=DEVICE) - self.starts[atom]
        self.slots = atom * self.num_slots + offset
        directions = torch.nn.functional.normalize(normal(edges, 3), dim=-1)
        directions[self.starts] = 0
        self.values = {
            "q": normal(edges, heads, size),
            "k": normal(edges, heads, size),
            "v": normal(edges, heads, size),
            "directions": directions,
            "log_envelope": -normal(edges).abs(),
        }
        if cosine:
            self.values["cosine_scale"] = torch.tensor(0.7, dtype=torch.float64, device=DEVICE)
        # cotangents of the output and of each gradient
        self.cotangents = [normal(edges, heads, size)] + [
            normal(*x.shape) for x in self.values.values()
        ]

    def leaves(self, dtype, low=None):
        """Inputs as leaves: q, k and v of type `low`, the geometry of type `dtype`."""
        return {
            name: x.to(low or dtype if name in "qkv" else dtype).detach().requires_grad_()
            for name, x in self.values.items()
        }

    @property
    def settings(self):
        return {"scale": 0.3, "frequencies": self.frequencies}

    def plain(self, q, k, v, directions, log_envelope, cosine_scale=None):
        geometry = AttentionGeometry.build(
            directions,
            log_envelope,
            self.counts,
            self.slots,
            self.num_slots,
            angular="legendre" if self.frequencies else "cosine",
            lmax=len(self.frequencies) - 1,
        )
        return neighbor_attention(q, k, v, geometry, cosine_scale=cosine_scale, **self.settings)

    def fused(self, q, k, v, directions, log_envelope, cosine_scale=None):
        return triton_attention.triton_attention(
            q,
            k,
            v,
            directions,
            log_envelope,
            self.starts,
            self.counts,
            num_slots=self.num_slots,
            cosine_scale=cosine_scale,
            **self.settings,
        )

    def derivatives(self, function, leaves):
        return derivatives(function, leaves, self.cotangents)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("counts, heads, size, frequencies, cosine", CASES)
def test_derivatives_equal_the_reference(counts, heads, size, frequencies, cosine, dtype):
    problem = Problem(counts, heads, size, frequencies, cosine)
    expected = problem.derivatives(problem.plain, problem.leaves(torch.float64))
    result = problem.derivatives(problem.fused, problem.leaves(dtype))
    found = errors(result, expected)
    assert max(found.values()) < (1e-5 if dtype == torch.float32 else 1e-12), found


@pytest.mark.parametrize("low, bound", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_low_precision(low, bound):
    problem = Problem((6,), 2, 64, PUBLISHED, True)
    problem.values |= {n: problem.values[n].to(low).double() for n in "qkv"}
    problem.cotangents = [c.to(low).double() for c in problem.cotangents]
    expected = problem.derivatives(problem.plain, problem.leaves(torch.float64))
    result = problem.derivatives(problem.fused, problem.leaves(torch.float32, low))
    found = errors(result, expected)
    assert max(found.values()) < bound, found


def test_packed_and_strided_inputs():
    problem = Problem((4, 2), 2, 20, (10, 10), False)
    leaves = problem.leaves(torch.float64)
    expected = problem.derivatives(problem.plain, leaves)

    def packed(q, k, v, directions, log_envelope):
        return triton_attention.triton_attention_packed(
            torch.stack([q, k, v], dim=1),
            directions,
            log_envelope,
            problem.starts,
            problem.counts,
            num_slots=problem.num_slots,
            **problem.settings,
        )

    def views(q, k, v, **geometry):
        rows = torch.stack([q, k], dim=1).unbind(1)  # a hole in each row
        return problem.fused(*rows, v.permute(2, 1, 0).contiguous().permute(2, 1, 0), **geometry)

    for function in (packed, views):
        found = errors(problem.derivatives(function, leaves), expected)
        assert max(found.values()) < 1e-12, found


def test_direct_models_spare_the_gradient_of_the_geometry():
    problem = Problem((3,), 1, 16, (), True)
    leaves = problem.leaves(torch.float64)
    for name in ("directions", "log_envelope"):
        leaves[name].requires_grad_(False)
    wanted = [x for x in leaves.values() if x.requires_grad]
    with Calls() as calls:
        result = torch.autograd.grad(problem.fused(**leaves).square().sum(), wanted)
    expected = torch.autograd.grad(problem.plain(**leaves).square().sum(), wanted)
    assert_close(result, expected)
    assert [name for name, _ in calls.seen] == ["attention", "attention_backward"]
    assert calls.seen[1][1][-1] is False


def test_no_third_derivative():
    problem = Problem((2,), 1, 16, (), False)
    leaves = problem.leaves(torch.float64)
    out = problem.fused(**leaves).square().sum()
    first = torch.autograd.grad(out, leaves["q"], create_graph=True)[0].square().sum()
    second = torch.autograd.grad(first, leaves["q"], create_graph=True)[0].square().sum()
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(second, leaves["q"])


@pytest.mark.parametrize("geometry", [True, False])
def test_operators_pass_the_checks_of_torch(geometry):
    problem = Problem((3, 1), 1, 16, (6, 10), True)
    leaves = problem.leaves(torch.float32)
    for name in ("directions", "log_envelope"):
        leaves[name].requires_grad_(geometry)
    with Calls() as calls:
        if geometry:
            problem.derivatives(problem.fused, leaves)
        else:
            problem.fused(**leaves).sum().backward()
    assert len(calls.seen) == (3 if geometry else 2)
    for name, args in calls.seen:
        op = getattr(torch.ops.escaip_fairchem, name).default
        if name == "attention_double_backward":  # has no derivative
            torch.library.opcheck(op, tree_map_only(torch.Tensor, torch.Tensor.detach, args))
        else:
            more = ["test_autograd_registration", "test_aot_dispatch_dynamic"] * geometry
            tests = ["test_schema", "test_faketensor", *more]
            torch.library.opcheck(op, args, test_utils=tests)


def test_compiles_to_one_graph():
    problem = Problem((3, 1), 1, 16, (6, 10), True)
    function = torch.compile(problem.fused, backend="aot_eager", fullgraph=True, dynamic=True)
    results = []
    for run in (function, problem.plain):
        leaves = problem.leaves(torch.float64)
        (run(**leaves) * problem.cotangents[0]).sum().backward()
        results.append({name: x.grad for name, x in leaves.items()})
    assert_close(*results)


def test_import_without_triton_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in list(sys.modules):
        if name.startswith("escaip_fairchem.kernels.triton"):
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="triton"):
        importlib.import_module("escaip_fairchem.kernels.triton_attention")
