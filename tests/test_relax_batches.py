"""Relaxations of data sets side by side, with models made up for it."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.constraints import FixAtoms
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch

from escaip_fairchem.errors import UserError
from escaip_fairchem.predict.relax import RelaxRunner, relax
from matbench_files import materials

if TYPE_CHECKING:
    from collections.abc import Iterator

LBFGS = {"optimizer": "LBFGS", "fmax": 0.01, "steps": 200, "maxstep": 0.04}


def as_data(atoms: Atoms) -> AtomicData:
    """As the model takes it."""
    data = AtomicData.from_ase(atoms, r_data_keys=["charge", "spin"])
    data.dataset = "mptrj"
    return data


def line_of(x: float, atoms: int = 2) -> Atoms:
    """Atoms at (x, 0, 0), (0, x, 0) and so on; further away they take more steps."""
    return Atoms(f"Cu{atoms}", x * np.eye(3)[np.arange(atoms) % 3])


def to_the_origin(data: AtomicData) -> dict[str, torch.Tensor]:
    """A spring from each atom to the origin."""
    energy = torch.zeros(len(data.natoms)).index_add(0, data.batch, (data.pos**2).sum(1) / 2)
    return {"energy": energy, "forces": -data.pos}


@pytest.mark.parametrize("max_atoms", [1, 4, 5, 100])
def test_next_one_takes_the_place_of_each_that_arrives(max_atoms: int) -> None:
    """Pairs of atoms pulled to the origin from further and further away; each as if alone."""
    far = [0.1, 2.0, 0.3, 1.0, 0.2, 0.6]
    start = [as_data(line_of(x)) for x in far]
    together: list[int] = []

    def predict(data: AtomicData) -> dict[str, torch.Tensor]:
        together.append(len(data.natoms))
        return to_the_origin(data)

    options = {"optimizer": "FIRE", "fmax": 0.01, "steps": 200, "maxstep": None}
    found = relax(predict, iter(start), max_atoms=max_atoms, **options)
    # as many as there is room for; fewer only when none is waiting, and then never more again
    assert together[0] == min(len(far), max(1, max_atoms // 2))
    assert together == sorted(together, reverse=True)
    assert sum(together) == sum(found["steps"] + 1)
    for number, x in enumerate(far):
        alone = relax(predict, [as_data(line_of(x))], max_atoms=2, **options)
        assert alone["steps"][0] == found["steps"][number] < 200
        pair = slice(2 * number, 2 * number + 2)
        np.testing.assert_allclose(found["positions"][pair], alone["positions"], atol=1e-6)
        assert found["energy"][number] == pytest.approx(alone["energy"][0], abs=1e-6)
    assert found["converged"].all()


def test_large_one_is_alone_and_one_without_free_atoms_stays() -> None:
    """Sizes differ, and the order is that of the structures."""
    natoms = [2, 7, 3, 1, 5, 2]
    initial = [line_of(0.3 + 0.1 * number, n) for number, n in enumerate(natoms)]
    initial[2].set_constraint(FixAtoms([0, 1, 2]))
    together: list[list[int]] = []

    def predict(data: AtomicData) -> dict[str, torch.Tensor]:
        together.append(data.natoms.tolist())
        return to_the_origin(data)

    found = relax(predict, [as_data(atoms) for atoms in initial], max_atoms=5, **LBFGS)
    assert all(sum(batch) <= 5 or batch == [7] for batch in together)
    assert [7] in together
    assert found["steps"][2] == 0 < np.delete(found["steps"], 2).min()
    assert found["converged"].all()
    ends = np.split(found["positions"], np.cumsum(natoms)[:-1])
    np.testing.assert_allclose(ends[2], initial[2].positions, rtol=1e-6)
    assert all(np.abs(end).max() < 0.01 for number, end in enumerate(ends) if number != 2)
    for end, forces in zip(ends, np.split(found["forces"], np.cumsum(natoms)[:-1]), strict=True):
        np.testing.assert_allclose(forces, -end, atol=1e-6)


def test_what_has_ended_is_let_go() -> None:
    """Optimizers remember their steps: those of a whole part need not fit into memory."""
    alive = None

    def structures() -> Iterator[AtomicData]:
        nonlocal alive
        begun = []
        for x in np.linspace(0.1, 0.2, 12):
            data = as_data(line_of(x))
            begun.append(weakref.ref(data))
            yield data
        gc.collect()
        alive = sum(each() is not None for each in begun)

    assert relax(to_the_origin, structures(), max_atoms=2, **LBFGS)["converged"].all()
    # the last one, and the one that has just ended
    assert alive <= 2


def test_batches_of_the_loader_are_let_go() -> None:
    """In each, one takes many steps; with loading processes a batch is files that stay open."""
    alive = None

    def batches() -> Iterator[tuple[AtomicData, dict[str, np.ndarray]]]:
        nonlocal alive
        loaded = []
        for number in range(6):
            data = atomicdata_list_to_batch([as_data(line_of(x)) for x in (0.02, 0.4)])
            tags = np.zeros(4, int)
            data.tags = torch.from_numpy(tags)
            loaded.append(weakref.ref(tags))
            yield data, {"row": np.array([2 * number, 2 * number + 1])}
            del tags
        gc.collect()
        alive = sum(each() is not None for each in loaded)

    runner = RelaxRunner(None, {}, max_atoms=12, **LBFGS)
    [(_, arrays)] = runner.outcomes(to_the_origin, batches())
    assert arrays["row"].tolist() == list(range(12))
    assert np.diff(arrays["steps"])[::2].min() > 0
    assert alive == 1  # the last


@pytest.mark.parametrize("error", [UserError, torch.OutOfMemoryError])
def test_one_that_fails_is_found_by_halves(error: type[Exception]) -> None:
    """Once, and without evaluating all others one by one."""
    batches: list[int] = []

    def predict(data: AtomicData) -> dict[str, torch.Tensor]:
        batches.append(len(data.natoms))
        if (data.pos > 0.9).any():
            raise error("it does not fit")
        return to_the_origin(data)

    start = [as_data(line_of(1.0 if number == 5 else 0.3)) for number in range(16)]
    found = relax(predict, start, max_atoms=100, **LBFGS)
    assert np.flatnonzero(np.isnan(found["energy"])).tolist() == [5]
    assert np.flatnonzero(~found["converged"]).tolist() == [5]
    assert batches[:9] == [16, 8, 4, 4, 2, 1, 1, 2, 8]
    assert set(batches[9:]) == {15}


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
