"""The soft k nearest neighbours by Triton kernels against those by PyTorch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from torch.testing import assert_close

from escaip_fairchem.config import EScAIPConfig
from escaip_fairchem.graph import build_graph
from escaip_fairchem.neighbors import Structures
from helpers import gas, make_batch, one_atom, slab, small_model, triclinic

pytest.importorskip("triton")
# without a GPU triton's interpreter runs the kernels, see conftest.py
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = {torch.float64: 1e-12, torch.float32: 1e-6}

STRUCTURES = {
    "slab": slab(),
    "perfect-slab": fcc111("Cu", (2, 2, 3), vacuum=5.0, periodic=True),
    "gas": gas(),
    "water": Atoms("OH2", molecule("H2O").positions, cell=[9, 9, 9], pbc=True),
    "copper": bulk("Cu", cubic=True),
    "rock-salt": bulk("NaCl", "rocksalt", a=5.64, cubic=True),
    "iron": bulk("Fe"),
    "silicon": bulk("Si"),
    "triclinic": triclinic(),
    "one-atom": one_atom(),
    "alone": Atoms("H"),
    "far-apart": Atoms("H2", [[0, 0, 0], [0, 0, 30.0]], cell=[60, 60, 60], pbc=True),
    # about 350 neighbours within reach of each atom
    "dense": bulk("Cu", a=2.4) * (2, 1, 1),
}


def structures(*batch: Atoms, dtype: torch.dtype) -> Structures:
    natoms = torch.tensor([len(atoms) for atoms in batch])
    tensors = (
        torch.tensor(np.concatenate([atoms.positions for atoms in batch]), dtype=dtype),
        torch.tensor(np.stack([atoms.cell.array for atoms in batch]), dtype=dtype),
        torch.tensor(np.stack([atoms.pbc for atoms in batch])),
        natoms,
        torch.repeat_interleave(torch.arange(len(batch)), natoms),
    )
    return Structures(*(tensor.to(DEVICE) for tensor in tensors))


def compare(batch: Structures, tolerance: float, **keys) -> None:
    """Same edges, geometry to the bit, weights to a tolerance."""
    config = EScAIPConfig.from_kwargs(preset="v2", neighbor_search="fairchem", **keys)
    fused, expected = (build_graph(batch, config, fused=fused) for fused in (True, False))
    for field in dataclasses.fields(expected):
        got, wanted = (getattr(graph, field.name) for graph in (fused, expected))
        if field.name != "log_envelope":
            assert_close(got, wanted, rtol=0, atol=0, msg=field.name)
    assert_close(fused.envelope, expected.envelope, rtol=0, atol=tolerance)
    assert fused.log_envelope.isfinite().all()


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("smooth, dtype", [(False, torch.float32), (True, torch.float64)])
def test_every_structure(name, smooth, dtype):
    compare(structures(STRUCTURES[name], dtype=dtype), FLOATS[dtype], smooth=smooth)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        # lists shorter than a block of the kernel, and ones of several blocks
        {"max_neighbors": 2, "cutoff": 3.0},
        {"max_neighbors": 60, "cutoff": 7.0},
        {"rank_scale": 0.5, "envelope_scale": 0.03},
    ],
    ids=str,
)
def test_one_batch_of_many(keys):
    names = ("gas", "triclinic", "one-atom", "alone", "far-apart", "copper")
    batch = structures(*(STRUCTURES[name] for name in names), dtype=torch.float64)
    compare(batch, 1e-12, **keys)


def test_a_shell_larger_than_the_list():
    """60 atoms around one, equally far to rounding: its list takes the first 49."""
    height = 1 - (2 * np.arange(60) + 1) / 60  # spread evenly over the sphere
    angle = np.pi * (1 + 5**0.5) * np.arange(60)
    radius = np.sqrt(1 - height**2)
    points = 4 * np.stack([radius * np.cos(angle), radius * np.sin(angle), height], axis=1)
    batch = structures(Atoms("H61", [[0, 0, 0], *points]), dtype=torch.float32)
    config = EScAIPConfig.from_kwargs(preset="v2", max_neighbors=30, neighbor_search="fairchem")
    assert build_graph(batch, config, fused=True).counts[0] == 50  # with the atom itself
    compare(batch, 1e-6, max_neighbors=30)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_derivatives_for_conservative_models(smooth, dtype):
    """First and second, by the positions."""
    config = EScAIPConfig.from_kwargs(
        preset="v2", smooth=smooth, direct_forces=False, max_neighbors=12
    )
    names = ("gas", "triclinic", "one-atom", "alone")
    batch = structures(*(STRUCTURES[name] for name in names), dtype=dtype)

    def derivatives(fused: bool) -> list[torch.Tensor]:
        positions = batch.positions.clone().requires_grad_()
        graph = build_graph(dataclasses.replace(batch, positions=positions), config, fused=fused)
        rng = torch.Generator().manual_seed(0)
        weights = torch.randn(len(graph.senders), generator=rng).to(graph.envelope)
        first = torch.autograd.grad(graph.envelope @ weights, positions, create_graph=True)[0]
        other = torch.randn(first.shape, generator=rng).to(first)
        second = torch.autograd.grad((first * other).sum(), positions)[0]
        return [graph.envelope.detach(), first.detach(), second]

    for got, expected in zip(derivatives(True), derivatives(False), strict=True):
        scale = float(expected.abs().max())
        assert scale > 0.1
        # lengths of the two directions of a pair differ by their rounding, which ranks see
        assert_close(got, expected, rtol=0, atol=5 * FLOATS[dtype] * scale)


def test_whole_model(monkeypatch):
    """The variable chooses the kernels, when a model is built."""
    batch = make_batch(triclinic(), gas())
    expected = small_model(preset="v2")(batch.clone())
    monkeypatch.setenv("ESCAIP_KERNELS", "triton")
    # another key of the cache of models, with the same weights
    model = small_model(preset="v2", neighbor_search="fairchem")
    calls = []
    lists = torch.ops.escaip_fairchem.soft_knn_lists

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **kwargs or {})

    with Seen():
        found = model(batch.clone())
    assert lists.default in calls
    for name, value in expected.items():
        assert_close(found[name][name], value[name], rtol=1e-9, atol=1e-9)


def test_operators_pass_the_checks_of_torch():
    from escaip_fairchem.kernels.triton_graph import soft_knn_lists, soft_knn_log_envelope

    lengths = torch.tensor([1.0, 2.0, 1.0, 9.0], device=DEVICE)
    order, starts = torch.tensor([2, 0, 1, 3], device=DEVICE), torch.tensor([0, 3, 4, 4])
    arguments = lengths, order, starts.to(DEVICE), 5, 6.0, 1e6, 1e4
    distances, candidates = soft_knn_lists(*arguments)
    assert distances.tolist() == [[1, 1, 2, 1e4, 1e4], [1e4] * 5, [1e4] * 5]
    assert candidates.tolist() == [[2, 0, 1, 0, 0], [0] * 5, [0] * 5]
    tests = ["test_schema", "test_faketensor"]
    torch.library.opcheck(soft_knn_lists, arguments, test_utils=tests)
    senders = torch.tensor([1, 2, 2, 0], device=DEVICE)
    arguments = distances, candidates, senders, 2, 6.0, 0.2, 0.1, False, 1e4
    torch.library.opcheck(soft_knn_log_envelope, arguments, test_utils=tests)
