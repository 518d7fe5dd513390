"""The leaderboard recipes, by the `fairchem` command: files read as published, kills, IS2RE."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import ase.optimize
import numpy as np
import pytest
from ase.geometry import find_mic
from omegaconf import OmegaConf

from data_helpers import stored
from escaip_fairchem import calculator
from escaip_fairchem.predict.parts import complete, read_split
from escaip_fairchem.predict.relax import RelaxRunner
from escaip_fairchem.submission.boards import BOARDS
from escaip_fairchem.submission.check import Expectations, check
from fork_runs import Run, killed_at_random, launch
from predict_jobs import job
from run_helpers import compose_quickly, save_checkpoint
from submission_helpers import OC20_SPLITS, make_test_set, slabs

if TYPE_CHECKING:
    from ase import Atoms

RECIPES = Path(__file__).parents[1] / "configs"
KILLS = int(os.environ.get("ESCAIP_KILLS", "2"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Test sets in the published layout, with three frames of each system, and a random model."""
    folder = tmp_path_factory.mktemp("leaderboard")
    data = folder / "data"
    make_test_set(data / "oc20_s2ef_test", {s: slabs(n, 2) for n, s in enumerate(OC20_SPLITS)})
    checkpoint = folder / "model" / "inference_ckpt.pt"
    save_checkpoint(checkpoint, conservative=False, stress=False, dataset="oc20")
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[bytes, float]:
    """The file as the command writes it undisturbed, and how long that takes."""
    start = time.monotonic()
    settings = ["cluster=cpu", "checkpoint=model", "part_rows=2", "max_atoms=30"]
    run = Run(folder, str(RECIPES / "oc20" / "leaderboard_s2ef.yml"), *settings)
    assert run.wait() == 0, run.output()[-3000:]
    took = time.monotonic() - start
    results = of(folder)
    # to be composed once only
    shutil.copy(results / "canonical_config.yaml", folder / "config.yaml")
    content = (results / "oc20_s2ef.npz").read_bytes()
    shutil.move(results / "oc20_s2ef.npz", folder / "whole.npz")
    shutil.rmtree(results)
    return content, took


def of(folder: Path) -> Path:
    return folder / "submissions" / "oc20_leaderboard_s2ef"


def read_as_published(path: Path) -> dict[str, dict[str, tuple[float, np.ndarray]]]:
    """Energy and forces by id, from the description of the format alone."""
    with np.load(path) as file:
        assert len(file) == 16
        found = {}
        for split in ("id", "ood_ads", "ood_cat", "ood_both"):
            ids, energy = file[f"{split}_ids"], file[f"{split}_energy"]
            forces = np.split(file[f"{split}_forces"], file[f"{split}_chunk_idx"])
            assert len(ids) == len(energy) == len(forces) == len(set(ids))
            found[split] = dict(zip(ids, zip(energy, forces, strict=True), strict=True))
    return found


def test_file(folder: Path, whole: tuple[bytes, float]) -> None:
    """Each structure has what the ASE calculator says of it; the checker agrees."""
    found = read_as_published(folder / "whole.npz")
    calculated = calculator(folder / "model" / "inference_ckpt.pt", device="cpu")
    for split in OC20_SPLITS:
        structures = stored(folder / "data" / "oc20_s2ef_test" / f"test_{split}")
        names = [f"{atoms.info['sid']}_{atoms.info['fid']}" for atoms in structures]
        assert list(found[split]) == names
        for name, atoms in zip(names, structures, strict=True):
            energy, forces = found[split][name]
            atoms.calc = calculated
            assert energy == pytest.approx(atoms.get_potential_energy(), rel=1e-5)
            # ASE gives atoms held in place no forces
            np.testing.assert_allclose(forces, atoms.get_forces(), atol=2e-5)
    data = [str(folder / "data" / "oc20_s2ef_test")]
    assert not check(folder / "whole.npz", Expectations(dataset=data)).problems


@pytest.mark.full  # parts are kept as in test_predict
def test_killed_at_any_moment(folder: Path, whole: tuple[bytes, float]) -> None:
    """The same command goes on, to the same bytes."""
    content, took = whole
    file = of(folder) / "oc20_s2ef.npz"
    for code in killed_at_random(folder, "config.yaml", took, KILLS):
        assert file.read_bytes() == content if file.exists() else code != 0
    assert not list(of(folder).glob("**/.*partial*"))


