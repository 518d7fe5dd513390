"""Predictions of whole data sets, and their metrics, against the ASE calculator and plain NumPy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from ase import Atoms
from ase.io import write
from fairchem.core._cli import get_hydra_config_from_yaml

from data_helpers import read_sample, stored
from escaip_fairchem import calculator
from escaip_fairchem.data.convert import convert
from escaip_fairchem.errors import UserError
from escaip_fairchem.predict.evaluate import EvaluateReducer, evaluate
from escaip_fairchem.predict.parts import Plan, missing, part_path, read_split, select, write_part
from escaip_fairchem.predict.runner import PredictRunner
from predict_jobs import job
from run_helpers import MEAN, REFERENCES, fairchem, save_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

RECIPES = Path(__file__).parents[1] / "configs"
#: Frames of the real samples; with stress, and with forces counted on free atoms only, or not.
DOMAINS = {
    "oc20": ("0:1300:220", False, True),
    "oc22": ("0:4", False, True),
    "mptrj": ("0:600:40", True, False),
    "spice": ("0:500:21", False, False),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, test_data: Path) -> Iterator[Path]:
    """A data root with real frames of each domain and a random model for each."""
    folder = tmp_path_factory.mktemp("predict")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("ESCAIP_DATA", str(folder))
        for domain, (frames, stress, _) in DOMAINS.items():
            source = folder / f"{domain}.extxyz"
            write(source, read_sample(test_data / f"{domain}_sample.extxyz.gz", frames))
            convert([str(source)], folder / domain, unlabelled=True, check_units=False)
            path = folder / f"model_{domain}" / "inference_ckpt.pt"
            save_checkpoint(path, conservative=False, stress=stress, dataset=domain)
        yield folder


def settings(work: Path, domain: str, **changes: Any) -> dict[str, Any]:
    return {
        "checkpoint": str(work / f"model_{domain}"),
        "splits": {"id": f"{domain}/test"},
        "part_rows": 4,
        "max_atoms": 150,
        **changes,
    }


def predict(folder: Path, array_job: int = 0, n_array_jobs: int = 1, **arguments: Any) -> Path:
    """Predict in this process; returns the folder of the parts."""
    runner = PredictRunner(**arguments)
    runner.job_config = job(folder, array_job, n_array_jobs)
    runner.run()
    return runner.folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a prediction."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def by_calculator(work: Path, domain: str, *, free_only: bool) -> dict[str, Any]:
    """Errors of every structure, by ASE and plain NumPy."""
    ase_calculator = calculator(work / f"model_{domain}" / "inference_ckpt.pt", device="cpu")
    rows: dict[str, list] = {}
    for labelled in stored(work / domain / "test"):
        results, atoms = labelled.calc.results, labelled.copy()
        atoms.calc = ase_calculator
        free = np.ones(len(atoms), bool)
        if free_only and atoms.constraints:
            free[atoms.constraints[0].index] = False
        force = atoms.get_forces(apply_constraint=False).astype(float)[free]
        label = results["forces"][free]
        energy_error = abs(atoms.get_potential_energy() - results["energy"])
        norms = np.linalg.norm(force, axis=1), np.linalg.norm(label, axis=1)
        row = {
            "subset": atoms.info.get("subset"),
            "energy_mae": energy_error,
            "energy_per_atom_mae": energy_error / len(atoms),
            "energy_base": abs(
                sum(REFERENCES[z] for z in atoms.numbers) + MEAN - results["energy"]
            ),
            "forces_mae": np.abs(force - label).ravel(),
            "forces_base": np.abs(label).ravel(),
            "forces_cosine_similarity": (force * label).sum(1) / (norms[0] * norms[1] + 1e-30),
            "forces_magnitude_error": np.abs(norms[0] - norms[1]),
            "efwt": float(energy_error < 0.02 and (np.abs(force - label) < 0.03).all()),
            "numbers": np.repeat(atoms.numbers[free], 3),
        }
        if "stress" in results:
            voigt = np.abs(atoms.get_stress() - results["stress"])
            row["stress_mae"] = voigt[[0, 5, 4, 5, 1, 3, 4, 3, 2]]
        for name, value in row.items():
            rows.setdefault(name, []).append(value)
    return rows


@pytest.mark.parametrize("domain", DOMAINS)
def test_metrics_equal_plain_numpy(work: Path, tmp_path: Path, domain: str) -> None:
    _, _, free_only = DOMAINS[domain]
    parts = predict(tmp_path, **settings(work, domain))
    result = evaluate(parts, free_atoms_only=free_only)
    (split,) = result["splits"].values()
    rows = by_calculator(work, domain, free_only=free_only)
    for name, metric in split["metrics"].items():
        expected = np.mean(np.hstack(rows[name]))
        # relative, because energies of hundreds of eV are float32 in the model
        assert metric["value"] == pytest.approx(expected, abs=1e-6, rel=1e-7), name
    assert ("stress_mae" in split["metrics"]) == ("stress_mae" in rows)
    baselines = {"energy_mae": "energy_base", "forces_mae": "forces_base"}
    for name, base in baselines.items():
        expected = np.mean(np.hstack(rows[base]))
        assert split["metrics"][name]["baseline"] == pytest.approx(expected, abs=1e-6)
    numbers, errors = np.hstack(rows["numbers"]), np.hstack(rows["forces_mae"])
    assert split["metrics"]["forces_mae"]["count"] == len(errors)
    for row, number in zip(split["by_element"], np.unique(numbers), strict=False):
        if free_only and row["force_mae_eV_per_A"] is None:
            return  # an element with fixed atoms only, from where on the two lists differ
        expected = errors[numbers == number].mean()
        assert row["force_mae_eV_per_A"] == pytest.approx(expected, abs=1e-6)
    if domain == "spice":
        long_names = {  # of the frames that are from SPICE's own file
            "SPICE PubChem Set 6 Single Points Dataset v1.2": "PubChem",
            "SPICE DES370K Single Points Dataset Supplement v1.0": "DES370K Dimers",
        }
        rows["subset"] = [long_names.get(name, name) for name in rows["subset"]]
        assert set(split["by_subset"]) == set(rows["subset"])
        assert len(split["by_subset"]) > 4
        for name, metrics in split["by_subset"].items():
            chosen = [index for index, subset in enumerate(rows["subset"]) if subset == name]
            for metric in ("energy_per_atom_mae", "forces_mae"):
                expected = np.mean(np.hstack([rows[metric][index] for index in chosen]))
                assert metrics[metric]["value"] == pytest.approx(expected, abs=1e-6)
    for name in ("parity.png", "errors.png", "errors_by_element.png"):
        assert (tmp_path / "id" / name).stat().st_size > 5000


def test_groups_by_hand() -> None:
    """Two structures of two atoms; the second atom of each is fixed, the last label is missing."""
    from escaip_fairchem.predict.split_errors import SplitErrors

    part = {
        "row": np.arange(2),
        "natoms": np.array([2, 2], np.int32),
        "numbers": np.array([1, 8, 1, 8], np.uint8),
        "fixed": np.array([False, True, False, True]),
        "energy": np.array([1.01, 5.0]),
        "energy_label": np.array([1.0, np.nan]),
        "forces": np.array([[0.01, 0, 0], [9, 9, 9], [3, 4, 0], [9, 9, 9]], np.float32),
        "forces_label": np.array([[0, 0, 0.02], [0, 0, 0], [0, 4, 3], [0, 0, 0]], np.float32),
    }
    errors = SplitErrors((np.zeros(256), 0.5), free_atoms_only=True)
    errors.add(part)
    errors.add({**part, "forces": np.full((4, 3), np.nan, np.float32)})  # and predictions are lost
    assert errors.counts == {"structures": 4, "atoms": 8, "free_atoms": 4, "not_finite": 2}
    total, baseline, count = errors.sums["energy_mae"][0]
    assert (total, baseline, count) == pytest.approx((0.02, 1.0, 2))
    assert errors.sums["efwt"][0].tolist() == [1, 0, 2]  # within 0.02 eV and 0.03 eV/A
    assert np.isnan(errors.sums["forces_mae"][0, 0])
    (names, sums) = errors.groups()["by_force"][1], errors.groups()["by_force"][0]
    counted = dict(zip(names, sums["forces_mae"][:, 2].tolist(), strict=True))
    assert {name: n for name, n in counted.items() if n} == {"0.01 to 0.03": 6, "3 to 10": 6}
    hydrogen, oxygen = errors.elements.rows()
    assert (hydrogen.free_atoms, oxygen.free_atoms, oxygen.force_mae_eV_per_A) == (4, 0, None)


def test_ranks_array_jobs_and_kills_give_the_same_bytes(work: Path, tmp_path: Path) -> None:
    chosen = settings(work, "spice")
    chosen["splits"] = {"one": "spice/test", "two": "mptrj/test"}
    chosen |= {"part_rows": 3, "allow_unknown_elements": True}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("predict_jobs.py"), tmp_path,
         json.dumps(chosen), "3"],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "ESCAIP_DATA": str(work), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 0
    expected = contents(tmp_path / "alone" / "results")
    assert len(expected) == 1 + 8 + 5
    for name in ("ranks", "killed"):
        assert contents(tmp_path / name / "results") == expected


def test_array_jobs_share_out_the_parts(work: Path, tmp_path: Path) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    chosen = settings(work, "oc20", part_rows=2)
    expected = contents(predict(tmp_path / "alone", **chosen))
    predict(tmp_path / "array", 1, 2, **chosen)
    assert missing(tmp_path / "array" / "results") == [("id", 0), ("id", 2)]
    assert contents(predict(tmp_path / "array", 0, 2, **chosen)) == expected
    torch.set_num_threads(threads)


def test_rows_and_names_are_those_of_the_data(work: Path, tmp_path: Path) -> None:
    parts = list(read_split(predict(tmp_path, **settings(work, "oc20")), "id"))
    frames = stored(work / "oc20" / "test")
    assert np.concatenate([part["row"] for part in parts]).tolist() == list(range(len(frames)))
    for name in ("sid", "fid"):
        found = np.concatenate([part[name] for part in parts]).tolist()
        assert found == [str(atoms.info[name]) for atoms in frames]
    numbers = np.concatenate([part["numbers"] for part in parts])
    assert numbers.tolist() == np.concatenate([atoms.numbers for atoms in frames]).tolist()
    exact = np.concatenate([part["energy_label"] for part in parts])
    assert exact.tolist() == [atoms.calc.results["energy"] for atoms in frames]
    some = select(parts[0], np.array([False, True, False, False]))
    first = len(frames[0])
    assert some["sid"].tolist() == [frames[1].info["sid"]]
    assert np.array_equal(some["forces"], parts[0]["forces"][first : first + len(frames[1])])


def test_finished_parts_are_not_computed_again(work: Path, tmp_path: Path) -> None:
    parts = predict(tmp_path, **settings(work, "oc22"))
    (only,) = parts.glob("id/part-*.npz")
    (parts / "id" / f".{only.name}.partial-123").write_bytes(b"half")
    arrays = dict(np.load(only))
    write_part(parts, "id", 0, {**arrays, "energy": np.zeros(4)})
    predict(tmp_path, **settings(work, "oc22"))
    assert not np.load(only)["energy"].any()
    assert [path.name for path in (parts / "id").iterdir()] == [only.name]


def test_mistakes_in_one_line(work: Path, tmp_path: Path) -> None:
    chosen = settings(work, "oc22")
    (tmp_path / "run" / "checkpoints" / "step_1").mkdir(parents=True)
    shard = tmp_path / "run" / "checkpoints" / "step_1" / "__0_0.distcp"
    shard.write_bytes(b"training state")
    save_checkpoint(tmp_path / "b" / "b.pt", conservative=False, stress=False, dataset="b")
    for changes, message in (
        ({"checkpoint": None}, "no checkpoint; add checkpoint="),
        ({"checkpoint": "nowhere.pt"}, "no checkpoint at nowhere.pt"),
        ({"checkpoint": str(shard)}, "is no inference checkpoint"),
        ({"checkpoint": str(shard.parent)}, "no inference_ckpt.pt"),
        ({"splits": {"id": "oc22/nothing"}}, "split id: .* does not exist"),
        ({"splits": {"id": None}}, "no data set to predict"),
        ({"task": "oc20"}, "task=oc20: the checkpoint knows oc22"),
    ):
        with pytest.raises(UserError, match=message):
            predict(tmp_path / "none", **{**chosen, **changes})
    assert not (tmp_path / "none").exists()
    parts = predict(tmp_path / "first", **chosen)
    for changes, message in (
        ({"checkpoint": str(tmp_path / "b" / "b.pt")}, "another checkpoint, .*model_oc22"),
        ({"max_atoms": 90}, "max_atoms=150"),
        ({"part_rows": 9}, "part_rows=4"),
        ({"splits": {"id": "oc20/test"}}, "other data of split id, oc22/test"),
        ({"splits": {"ood": "oc22/test"}}, "splits id"),
    ):
        with pytest.raises(UserError, match=f"holds predictions of .*{message}.*job.timestamp_id"):
            predict(tmp_path / "first", **{**chosen, **changes})
    part_path(parts, "id", 0).unlink()
    with pytest.raises(UserError, match="1 of 1 parts are missing"):
        evaluate(parts)
    with pytest.raises(UserError, match=r"no plan\.json"):
        Plan.read(tmp_path)


def test_data_that_cannot_be_evaluated(work: Path, tmp_path: Path) -> None:
    """Elements without a reference energy; structures without labels."""
    lithium = Atoms("Li2", [[0, 0, 0], [0, 0, 2.7]], info={"sid": "dimer"})
    write(tmp_path / "a.extxyz", [lithium])
    convert([str(tmp_path / "a.extxyz")], tmp_path / "set", unlabelled=True)
    chosen = settings(work, "spice", splits={"id": str(tmp_path / "set" / "test")})
    folder = predict(tmp_path / "out", **chosen)
    (part,) = read_split(folder, "id")
    assert not any(name.endswith("_label") for name in part)
    assert np.isfinite(part["energy"]).all()
    reducer = EvaluateReducer()
    reducer.job_config = job(tmp_path / "out")
    with pytest.raises(UserError, match=r"split id, .*set/test, has no labels"):
        reducer.reduce()
    import run_helpers

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(run_helpers, "REFERENCES", [0.01 * (z != 3) for z in range(120)])
        known = tmp_path / "known" / "model.pt"
        save_checkpoint(known, conservative=False, stress=False, dataset="spice")
    chosen["checkpoint"] = str(known)
    with pytest.raises(UserError, match=r"no reference energy for Li \(first in dimer\)"):
        predict(tmp_path / "refused", **chosen)
    assert list(read_split(predict(tmp_path / "b", **chosen, allow_unknown_elements=True), "id"))


@pytest.mark.parametrize(
    "recipe", sorted(RECIPES.glob("*/evaluate*.yml")), ids=lambda path: path.stem
)
def test_recipes_compose(recipe: Path) -> None:
    config = get_hydra_config_from_yaml(str(recipe), ["cluster=cpu", "checkpoint=a.pt"])
    assert config.runner.checkpoint == "a.pt"
    expected = {
        "oc20": ["id", "ood_ads", "ood_cat", "ood_both"],
        "oc22": ["id", "ood"],
        "mptrj": ["val"],
        "spice": ["test"],
        "evaluate_domains": ["oc20", "oc22", "mad", "mptrj"],
    }
    names = recipe.stem if recipe.stem in expected else recipe.parent.name
    assert list(config.runner.splits) == expected[names]
    assert config.reducer.free_atoms_only == (recipe.parent.name in ("oc20", "oc22"))
    again = get_hydra_config_from_yaml(str(recipe), ["cluster=cpu", "checkpoint=a.pt"])
    assert again.job.metadata.results_dir == config.job.metadata.results_dir


def test_the_command(work: Path, tmp_path: Path) -> None:
    """Two splits and their average, as a user types it."""
    (tmp_path / "data").symlink_to(work)
    done = fairchem(
        tmp_path, "-c", str(RECIPES / "oc22" / "evaluate_s2ef_total.yml"), "cluster=cpu",
        f"checkpoint={work / 'model_oc20'}", "splits.id=oc20/test", "splits.ood=oc22/test",
    )  # fmt: skip
    result = json.loads(
        (tmp_path / "evaluations/oc22_evaluate_s2ef_total/metrics.json").read_text()
    )
    values = [split["metrics"]["forces_mae"]["value"] for split in result["splits"].values()]
    assert result["average"]["forces_mae"]["value"] == pytest.approx(np.mean(values))
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("force MAE, eV/A")]
    shown = [float(value) for value in line.split()[3:]]
    assert shown == pytest.approx([*values, np.mean(values)], rel=1e-4)
