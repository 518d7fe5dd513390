"""``escaip bench tradeoff`` and ``domains``: errors against plain NumPy, shifts that are known."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from data_helpers import labelled_atoms
from escaip_fairchem import calculator
from escaip_fairchem.cli import main
from escaip_fairchem.data.convert import convert
from escaip_fairchem.errors import UserError
from escaip_fairchem.predict.runner import PredictRunner
from escaip_fairchem.tables import domains
from escaip_fairchem.tables.domains import DomainsReducer, energies_of, held_out_error
from helpers import slab
from predict_jobs import job
from run_helpers import compose_quickly, save_checkpoint

RECIPE = Path(__file__).parents[1] / "configs/oc20/evaluate_domains.yml"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two data sets, and two checkpoints in folders like those of runs."""
    folder = tmp_path_factory.mktemp("tables")
    write(folder / "copper.extxyz", labelled_atoms(12))
    others = [slab() for _ in range(6)]
    for index, atoms in enumerate(others):
        atoms.rattle(0.1, seed=index)
        random = np.random.default_rng(index)
        forces = random.standard_normal((len(atoms), 3))
        atoms.calc = SinglePointCalculator(atoms, energy=float(index), forces=forces)
    write(folder / "slabs.extxyz", others)
    for kind, layers in (("one", 1), ("two", 2)):
        path = folder / kind / "checkpoints" / "final" / "inference_ckpt.pt"
        save_checkpoint(path, conservative=False, stress=False, dataset="oc20", num_layers=layers)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("ESCAIP_DATA", str(folder))
        for name in ("copper", "slabs"):
            source = str(folder / f"{name}.extxyz")
            convert([source], folder / name, unlabelled=True, check_units=False)
        monkeypatch.chdir(folder)
        yield folder


def by_calculator(folder: Path, model: str, name: str):
    """Errors of forces of free atoms and of energies, one structure at a time through ASE."""
    ase = calculator(folder / model / "checkpoints/final/inference_ckpt.pt", device="cpu")
    force, zero, energy, cosine = [], [], [], []
    for atoms in read(folder / f"{name}.extxyz", ":"):
        free = np.ones(len(atoms), bool)
        for constraint in atoms.constraints:
            free[constraint.index] = False
        label = atoms.get_forces(apply_constraint=False)[free]
        copy = atoms.copy()
        copy.set_constraint()
        copy.calc = ase
        found = copy.get_forces()[free]
        force += [np.abs(found - label)]
        zero += [np.abs(label)]
        lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(label, axis=1)
        cosine += [(found * label).sum(1) / lengths]
        energy.append((copy.get_potential_energy() - atoms.get_potential_energy()) / len(atoms))
    parts = (np.concatenate(part) for part in (force, zero, cosine))
    return *(float(part.mean()) for part in parts), float(np.abs(energy).mean())


