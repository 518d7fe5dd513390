"""Preset ``v2`` against fairchem's built-in EScAIP: same weights, same numbers."""

from __future__ import annotations

import pytest
import torch
from ase.build import fcc111, molecule

from builtin import (
    batch_of,
    builtin_config,
    model_pair,
    molecular_structures,
    outputs,
    periodic_structures,
)
from escaip_fairchem.checkpoint import convert_state_dict

KINDS = {
    "direct": {"direct": True},
    "conservative": {"direct": False, "stress": True},
}


def largest_error(ours: torch.Tensor, theirs: torch.Tensor, scale: torch.Tensor) -> float:
    """Largest difference relative to `scale`."""
    return float((ours - theirs).detach().abs().max() / scale.detach().abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_same_energy_and_forces_on_periodic_structures(kind, test_data):
    batches = periodic_structures(test_data)
    assert len(batches) >= 30
    check_outputs(model_pair(builtin_config(**KINDS[kind])), batches)


def test_same_energy_and_forces_on_molecules(test_data):
    for direct in (True, False):
        config = builtin_config(direct=direct, use_pbc=False)
        check_outputs(model_pair(config), molecular_structures(test_data))


def check_outputs(pair, batches):
    """Every output of every batch within 1e-5 of the largest, in float32.

    Random weights and symmetry cancel the energy or forces of some structures down to
    rounding, so a batch with small values is held to the median over batches instead.
    """
    reference, own = pair
    results = {}
    for name, structures in batches.items():
        batch = batch_of(structures)
        theirs, ours = outputs(reference, batch), outputs(own, batch)
        results[name] = {key: (theirs[key].detach(), ours[key].detach()) for key in theirs}
        assert theirs.keys() == ours.keys()
    for key in ("energy", "forces", "stress"):
        pairs = {name: result[key] for name, result in results.items() if key in result}
        if not pairs:
            continue
        median = torch.stack([theirs.abs().max() for theirs, _ in pairs.values()]).median()
        for name, (theirs, ours) in pairs.items():
            scale = torch.maximum(theirs.abs().max(), median)
            error = largest_error(ours, theirs, scale)
            assert error < 1e-5, (name, key, error)


@pytest.mark.parametrize("kind", KINDS)
def test_same_gradient_of_every_weight(kind, test_data):
    reference, own = model_pair(builtin_config(**KINDS[kind]))
    batches = periodic_structures(test_data)
    for name in ("mixed", "fcc111_37", "oc20_0", "mptrj_1"):
        batch = batch_of(batches[name])
        gradients = []
        for model in (reference.train(), own.train()):
            model.zero_grad()
            loss = 0.0
            for value in outputs(model, batch).values():
                torch.manual_seed(1)
                loss = loss + (value * torch.randn_like(value)).sum()
            loss.backward()
            gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
        theirs = convert_state_dict(gradients[0], conservative=kind == "conservative")
        ours = gradients[1]
        assert ours.keys() == dict(own.named_parameters()).keys()
        assert theirs.keys() == ours.keys()
        for key in theirs:
            mine, gradient = ours[key], theirs[key]
            if key.endswith("qkv.bias"):
                # a key bias shifts all logits of a query alike: its gradient is rounding
                mine, gradient = (torch.cat([g[:128], g[256:]]) for g in (mine, gradient))
            error = largest_error(mine, gradient, gradient)
            assert error < 1e-4, (name, key, error)


def test_builtin_ignores_pbc():
    """A thin slab sees its images along z upstream, whatever its `pbc`; ours does not."""
    reference, own = model_pair(builtin_config(direct=True))
    slab = fcc111("Cu", (2, 2, 2), vacuum=1.5, periodic=True)
    energies = {}
    for pbc in ((True, True, True), (True, True, False)):
        slab.pbc = pbc
        batch = batch_of([slab])
        energies[pbc] = [float(outputs(m, batch)["energy"].detach()) for m in (reference, own)]
    (ref_bulk, own_bulk), (ref_slab, own_slab) = energies.values()
    assert ref_bulk == pytest.approx(own_bulk, rel=1e-5)
    assert ref_slab == pytest.approx(ref_bulk, rel=1e-5)
    assert abs(own_slab - own_bulk) > 1e-2 * abs(own_bulk)


def test_builtin_padding_crashes_when_graphs_fill_the_batch():
    """Two graphs with max_batch_size 2 index out of bounds upstream; here nothing is padded."""
    config = builtin_config(direct=True, use_padding=True, max_atoms=20, max_batch_size=2)
    reference, own = model_pair(config)
    structures = [molecule("H2O"), molecule("NH3")]
    for atoms in structures:
        atoms.center(vacuum=9)
        atoms.pbc = True
    batch = batch_of(structures)
    with pytest.raises(RuntimeError, match="out of bounds"):
        outputs(reference, batch)
    assert outputs(own, batch)["energy"].shape == (2,)


def test_builtin_padding_guesses_shapes():
    """max_atoms == max_batch_size gives one energy per atom upstream."""
    config = builtin_config(direct=True, use_padding=True, max_atoms=16, max_batch_size=16)
    reference, own = model_pair(config)
    atoms = molecule("H2O")
    atoms.center(vacuum=9)
    atoms.pbc = True
    batch = batch_of([atoms])
    assert outputs(reference, batch)["energy"].shape == (3,)
    assert outputs(own, batch)["energy"].shape == (1,)


def test_builtin_has_no_float64():
    """float64 inference is impossible upstream; ours agrees with its float32 answer."""
    reference, own = model_pair(builtin_config(direct=True))
    batch = batch_of([fcc111("Cu", (2, 2, 3), vacuum=8, periodic=True)])
    single = outputs(own, batch)["energy"]
    for key in ("pos", "cell", "cell_offsets"):
        batch[key] = batch[key].double()
    with pytest.raises(RuntimeError, match="dtype"):
        outputs(reference.double(), batch)
    double = outputs(own.double(), batch)["energy"]
    assert double.dtype == torch.float64
    assert float((double - single).detach().abs()) < 1e-4 * float(double.detach().abs())