@pytest.mark.parametrize("optimizer", ["LBFGS", "FIRE"])
def test_relaxations(folder: Path, optimizer: str, tmp_path: Path, monkeypatch) -> None:
    """Batches of relaxations end where ASE's do one by one; atoms held in place stay there."""
    monkeypatch.setenv("ESCAIP_DATA", str(folder / "data"))
    data = folder / "data" / "oc20_s2ef_test"
    options = {"optimizer": optimizer, "fmax": 0.5, "steps": 8, "maxstep": 0.05}
    runner = RelaxRunner(
        str(folder / "model"), {"id": str(data / "test_id")}, part_rows=4, max_atoms=50, **options,
    )  # fmt: skip
    runner.job_config = job(tmp_path)
    runner.run()
    assert complete(tmp_path / "results")
    calculated = calculator(folder / "model" / "inference_ckpt.pt", device="cpu")
    parts = list(read_split(tmp_path / "results", "id"))
    positions = np.concatenate([part["positions"] for part in parts])
    energy, steps, converged = (
        np.concatenate([part[name] for part in parts]) for name in ("energy", "steps", "converged")
    )
    start = 0
    for row, atoms in enumerate(stored(data / "test_id")):
        before = atoms.positions.copy()
        atoms.calc = calculated
        alone = getattr(ase.optimize, optimizer)(atoms, logfile=None, maxstep=0.05)
        assert alone.run(fmax=0.5, steps=8) == converged[row]
        assert alone.nsteps == steps[row]
        there = positions[start : start + len(atoms)]
        assert np.abs(nearest(atoms, there - atoms.positions)).max() < 2e-3
        assert energy[row] == pytest.approx(atoms.get_potential_energy(), abs=2e-3)
        shift = nearest(atoms, there - before)
        assert np.abs(shift[atoms.constraints[0].index]).max() < 1e-5
        assert np.abs(shift).max() > 0.01
        start += len(atoms)


def nearest(atoms: Atoms, shift: np.ndarray) -> np.ndarray:
    """Shifts to the nearest images."""
    return find_mic(shift, atoms.cell, atoms.pbc)[0]


def test_is2re(folder: Path) -> None:
    """The recipe relaxes; its file has the energies where that ended, in the published form."""
    structures = {s: f"oc20_s2ef_test/test_{s}" for s in OC20_SPLITS}
    settings = [
        *("cluster=cpu", "checkpoint=model", "part_rows=4", "max_atoms=50", "relax_steps=2"),
        *(f"splits.{split}={path}" for split, path in structures.items()),
    ]
    done = launch(folder, RECIPES / "oc20" / "leaderboard_is2re.yml", *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    results = folder / "submissions" / "oc20_leaderboard_is2re"
    data = [str(folder / "data" / "oc20_s2ef_test")]
    assert not check(results / "oc20_is2re.npz", Expectations(dataset=data)).problems
    calculated = calculator(folder / "model" / "inference_ckpt.pt", device="cpu")
    with np.load(results / "oc20_is2re.npz") as file:
        assert sorted(file) == sorted(
            f"{s}_{key}" for s in OC20_SPLITS for key in ("ids", "energy")
        )
        for split, path in structures.items():
            for atoms, energy in zip(
                stored(folder / "data" / path), file[f"{split}_energy"], strict=True
            ):
                atoms.calc = calculated
                ase.optimize.LBFGS(atoms, logfile=None, maxstep=0.04).run(fmax=0.02, steps=2)
                assert energy == pytest.approx(atoms.get_potential_energy(), abs=2e-3)


@pytest.mark.parametrize(
    "recipe", ["oc20/leaderboard_s2ef", "oc20/leaderboard_is2re", "oc22/leaderboard_s2ef_total"]
)
def test_recipes(recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All splits of the board, and each key reaches the runner or the reducer."""
    monkeypatch.setenv("ESCAIP_DATA", str(tmp_path))
    config = compose_quickly(
        str(RECIPES / f"{recipe}.yml"),
        ["cluster=cpu", "ids=sid", "atoms=free", "fixed_forces=predicted", "max_atoms=7"],
    )
    reducer = OmegaConf.to_container(config.reducer)
    board = BOARDS[reducer["board"]]
    assert recipe.startswith(board.name[:4])
    assert ("is2re" in recipe) == (not board.forces)
    assert tuple(config.runner.splits) == board.splits
    assert (reducer["ids"], reducer["atoms"], reducer["fixed_forces"]) == (
        "sid", "free", "predicted",
    )  # fmt: skip
    assert config.runner.max_atoms == 7