def rows_of(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_tradeoff(work: Path, capsys):
    command = ["bench", "tradeoff", "one", "two", "--data", "copper/test", "--batch-size", "2"]
    assert main([*command, "--repeats", "1", "--device", "cpu", "--published"]) == 0
    assert "10 times faster inference" in capsys.readouterr().out
    one, two, *published = rows_of("tradeoff.csv")
    for row, name in ((one, "one"), (two, "two")):
        assert row["model"] == name
        force, zero, cosine, energy = by_calculator(work, name, "copper")
        assert float(row["force_mae"]) == pytest.approx(force, rel=1e-4)
        assert float(row["force_mae_of_zero"]) == pytest.approx(zero, rel=1e-4)
        assert float(row["force_cosine"]) == pytest.approx(cosine, abs=1e-4)
        assert float(row["energy_per_atom_mae"]) == pytest.approx(energy, rel=1e-4)
        taken = float(row["seconds_min"])
        assert float(row["structures_per_s"]) == pytest.approx(2 / taken, rel=1e-4)
        assert float(row["peak_MiB"]) > 0
    assert int(two["parameters"]) > int(one["parameters"])
    assert {row["structures_per_s"] for row in published} == {""}  # none is published
    assert Path("tradeoff.png").read_bytes().startswith(b"\x89PNG")
    bare = labelled_atoms(1)
    bare[0].calc = None
    write("bare.extxyz", bare)
    assert main(["bench", "tradeoff", "one", "--data", "bare.extxyz"]) == 2
    assert "no energy and forces to compare with" in capsys.readouterr().err


def test_domains(work: Path, capsys):
    """Predicted as the recipe does; the table from the reducer, and again by the command."""
    config = compose_quickly(
        str(RECIPE),
        ["cluster=cpu", "checkpoint=one", "splits.oc20=copper/test", "splits.mad=slabs/test"],
    )
    assert config.reducer._target_.endswith("DomainsReducer")
    runner = PredictRunner(**{k: v for k, v in config.runner.items() if k != "_target_"})
    reducer = DomainsReducer(free_atoms_only=config.reducer.free_atoms_only)
    runner.job_config = reducer.job_config = job(work / "evaluation")
    runner.run()
    reducer.reduce()
    assert "zeros of DFT settings differ" in capsys.readouterr().out
    table = rows_of("evaluation/domains.csv")
    assert [row["data"] for row in table] == ["oc20", "mad"]
    for row, name in zip(table, ("copper", "slabs"), strict=True):
        force, zero, cosine, _ = by_calculator(work, "one", name)
        assert float(row["force_mae"]) == pytest.approx(force, rel=1e-4)
        assert float(row["force_mae_of_zero"]) == pytest.approx(zero, rel=1e-4)
        assert float(row["force_mae_relative"]) == pytest.approx(force / zero, rel=1e-4)
        assert float(row["force_cosine"]) == pytest.approx(cosine, abs=1e-4)
    assert [row["elements"] for row in table] == ["1", "3"]
    assert main(["bench", "domains", "evaluation", "--all-atoms"]) == 0
    every = rows_of("domains.csv")
    assert every[0]["force_mae"] != table[0]["force_mae"]  # copper has a fixed atom
    assert every[1]["force_mae"] == table[1]["force_mae"]
    assert Path("domains.png").read_bytes().startswith(b"\x89PNG")
    assert domains.WHAT in capsys.readouterr().out
    nothing = PredictRunner("one", {"oc20": None, "mad": None})
    with pytest.raises(UserError, match="no data"):
        nothing.run()


def compositions(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 9, (n, 4)).astype(float)


def test_shifts_take_away_what_composition_tells():
    """A model whose zeros are wrong by element is exact after shifts; noise stays noise."""
    counts = compositions(4000)
    natoms = counts.sum(1)
    shift = counts @ [3.0, -70.0, 1.5, 12.0]
    noise = natoms * np.random.default_rng(1).standard_normal(4000)
    assert held_out_error(counts, shift, natoms) < 1e-9
    # the fit of 4 numbers to 3200 takes little away from noise, whose mean size is sqrt(2 / pi)
    assert held_out_error(counts, shift + noise, natoms) == pytest.approx((2 / np.pi) ** 0.5, 0.05)
    numbers = np.concatenate([np.repeat([1, 6, 8, 29], row.astype(int)) for row in counts])
    part = {"natoms": natoms.astype(int), "numbers": numbers, "energy": noise,
            "energy_label": shift + noise}  # fmt: skip
    found = energies_of(part)
    assert found["energy_per_atom_mae_shifted"] < 1e-9
    assert found["energy_per_atom_mae_of_shifts_alone"] > 0.7


def test_shifts_need_more_structures_than_elements():
    counts = compositions(5)
    assert held_out_error(counts, counts[:, 0], counts.sum(1)) is None
    assert held_out_error(counts[:0], counts[:0, 0], counts[:0].sum(1)) is None
    # an element that only one structure has cannot be tested
    counts = np.column_stack([compositions(40), np.eye(40)[0]])
    energy = 5.0 * counts[:, 1] + 1000 * counts[:, 4]
    assert held_out_error(counts, energy, counts.sum(1)) < 1e-6
