"""Fused edge embedding against PyTorch's form: values, derivatives, whole models."""

from __future__ import annotations

import importlib
import logging

import pytest
import torch
import torch.nn.functional as F

from escaip_fairchem import EScAIP
from escaip_fairchem.features import gaussian_basis
from escaip_fairchem.kernels import SortedLengths, backends, edges, gather_gelu, order_by
from helpers import SMALL, gas, make_batch, triclinic
from kernel_helpers import DEVICE, Calls, derivatives, errors

pytest.importorskip("triton")
weigh_op = importlib.import_module("escaip_fairchem.kernels.triton_radial_ops").weigh_op

CUTOFF, WIDTH = 6.0, 2.0


def leaf(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(DEVICE, dtype).detach().requires_grad_()


class Distances:
    """Random lengths (a self edge at 0, one far away) and a linear map of `size` Gaussians."""

    def __init__(self, count: int, size: int, outputs: int) -> None:
        torch.manual_seed(0)
        double = {"dtype": torch.float64}
        self.size, lengths = size, 7 * torch.rand(count, **double)
        lengths[: count // 2 : 7], lengths[-1:] = 0.0, 1e4
        self.rows = torch.randint(max(count, 1), (2 * count,), device=DEVICE)
        self.values = {
            "lengths": lengths,
            "weight": torch.randn(outputs, size, **double),
            "bias": torch.randn(outputs, **double),
        }
        shapes = [(count, outputs), *(x.shape for x in self.values.values())]
        self.cotangents = [torch.randn(shape, **double).to(DEVICE) for shape in shapes]

    def derivatives(self, function, dtype):
        leaves = {name: leaf(x, dtype) for name, x in self.values.items()}
        return derivatives(function, leaves, self.cotangents)

    def plain(self, lengths, weight, bias):
        order = lengths.argsort()
        return F.linear(gaussian_basis(lengths[order], CUTOFF, self.size, WIDTH), weight, bias)

    def fused(self, lengths, weight, bias):
        basis = SortedLengths.build(lengths, self.rows, CUTOFF, self.size, WIDTH)
        (out,) = basis.linear(weight, bias)
        return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count, size, outputs", [(150, 90, 37), (1, 33, 5), (70, 600, 65)])
def test_distances(count, size, outputs, dtype):
    problem = Distances(count, size, outputs)
    # the same centres: in float32 their rounding is 1e-5 of a Gaussian
    expected = problem.derivatives(problem.plain, dtype)
    found = errors(problem.derivatives(problem.fused, dtype), expected)
    assert max(found.values()) < (3e-6 if dtype == torch.float32 else 1e-13), found


def test_many_lengths_in_pieces(monkeypatch):
    """A run of lengths is summed in pieces; without gradients rows come in parts."""
    problem = Distances(4200, 17, 3)
    order = problem.values["lengths"].argsort()
    basis = SortedLengths.build(problem.values["lengths"].to(DEVICE), problem.rows, 6.0, 17, 2.0)
    grad = problem.cotangents[0]
    found = weigh_op(grad, basis.lengths, basis.centers, basis.runs, 6.0, basis.sigma, 0)
    expected = grad.t() @ gaussian_basis(problem.values["lengths"][order], 6.0, 17, 2.0).to(DEVICE)
    torch.testing.assert_close(found, expected)

    problem = Distances(50, 17, 3)
    monkeypatch.setattr(edges, "_PART", 20)
    values = [x.to(DEVICE) for x in problem.values.values()]
    basis = SortedLengths.build(values[0], problem.rows, 6.0, 17, 2.0)
    with torch.no_grad():
        parts = list(basis.linear(*values[1:]))
    assert [len(part) for part in parts] == [20, 20, 10]
    torch.testing.assert_close(torch.cat(parts), problem.plain(*values))


def test_derivatives_by_lengths_spare_those_of_the_weights():
    problem = Distances(20, 33, 5)
    leaves = {name: leaf(x, torch.float64) for name, x in problem.values.items()}
    for wanted in (["lengths"], ["lengths", "weight"]):
        with Calls() as calls:
            out, inputs = problem.fused(**leaves), [leaves[name] for name in wanted]
            slope, *_ = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
            torch.autograd.grad(slope.sin().sum(), inputs)
        weighed = [name for name, _ in calls.seen].count("gaussian_weigh")
        # the second derivative by the weight has two terms
        assert weighed == (0 if wanted == ["lengths"] else 3)


def test_distances_are_exact_under_autocast():
    problem = Distances(50, 90, 16)
    values = [leaf(x, torch.float32) for x in problem.values.values()]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = problem.fused(*values)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, problem.plain(*values), rtol=1e-5, atol=1e-5)


def test_no_lengths():
    problem = Distances(0, 33, 5)
    for name, x in problem.derivatives(problem.fused, torch.float64).items():
        assert not x.any(), name


class Gather:
    """Random edges of atoms with `counts` neighbours and random tables of `size` channels."""

    def __init__(self, counts, size, *, distance=True, norm=True) -> None:
        torch.manual_seed(0)
        self.counts, double = torch.tensor(counts, device=DEVICE).long(), {"dtype": torch.float64}
        atoms, edges, lengths = len(counts), sum(counts), sum(counts) // 2 + 1
        self.receivers = torch.repeat_interleave(self.counts)
        # the first length belongs to many edges, the last atom to none as a neighbour
        self.rows = torch.randint(-lengths, lengths, (edges,), device=DEVICE).clamp(min=0)
        self.senders = torch.randint(max(atoms - 1, 1), (edges,), device=DEVICE)
        self.index = [self.rows, self.senders, self.receivers]
        self.index += [self.counts.cumsum(0) - self.counts, self.counts]
        self.index += [*order_by(self.rows, lengths), *order_by(self.senders, atoms)]
        shapes = {"source": (atoms, size), "target": (atoms, size)}
        shapes |= {"distance": (lengths, size)} if distance else {}
        shapes |= {"norm": (size,)} if norm else {}
        self.values = {name: torch.randn(shape, **double) for name, shape in shapes.items()}
        shapes = [(edges, size), *shapes.values()]
        self.cotangents = [torch.randn(shape, **double).to(DEVICE) for shape in shapes]

    def leaves(self, dtype, low=None):
        """Tables of type `low`, the norm's weight of type `dtype`."""
        return {
            name: leaf(x, dtype if name == "norm" else low or dtype)
            for name, x in self.values.items()
        }

    def plain(self, source, target, distance=None, norm=None):
        total = source[self.senders] + target[self.receivers]
        total = F.gelu(total if distance is None else total + distance[self.rows])
        return total if norm is None else F.rms_norm(total, norm.shape, norm)

    def fused(self, source, target, distance=None, norm=None):
        return gather_gelu(distance, source, target, self.index, norm)


CASES = {
    "every-term": Gather([5, 1, 3, 70], 24),
    "wide": Gather([3, 2], 300),
    "pair": Gather([5, 1, 3], 16, distance=False, norm=False),
    "without-norm": Gather([2, 7], 20, norm=False),
    "pair-norm": Gather([9], 7, distance=False),
    "one-edge": Gather([1], 3),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_gather(case, dtype):
    problem = CASES[case]
    expected = derivatives(problem.plain, problem.leaves(torch.float64), problem.cotangents)
    result = derivatives(problem.fused, problem.leaves(dtype), problem.cotangents)
    found = errors(result, expected)
    assert max(found.values()) < 1000 * torch.finfo(dtype).eps, found


@pytest.mark.parametrize("low, bound", [(torch.bfloat16, 0.01), (torch.float16, 0.0015)])
def test_gather_of_low_precision(low, bound):
    problem = Gather([5, 9, 1, 3], 24)
    tables = [name for name in problem.values if name != "norm"]
    problem.values |= {name: problem.values[name].to(low).double() for name in tables}
    problem.cotangents = [x.to(low).double() for x in problem.cotangents]
    expected = derivatives(problem.plain, problem.leaves(torch.float64), problem.cotangents)
    leaves = problem.leaves(torch.float32, low)
    result = derivatives(problem.fused, leaves, problem.cotangents)
    assert {name: x.dtype for name, x in result.items() if "norm" not in name} == {
        name: low for name in result if "norm" not in name
    }
    found = errors(result, expected)
    assert max(found.values()) < bound, found


def test_many_rows_are_summed_in_float32():
    """In bfloat16 256 + 1 is 256: the row of all self edges would hardly get a gradient."""
    problem = Gather([600], 4, norm=False)
    leaves = {name: torch.zeros_like(x) for name, x in problem.leaves(torch.bfloat16).items()}
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    problem.fused(**leaves).sum().backward()
    count = int((problem.rows == 0).sum())
    assert count > 256
    assert leaves["distance"].grad[0].tolist() == pytest.approx([count / 2] * 4, rel=4e-3)


def test_no_edges():
    problem = Gather([], 8)
    result = derivatives(problem.fused, problem.leaves(torch.float64), problem.cotangents)
    assert not any(x.any() for x in result.values())


def test_operators_pass_the_checks_of_torch():
    gather, distances = Gather([3, 1], 8), Distances(20, 33, 5)
    pair = Gather([3, 1], 8, distance=False, norm=False)
    with Calls() as calls:
        for problem in (gather, pair):
            derivatives(problem.fused, problem.leaves(torch.float32), problem.cotangents)
        distances.derivatives(distances.fused, torch.float32)
    names = {name for name, _ in calls.seen}
    assert names == {
        *("gather", "gather_backward", "gather_double_backward"),
        *("gaussian_expand", "gaussian_contract", "gaussian_weigh"),
    }
    for name, args in calls.seen:
        op = getattr(torch.ops.escaip_fairchem, name).default
        torch.library.opcheck(op, args, test_utils=["test_schema", "test_faketensor"])


def test_compiles_to_one_graph():
    gather, distances = Gather([3, 1], 8), Distances(20, 33, 5)
    inputs = list(gather.values), list(distances.values)
    basis = SortedLengths.build(
        distances.values["lengths"].to(DEVICE), distances.rows, CUTOFF, 33, WIDTH
    )

    def function(leaves):
        source, target, distance, norm, weight, bias = leaves
        (hidden,) = basis.linear(weight, bias)
        return gather.fused(source, target, distance, norm).sin().sum() + hidden.sin().sum()

    results = []
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for run in (compiled, function):
        leaves = [leaf(gather.values[n], torch.float64) for n in inputs[0]]
        leaves += [leaf(distances.values[n], torch.float64) for n in inputs[1][1:]]
        run(leaves).backward()
        results.append([x.grad for x in leaves])
    torch.testing.assert_close(*results)


def build_model(*, direct: bool, **backbone) -> EScAIP:
    """A random model in float32, without dropout and small, for the interpreter's sake."""
    torch.manual_seed(0)
    config = {"model": "escaip_fairchem.EScAIPBackbone", **SMALL, "num_layers": 1, "num_heads": 1}
    config |= {"max_neighbors": 6, "mlp_dropout": 0.0, "attention_dropout": 0.0}
    config |= {"node_ffn_dropout": 0.0, "edge_ffn_dropout": 0.0, **backbone}
    heads = {
        "energy": {"module": "escaip_fairchem.EnergyHead"},
        "forces": {"module": "escaip_fairchem.DirectForceHead"},
    }
    if not direct:
        config |= {"direct_forces": False, "regress_stress": True}
        heads = {"efs": {"module": "escaip_fairchem.ConservativeHead"}}
    model = EScAIP(backbone=config, heads=heads)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    return model.to(DEVICE)


def outputs_and_gradients(model: EScAIP, dtype=torch.float32) -> tuple[dict, dict]:
    """Energies, forces and stress, and parameter gradients of a loss of all of them."""
    batch = make_batch(gas()[:4], triclinic(), dtype=dtype).to(DEVICE)
    if model.backbone.config.force_encoding:
        batch["encoded_forces"] = batch["pos"].sin()
    found = {key: x for output in model.to(dtype)(batch).values() for key, x in output.items()}
    sum(x.square().sum() for x in found.values()).backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return {key: x.detach() for key, x in found.items()}, gradients


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "conservative"])
@pytest.mark.parametrize("preset", ["v2", "paper"])
def test_whole_models(preset, direct, monkeypatch):
    """In float32, against PyTorch's form in float64."""
    expected = outputs_and_gradients(build_model(preset=preset, direct=direct), torch.float64)
    monkeypatch.setenv("ESCAIP_KERNELS", "triton")
    with Calls() as calls:
        outputs, gradients = outputs_and_gradients(build_model(preset=preset, direct=direct))
    found = {name for name, _ in calls.seen}
    assert found >= {"gather", "gather_backward", "gaussian_expand", "gaussian_weigh"}
    assert ("gather_double_backward" in found) == (not direct)
    found = errors(outputs, expected[0])
    assert max(found.values()) < 5e-6, found
    # single numbers (cosine_scale, biases) are small sums of large terms
    found = errors(gradients, expected[1])
    assert max(found.values()) < 2e-5, found


