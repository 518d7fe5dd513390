"""Relaxations of data sets side by side, with models made up for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from fairchem.core.datasets.atomic_data import AtomicData

from escaip_fairchem.errors import UserError
from escaip_fairchem.predict.relax import relax
from matbench_files import materials


def as_data(atoms: Atoms) -> AtomicData:
    """As the model takes it."""
    data = AtomicData.from_ase(atoms, r_data_keys=["charge", "spin"])
    data.dataset = "mptrj"
    return data


@pytest.mark.parametrize("max_atoms", [1, 4, 5, 100])
def test_next_one_takes_the_place_of_each_that_arrives(max_atoms: int) -> None:
    """Pairs of atoms pulled to the origin from further and further away; each as if alone."""
    far = [0.1, 2.0, 0.3, 1.0, 0.2, 0.6]
    start = [as_data(Atoms("Cu2", [[x, 0, 0], [0, x, 0]])) for x in far]
    together: list[int] = []

    def predict(data: AtomicData) -> dict[str, torch.Tensor]:
        together.append(len(data.natoms))
        return {"energy": (data.pos**2).sum(1).reshape(-1, 2).sum(1) / 2, "forces": -data.pos}

    options = {"optimizer": "FIRE", "fmax": 0.01, "steps": 200, "maxstep": None}
    found = relax(predict, iter(start), max_atoms=max_atoms, **options)
    # as many as there is room for; fewer only when none is waiting, and then never more again
    assert together[0] == min(len(far), max(1, max_atoms // 2))
    assert together == sorted(together, reverse=True)
    assert sum(together) == sum(found["steps"] + 1)
    for number, x in enumerate(far):
        alone = relax(
            predict, [as_data(Atoms("Cu2", [[x, 0, 0], [0, x, 0]]))], max_atoms=2, **options
        )
        assert alone["steps"][0] == found["steps"][number] < 200
        pair = slice(2 * number, 2 * number + 2)
        np.testing.assert_allclose(found["positions"][pair], alone["positions"], atol=1e-6)
        assert found["energy"][number] == pytest.approx(alone["energy"][0], abs=1e-6)
    assert found["converged"].all()


def test_one_that_fails_stops_no_other() -> None:
    """It stays where it could last be evaluated, or has no energy at all."""
    initial = list(materials().values())[:3]
    cuts = np.cumsum([len(atoms) for atoms in initial])[:-1]

    def predict(data: AtomicData) -> dict[str, torch.Tensor]:
        many = data.batch_to_atomicdata_list()
        for one in many:
            which = next(
                i for i, a in enumerate(initial) if (a.numbers[0] == one.atomic_numbers[0])
            )
            if which == 1 or (which == 2 and one.pos.sub(start[2].pos).abs().max() > 0):
                raise UserError("too many neighbours")
        natoms = int(data.natoms.sum())
        return {
            "energy": torch.arange(1.0, 1 + len(many)),
            "forces": torch.linspace(-1, 1, natoms)[:, None].expand(natoms, 3),
            "stress": torch.zeros(len(many), 9),
        }

    start = [as_data(atoms) for atoms in initial]
    options = {"optimizer": "FIRE", "fmax": 1e-3, "steps": 3, "maxstep": None, "cell": True}
    found = relax(predict, [one.clone() for one in start], max_atoms=1000, **options)
    assert found["steps"].tolist() == [3, 0, 1]
    for name in ("energy", "forces", "stress"):
        bad = np.isnan(found[name].reshape(len(found[name]), -1)).any(1)
        of_each = bad if len(bad) == 3 else [part.any() for part in np.split(bad, cuts)]
        assert list(of_each) == [False, True, False], name
    assert not found["converged"].any()
    ends = np.split(found["positions"], cuts)
    np.testing.assert_allclose(ends[2], start[2].pos.numpy(), atol=1e-6)
    assert np.abs(ends[0] - start[0].pos.numpy()).max() > 1e-3


def test_cells_that_leave_all_bounds_are_not_evaluated() -> None:
    """Pulled together, blown up or sheared without end: they end at the last cell that is one."""
    pull = np.array([np.eye(3), -np.eye(3), np.zeros((3, 3)), np.eye(3)[[1, 0, 2]] - np.eye(3)])
    start = []
    for number in range(len(pull)):
        atoms = bulk("Cu", cubic=True)
        atoms.numbers[0] = 30 + number
        start.append(as_data(atoms))
    seen: list[list[np.ndarray]] = [[] for _ in start]

    def predict(data: AtomicData) -> dict[str, torch.Tensor]:
        which = [int(one.atomic_numbers[0]) - 30 for one in data.batch_to_atomicdata_list()]
        for number, cell in zip(which, data.cell.numpy(), strict=True):
            seen[number].append(cell)
        forces = torch.zeros(int(data.natoms.sum()), 3)
        forces[::4, 0], forces[1::4, 0] = 0.1, -0.1  # none has arrived
        stress = torch.tensor(0.3 * pull[which].reshape(-1, 9), dtype=torch.float32)
        return {"energy": torch.zeros(len(which)), "forces": forces, "stress": stress}

    options = {"optimizer": "FIRE", "fmax": 1e-3, "steps": 60, "maxstep": 20.0, "cell": True}
    path = relax(predict, start, max_atoms=1000, **options)
    assert path["steps"][2] == 60
    assert (np.delete(path["steps"], 2) < 60).all()
    assert not path["converged"].any()
    for cells, end in zip(seen, path["cell"], strict=True):
        volumes = np.abs(np.linalg.det(np.array(cells, float))) / 4
        assert volumes.min() > 0.99  # a hydrogen atom takes more
        assert volumes.max() < 1.01e6
        np.testing.assert_allclose(end, cells[-1], rtol=1e-5, atol=1e-5)
    assert np.linalg.det(path["cell"][0]) < 47 < 48 < np.linalg.det(path["cell"][1])
