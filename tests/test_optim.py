"""Muon against torch's own Muon, AdamW and the singular value decomposition; the Huber loss."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from escaip_fairchem.errors import UserError
from escaip_fairchem.train.loss import HuberNormLoss
from escaip_fairchem.train.optim import Muon, orthogonalize


def groups(net: nn.Module, decay: float = 0.1) -> list[dict]:
    """Groups as fairchem makes them: what is not decayed first."""
    matrices = [m.weight for m in net.modules() if isinstance(m, nn.Linear)]
    rest = [p for p in net.parameters() if all(p is not m for m in matrices)]
    return [{"params": rest, "weight_decay": 0}, {"params": matrices, "weight_decay": decay}]


def network(inputs: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 16), nn.GELU(), nn.Linear(16, 16), nn.Linear(16, 1))


def descend(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(32, 6, generator=generator)
        optimizer.zero_grad()
        (net(x)[:, 0] - x.square().sum(1)).abs().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (30, 7)])
def test_orthogonalize_keeps_singular_vectors_and_levels_values(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape, dtype=torch.float64) * torch.tensor([1e-4, 1.0, 1e4])[
        :, None, None
    ].to(torch.float64)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    inside = left.mT @ orthogonalize(matrices) @ right.mT
    values = torch.diagonal(inside, dim1=-2, dim2=-1)
    assert ((values > 0.6) & (values < 1.3)).all()
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-9
    assert orthogonalize(torch.zeros(1, 4, 4)).abs().max() == 0


def test_matrices_move_as_by_torch():
    """`torch.optim.Muon` computes in bfloat16, which bounds the agreement of a step."""
    net = network()
    theirs = copy.deepcopy(net)
    own = Muon(groups(net), lr=1e-2, weight_decay=0.1)
    weights = [theirs[0].weight, theirs[2].weight]
    other = torch.optim.Muon(weights, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    torch.manual_seed(0)
    for _ in range(3):
        before = [w.detach().clone() for w in weights]
        for ours, torchs in zip((net[0].weight, net[2].weight), weights, strict=True):
            ours.data.copy_(torchs)
            ours.grad = torch.randn_like(ours)
            torchs.grad = ours.grad.clone()
        own.step()
        other.step()
        for start, ours, torchs in zip(
            before, (net[0].weight, net[2].weight), weights, strict=True
        ):
            assert (ours - torchs).norm() < 0.05 * (torchs - start).norm()


def test_the_rest_moves_as_by_adamw():
    """Biases and the last layer, exactly."""
    net = network()
    theirs = copy.deepcopy(net)
    own = Muon(groups(net), adam_lr=1e-2, weight_decay=0.1)
    other = torch.optim.AdamW(groups(theirs), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        torch.manual_seed(step)
        for ours, torchs in zip(net.parameters(), theirs.parameters(), strict=True):
            ours.grad = torch.randn_like(ours)
            torchs.grad = ours.grad.clone()
        own.step()
        other.step()
    compared = 0
    for ours, torchs in zip(net.parameters(), theirs.parameters(), strict=True):
        if ours.ndim == 1 or len(ours) == 1:
            assert torch.equal(ours, torchs)
            compared += 1
        else:
            assert not torch.equal(ours, torchs)
    assert compared == 4


def test_resumes_bitwise(tmp_path):
    net = network()
    optimizer = Muon(groups(net))
    descend(net, optimizer, 5)
    torch.save([net.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    descend(net, optimizer, 5, seed=2)

    other = network()
    resumed = Muon(groups(other))
    weights, state = torch.load(tmp_path / "state.pt")
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    descend(other, resumed, 5, seed=2)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_parameter_without_gradient_stays():
    net = network()
    net[2].requires_grad_(False)
    before = net[2].weight.clone()
    descend(net, Muon(groups(net)), 3)
    assert torch.equal(net[2].weight, before)
    assert net[0].weight.grad is not None


@pytest.mark.parametrize("bad", [{"lr": 0}, {"adam_lr": -1}, {"momentum": 1}, {"weight_decay": 0}])
def test_bad_settings_are_named(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Muon(network().parameters(), **bad)


def test_huber_of_lengths():
    generator = np.random.default_rng(0)
    predicted, target = generator.normal(size=(2, 50, 3)) * 2
    length = np.sqrt(((predicted - target) ** 2).sum(1))
    expected = np.where(length < 1.5, length**2 / 2, 1.5 * (length - 0.75))
    assert (length < 1.5).any()
    assert (length > 1.5).any()
    loss = HuberNormLoss(delta=1.5)(torch.tensor(predicted), torch.tensor(target), None)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-12)


def test_huber_gradient_is_finite_without_an_error():
    predicted = torch.zeros(4, 3, requires_grad=True)
    HuberNormLoss()(predicted, torch.zeros(4, 3), None).sum().backward()
    assert predicted.grad.abs().max() == 0


def test_huber_needs_a_positive_delta():
    with pytest.raises(UserError, match="delta"):
        HuberNormLoss(0.0)