def test_blocks_that_are_repeated_with_dropout(monkeypatch):
    """torch's checkpointing repeats them, and gives each saved tensor only once."""
    monkeypatch.setenv("ESCAIP_KERNELS", "triton")
    results = []
    for mode in ("none", "block"):
        # what is dropped is the same when a block is repeated
        rates = {"node_ffn_dropout": 0.2, "checkpointing": mode}
        model = build_model(preset="v2", direct=False, **rates).train()
        torch.manual_seed(1)
        outputs, gradients = outputs_and_gradients(model)
        results.append(outputs | gradients)
    found = errors(*results)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("preset", ["v2", "paper"])
def test_inference_in_chunks(preset, monkeypatch):
    results = []
    for name in ("torch", "triton"):
        monkeypatch.setenv("ESCAIP_KERNELS", name)
        model = build_model(preset=preset, direct=True, inference_chunk=4).eval()
        with torch.no_grad():
            outputs = model(make_batch(gas(), dtype=torch.float32).to(DEVICE)).values()
        results.append({key: x for output in outputs for key, x in output.items()})
    found = errors(*results)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(
    "backbone, fused",
    [
        ({"activation": "smelu"}, set()),
        ({"mlp_dropout": 0.5}, {"gaussian_expand"}),
        ({"force_encoding": True}, {"gaussian_expand", "gather"}),  # the gather of pairs
        ({"norm": "layernorm", "checkpointing": "none"}, {"gaussian_expand", "gather"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_kernels_do_not_know(backbone, fused, monkeypatch, caplog):
    """It takes PyTorch's form, with the same result."""
    results = {}
    backends._log_once.cache_clear()
    caplog.set_level(logging.INFO)
    for name in ("torch", "triton"):
        monkeypatch.setenv("ESCAIP_KERNELS", name)
        model = build_model(preset="v2", direct=True, **backbone)
        torch.manual_seed(0)
        with Calls() as calls:
            results[name] = outputs_and_gradients(model)[1]
    assert {name for name, _ in calls.seen} & {"gaussian_expand", "gather"} == fused
    why = "edge kernel: torch (the Triton kernels have no smelu)"
    assert (why in caplog.messages) == ("activation" in backbone)
    found = errors(results["triton"], results["torch"])
    assert max(found.values()) < 2e-5, found
