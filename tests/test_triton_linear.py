"""Triton linear maps, with norm and activation inside, against plain ones."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from ase.build import molecule

from escaip_fairchem import EScAIP
from escaip_fairchem.layers import FeedForward, LayerNorm, RMSNorm
from helpers import SMALL, make_batch
from kernel_helpers import DEVICE, Calls, derivatives, errors

pytest.importorskip("triton")
triton_linear = importlib.import_module("escaip_fairchem.kernels.triton_linear")
operators = importlib.import_module("escaip_fairchem.kernels.triton_linear_ops")

# rows, inputs, outputs, GELU, norm, bias and residual
CASES = [
    pytest.param(70, 37, 67, False, True, True, id="norm"),
    pytest.param(1, 64, 16, True, False, True, id="gelu"),
    pytest.param(131, 130, 3, True, True, False, id="gelu-norm"),
    pytest.param(65, 33, 20, False, False, False, id="plain"),
    pytest.param(5, 8, 4, False, False, True, id="bias-and-residual"),
]


class Problem:
    """Random inputs; rows of very different sizes, as a norm meets them."""

    def __init__(self, rows, size, outputs, gelu, norm, more):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

        scale = torch.logspace(-2, 1, rows, dtype=torch.float64, device=DEVICE)[:, None]
        self.values = {"x": normal(rows, size) * scale}
        self.values["weight"] = normal(outputs, size) / size**0.5
        if norm:
            self.values["norm"] = 1 + 0.3 * normal(size)
        if more:
            self.values |= {"bias": normal(outputs), "residual": normal(rows, outputs)}
        self.gelu = gelu
        self.cotangents = [normal(rows, outputs), *(normal(*x.shape) for x in self.values.values())]

    def leaves(self, dtype):
        return {n: x.to(dtype).detach().requires_grad_() for n, x in self.values.items()}

    def plain(self, x, weight, norm=None, bias=None, residual=None):
        x = F.gelu(x) if self.gelu else x
        if norm is not None:
            x = F.rms_norm(x, norm.shape, norm, torch.finfo(torch.float32).eps)
        out = F.linear(x, weight, bias)
        return out if residual is None else residual + out

    def fused(self, x, weight, norm=None, bias=None, residual=None):
        options = {"gelu": self.gelu, "norm": norm, "residual": residual}
        return triton_linear.norm_linear(x, weight, bias, **options)

    def derivatives(self, function, leaves, **options):
        return derivatives(function, leaves, self.cotangents, **options)


@pytest.mark.parametrize("rows, size, outputs, gelu, norm, more", CASES)
def test_derivatives_equal_plain_ones(rows, size, outputs, gelu, norm, more):
    problem = Problem(rows, size, outputs, gelu, norm, more)
    expected = problem.derivatives(problem.plain, problem.leaves(torch.float64))
    result = problem.derivatives(problem.fused, problem.leaves(torch.float32))
    found = errors(result, expected)
    assert max(found.values()) < 1e-5, found
    # the kernels of the first derivative alone
    result = problem.derivatives(problem.fused, problem.leaves(torch.float32), second=False)
    found = errors(result, {name: expected[name] for name in result})
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("tile", [(128, 256, 64), (64, 64, 32), (128, 128, 32)])
def test_tiles_of_a_gpu(tile, monkeypatch):
    problem = Problem(150, 70, 300, True, True, True)
    expected = problem.plain(**problem.leaves(torch.float64))
    monkeypatch.setattr(operators, "_tile", lambda *args, **options: (*tile, 8, 3))
    result = problem.fused(**problem.leaves(torch.float32))
    assert errors({"out": result}, {"out": expected})["out"] < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gelu", [False, True])
def test_half_precision_is_as_exact_as_the_plain_form(dtype, gelu):
    """Norm weights folded into W are rounded with it, instead of with the input."""
    problem = Problem(200, 96, 80, gelu, True, True)
    expected = problem.derivatives(problem.plain, problem.leaves(torch.float64), second=False)
    found = []
    for function in (problem.fused, problem.plain):
        with torch.autocast(DEVICE, dtype):
            result = problem.derivatives(function, problem.leaves(torch.float32), second=False)
        assert result["out"].dtype == torch.float32  # of the residual
        found.append(errors(result, expected, order=2))
    ours, theirs = found
    assert all(ours[name] < 1.1 * theirs[name] for name in ours), found


def test_normal_distribution_in_the_tails():
    x = torch.cat([torch.linspace(-40, 40, 4001), torch.tensor([-1e10, 1e10, torch.inf])])
    weight = torch.ones(1, 1)
    found = triton_linear.norm_linear(x[:, None].to(DEVICE), weight.to(DEVICE), gelu=True)[:, 0]
    expected = F.gelu(x.double())
    torch.testing.assert_close(found.cpu().double(), expected, rtol=2e-7, atol=5e-7)


def test_no_rows_and_leading_axes():
    x, weight = torch.randn(0, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    triton_linear.norm_linear(x, weight, norm=torch.ones(8)).sum().backward()
    assert x.grad.shape == (0, 8)
    assert float(weight.grad.abs().max()) == 0
    assert triton_linear.norm_linear(torch.randn(2, 3, 8), weight).shape == (2, 3, 4)


def test_forces_spare_the_gradients_of_the_weights():
    """As they differentiate by positions alone."""
    problem = Problem(6, 8, 4, True, True, True)
    leaves = problem.leaves(torch.float32)
    out = problem.fused(**leaves)
    assert torch.autograd.grad(out.sum(), leaves["bias"])[0].tolist() == [6] * 4
    for wanted in (["x"], ["x", "norm"], ["x", "weight"]):
        with Calls() as calls:
            out = problem.fused(**leaves)
            torch.autograd.grad(out.square().sum(), [leaves[name] for name in wanted])
        assert [name for name, _ in calls.seen] == ["norm_linear", "norm_linear_backward"]
        assert calls.seen[1][1][-1] is (len(wanted) > 1)


def kept(function) -> list[torch.Tensor]:
    tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        function()
    return tensors


def test_backward_keeps_what_cannot_be_given_again():
    problem = Problem(50, 8, 4, True, True, True)
    leaves = problem.leaves(torch.float32)
    found = kept(lambda: problem.fused(**leaves))
    rows = [t for t in found if len(t) == 50]
    assert {t.data_ptr() for t in rows if t.dim() == 2} == {leaves["x"].data_ptr()}
    assert [t.shape for t in rows if t.dim() == 1] == [(50,)]  # 1 / rms


def test_operators_pass_the_checks_of_torch():
    problem = Problem(5, 8, 4, True, True, True)
    with Calls() as calls:
        problem.derivatives(problem.fused, problem.leaves(torch.float32), second=False)
    assert len(calls.seen) == 2
    for name, args in calls.seen:
        op = getattr(torch.ops.escaip_fairchem, name).default
        torch.library.opcheck(op, args, test_utils=["test_schema", "test_faketensor"])


def test_compiles_to_one_graph():
    problem = Problem(6, 8, 5, True, True, True)
    function = torch.compile(problem.fused, backend="aot_eager", fullgraph=True, dynamic=True)
    results = []
    for run in (function, problem.plain):
        leaves = problem.leaves(torch.float32)
        (run(**leaves) * problem.cotangents[0].float()).sum().backward()
        results.append({name: x.grad for name, x in leaves.items()})
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["dropout", "relu", "layernorm", "float64"])
def test_what_the_kernel_does_not_cover_is_left_to_torch(case, monkeypatch):
    dropout = 0.5 if case == "dropout" else 0.0
    activation = "relu" if case == "relu" else "gelu"
    norm = LayerNorm(8) if case == "layernorm" else RMSNorm(8)
    settings = {"activation": activation, "dropout": dropout, "recompute": True}
    x = torch.randn(6, 8)
    results = []
    for name in ("triton", "torch"):
        monkeypatch.setenv("ESCAIP_KERNELS", name)
        torch.manual_seed(0)
        ffn = FeedForward(8, 2, **settings)
        if case == "float64":
            ffn, x, norm = ffn.double(), x.double(), norm.double()
        with Calls() as calls:
            results.append(ffn(x, norm, x))
        # with another norm or activation the other of the two maps is covered
        covered = {"dropout": 1, "relu": 1, "layernorm": 1, "float64": 0}[case]
        assert len(calls.seen) == (covered if name == "triton" else 0)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def outputs_and_gradients(preset: str, *, direct: bool):
    """Energy, forces and gradients of all parameters of a random model in training."""
    torch.manual_seed(0)
    heads = {"efs": {"module": "escaip_fairchem.ConservativeHead"}}
    if direct:
        heads = {
            "energy": {"module": "escaip_fairchem.EnergyHead"},
            "forces": {"module": "escaip_fairchem.DirectForceHead"},
        }
    config = {"model": "escaip_fairchem.EScAIPBackbone", "preset": preset, **SMALL}
    config |= {"direct_forces": direct, "attention_dropout": 0.0, "num_heads": 1}
    model = EScAIP(backbone=config, heads=heads)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    atoms = molecule("CH3OH" if preset == "paper" else "H2O")
    atoms.rattle(0.05, seed=1)
    with Calls() as calls:
        tasks = model.train()(make_batch(atoms, dtype=torch.float32))
        values = {k: v for task in tasks.values() for k, v in task.items()}
        (values["energy"].sum() + values["forces"].square().sum()).backward()
    found = {name: values[name].detach() for name in ("energy", "forces")}
    size = config["hidden_size"]
    for name, weight in model.named_parameters():
        gradient = weight.grad
        if name.endswith("qkv.bias"):  # that of the keys is zero but for rounding
            gradient = torch.cat([gradient[:size], gradient[2 * size :]])
        found[name] = gradient
    return found, [name for name, _ in calls.seen]


@pytest.mark.parametrize("preset", ["paper", "v2"])
@pytest.mark.parametrize("direct", [True, False])
def test_whole_model(preset, direct, monkeypatch):
    expected, _ = outputs_and_gradients(preset, direct=direct)
    monkeypatch.setenv("ESCAIP_KERNELS", "triton")
    result, calls = outputs_and_gradients(preset, direct=direct)
    assert calls.count("norm_linear") > 15
    found = errors(result, expected)
    assert max(found.values()) < 1e-5, max(found.items(), key=lambda item: item[1])
