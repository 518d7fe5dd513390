"""Matbench Discovery: the recipe by the `fairchem` command, its files, metrics, check and YAML."""

from __future__ import annotations

import gzip
import json
import logging
import os
import shutil
import time
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from pymatgen.core import Composition, Structure
from pymatgen.entries.compatibility import MaterialsProject2020Compatibility

import matbench_files
from data_helpers import stored
from escaip_fairchem import calculator
from escaip_fairchem.cli import main
from escaip_fairchem.data.convert import convert
from escaip_fairchem.errors import UserError
from escaip_fairchem.matbench.check import check
from escaip_fairchem.matbench.files import Summary, read_summary
from escaip_fairchem.matbench.metrics import metrics_of
from escaip_fairchem.matbench.recipe import DiscoveryRunner
from fork_runs import Run, killed_at_random
from matbench_files import ENTRIES, INITIAL, REFERENCES, SUMMARY, materials
from run_helpers import save_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from ase import Atoms

RECIPE = Path(__file__).parents[1] / "configs" / "mptrj" / "matbench_discovery.yml"
STEPS = 2
KILLS = int(os.environ.get("ESCAIP_KILLS", "2"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published files with a few materials, and a random conservative model."""
    folder = tmp_path_factory.mktemp("matbench")
    matbench_files.make(folder / "data")
    convert([str(folder / "data" / INITIAL)], folder / "data" / "wbm_initial", unlabelled=True)
    checkpoint = folder / "model" / "inference_ckpt.pt"
    save_checkpoint(checkpoint, conservative=True, stress=True, dataset="mptrj")
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> tuple[Path, float]:
    """What the command writes undisturbed, and how long that takes."""
    start = time.monotonic()
    settings = ["cluster=cpu", "checkpoint=model", "part_rows=2", "max_atoms=6", "float64=true"]
    run = Run(folder, str(RECIPE), *settings, f"relax_steps={STEPS}")
    assert run.wait() == 0, run.output()[-3000:]
    took = time.monotonic() - start
    there = folder / "submissions" / "mptrj_matbench_discovery"
    shutil.copy(there / "canonical_config.yaml", folder / "config.yaml")
    shutil.move(there, folder / "whole")
    return folder / "whole", took


def read_discovery(folder: Path) -> dict[str, str]:
    """From the description alone: gzipped CSV of two columns."""
    (path,) = folder.glob("????-??-??-discovery.csv.gz")
    first, *lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    assert first == "material_id,e_form_per_atom"
    return dict(line.split(",") for line in lines)


def read_geo_opt(folder: Path) -> dict[str, dict[str, Any]]:
    """From the description alone: gzipped JSON lines."""
    (path,) = folder.glob("????-??-??-geo-opt.jsonl.gz")
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    for row in rows:
        assert {*row} == {"material_id", "structure", "energy", "converged", "n_steps"}
    return {row["material_id"]: row for row in rows}


def test_archive_is_read(folder: Path) -> None:
    """Each file is a material, under its id, to the last digit of the text."""
    frames = stored(folder / "data" / "wbm_initial" / "test")
    for atoms, (material, source) in zip(frames, materials().items(), strict=True):
        assert atoms.info["sid"] == material
        np.testing.assert_allclose(atoms.positions, source.positions, atol=1e-8)
        np.testing.assert_allclose(atoms.cell, source.cell, atol=1e-8)


def test_broken_archive(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "wbm.extxyz.zip"
    path.write_bytes((folder / "data" / INITIAL).read_bytes()[:-30])
    with pytest.raises(UserError, match="is no whole zip archive"):
        convert([str(path)], tmp_path / "out", unlabelled=True)
    frame = "1\n" + 'pbc="F F F"\nCu 0 0 0\n'
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.extxyz", frame)
    path.write_bytes(path.read_bytes().replace(b"Cu 0 0 0", b"Cu 0 0 1", 1))
    with pytest.raises(UserError, match=r"is no whole zip archive .*'a.extxyz'"):
        convert([str(path)], tmp_path / "out", unlabelled=True)


def test_broken_summary(tmp_path: Path) -> None:
    path = tmp_path / "summary.csv"
    columns = "material_id,formula,e_form_per_atom_mp2020_corrected,"
    columns += "e_above_hull_mp2020_corrected_ppd_mp,unique_prototype\n"
    for text, reason in (
        ("", "has no column e_above"),
        (columns, "is not 2023-12-13-wbm-summary.csv.gz"),
        (columns + "wbm-1-1,Na1 Cl1,much,0.1,True\n", "could not convert .* 'much'"),
        (columns + "wbm-1-1,Na1 Cl1,0.1,0.1,yes\n", "'yes'"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=reason):
            read_summary(path)


def test_relaxations_are_those_of_ase(folder: Path, results: tuple[Path, float]) -> None:
    """FIRE on Frechet's filter, one by one, by the calculator in double precision."""
    model = calculator(folder / "model/inference_ckpt.pt", device="cpu", dtype=torch.float64)
    found = read_geo_opt(results[0])
    assert list(found) == list(materials())
    for material, atoms in materials().items():
        before = atoms.cell.array.copy()
        atoms.calc = model
        FIRE(FrechetCellFilter(atoms), logfile=None).run(fmax=0.02, steps=STEPS)
        row = found[material]
        assert (row["n_steps"], row["converged"]) == (STEPS, False)
        assert row["energy"] == pytest.approx(atoms.get_potential_energy(), abs=1e-5)
        there = Structure.from_dict(row["structure"])
        np.testing.assert_allclose(there.lattice.matrix, atoms.cell, atol=1e-5)
        shift = there.frac_coords - atoms.get_scaled_positions()
        np.testing.assert_allclose(shift, shift.round(), atol=1e-5)
        assert np.abs(atoms.cell.array - before).max() > 1e-3


def test_energies_are_corrected_by_pymatgen(folder: Path, results: tuple[Path, float]) -> None:
    """The benchmark's way: DFT's entry with the model's energy and structure in it."""
    published = gzip.decompress((folder / "data" / ENTRIES).read_bytes()).splitlines()
    found, ends = read_discovery(results[0]), read_geo_opt(results[0])
    corrections = {}
    for line, atoms in zip(published, materials().values(), strict=True):
        row = json.loads(line)
        end = ends[row["material_id"]]
        entry = matbench_files.entry_of(atoms, 0.0)
        entry._energy, entry._structure = end["energy"], Structure.from_dict(end["structure"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            entry = MaterialsProject2020Compatibility().process_entry(entry, clean=True)
        corrections[entry.reduced_formula] = entry.correction_per_atom
        elements = sum(map(matbench_files.reference, atoms.symbols))
        expected = (end["energy"] + entry.correction - elements) / len(atoms)
        assert float(found[row["material_id"]]) == pytest.approx(expected, abs=6e-5)
    assert corrections["CuAu"] == 0
    assert corrections["FeO"] < corrections["MgO"] < -0.1  # oxygen, and +U on iron
    assert corrections["NaCl"] < -0.1
    assert corrections["ZnS"] < -0.1


@pytest.mark.full  # parts are kept as in test_predict
def test_killed_at_any_moment(folder: Path, results: tuple[Path, float]) -> None:
    """The same command goes on, to the same bytes."""
    whole, took = results
    there = folder / "submissions" / "mptrj_matbench_discovery"
    for _ in killed_at_random(folder, "config.yaml", took, KILLS):
        for path in there.glob("*.gz"):
            assert path.read_bytes()[10:] == (whole / path.name).read_bytes()[10:]
    assert len(list(there.glob("*.gz"))) == 2
    assert not list(there.glob("**/.*partial*"))


def test_check_accepts(folder: Path, results: tuple[Path, float]) -> None:
    report = check(results[0], folder / "data" / SUMMARY)
    assert not report.problems
    assert "6 materials, 0 without a prediction, 0 of 6 relaxations converged" in str(report)


def rows_of(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode().splitlines()


def change(index: int, **values: Any) -> Callable[[list[str]], list[str]]:
    """Another value in a line of the relaxed structures."""

    def changed(lines: list[str]) -> list[str]:
        row = {**json.loads(lines[index]), **values}
        return [*lines[:index], json.dumps(row), *lines[index + 1 :]]

    return changed


def collapse(lines: list[str]) -> list[str]:
    row = json.loads(lines[0])
    row["structure"]["lattice"]["matrix"][2] = row["structure"]["lattice"]["matrix"][1]
    return [json.dumps(row), *lines[1:]]


def substitute(lines: list[str]) -> list[str]:
    return [lines[0].replace('"element":"Mg"', '"element":"Ca"'), *lines[1:]]


SPOILED = {
    "1 materials predicted, without a relaxed structure: wbm-1-1": ("geo-opt", lambda x: x[1:]),
    "1 materials relaxed, without a prediction: wbm-2-6": ("discovery", lambda x: x[:-1]),
    "1 materials of WBM, but not in the file: wbm-2-6": ("discovery", lambda x: x[:-1]),
    "1 materials not in WBM: wbm-9-9": ("discovery", lambda x: [*x, "wbm-9-9,0.1"]),
    "1 materials infinite: wbm-2-6": ("discovery", lambda x: [*x[:-1], "wbm-2-6,inf"]),
    "all formation energies are equal": (
        "discovery", lambda x: [x[0], *(f"{line.split(',')[0]},0.5" for line in x[1:])],
    ),
    "no material has a prediction": (
        "discovery", lambda x: [x[0], *(f"{line.split(',')[0]}," for line in x[1:])],
    ),
    "1 materials relaxed twice: wbm-1-1": ("geo-opt", lambda x: [*x, x[0]]),
    "1 materials with other keys than": ("geo-opt", change(0, forces=[])),
    "1 materials with an energy that is no number": ("geo-opt", change(0, energy=None)),
    "1 materials without converged (true or false)": ("geo-opt", change(0, converged=1)),
    "1 materials whose structure is none of pymatgen's": ("geo-opt", change(0, structure={})),
    "1 materials whose cell has no volume": ("geo-opt", collapse),
    "1 materials relaxed with another composition": ("geo-opt", substitute),
}  # fmt: skip


@pytest.mark.parametrize("problem", SPOILED)
def test_check_refuses(
    problem: str, folder: Path, results: tuple[Path, float], tmp_path: Path
) -> None:
    which, spoil = SPOILED[problem]
    for path in results[0].glob("*.gz"):
        lines = rows_of(path)
        changed = "\n".join(spoil(lines) if which in path.name else lines) + "\n"
        (tmp_path / path.name).write_bytes(gzip.compress(changed.encode()))
    problems = check(tmp_path, folder / "data" / SUMMARY).problems
    assert any(line.startswith(problem) for line in problems), problems


def test_check_refuses_what_it_cannot_read(
    results: tuple[Path, float], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """With one line, and its exit code."""
    for path in results[0].glob("*.gz"):
        shutil.copy(path, tmp_path / path.name)
    (path,) = tmp_path.glob("*discovery*")
    path.write_bytes(path.read_bytes()[:-9])
    assert main(["matbench", "check", str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err
    path.rename(tmp_path / "discovery.csv.gz")
    assert main(["matbench", "check", str(tmp_path)]) == 2
    assert "has 0 files named <yyyy-mm-dd>-discovery.csv.gz" in capsys.readouterr().err


def test_metrics_by_hand() -> None:
    """Ten materials: errors of 0.1 eV/atom, one missing, one absurd, two of one prototype."""
    hull = np.array([-0.05, -0.2, 0.0, 0.05, 0.3, 0.4, -0.3, 0.02, 0.5, 0.6])
    error = np.array([0.1, 0.1, -0.1, -0.1, 0.1, -0.1, np.nan, -0.1, 9.0, 0.1])
    unique = np.array([True] * 9 + [False])
    ids = [f"wbm-1-{n}" for n in range(10)]
    summary = Summary(ids, ["Na1 Cl1"] * 10, np.full(10, -1.0), hull, unique)
    table = metrics_of(dict(zip(ids, -1.0 + error, strict=True)), summary)
    # stable are 0, 1, 2, 6; called stable 1, 2 (right), 3, 7 (wrong)
    full = table["full_test_set"]
    assert (full["TP"], full["FP"], full["FN"], full["TN"]) == (2, 2, 2, 4)
    assert full["missing_preds"] == 2
    assert (full["Precision"], full["Recall"], full["F1"]) == (0.5, 0.5, 0.5)
    assert full["Accuracy"] == pytest.approx(0.6)
    assert full["DAF"] == pytest.approx(0.5 / 0.4)
    assert full["MAE"] == pytest.approx(0.1)
    assert full["RMSE"] == pytest.approx(0.1)
    there = hull[np.isfinite(error) & (error < 5)]
    assert full["R2"] == pytest.approx(1 - 8 * 0.01 / ((there - there.mean()) ** 2).sum())
    small = table["unique_prototypes"]
    assert (small["TP"], small["FP"], small["FN"], small["TN"]) == (2, 2, 2, 3)
    assert small["DAF"] == pytest.approx(0.5 / (4 / 9))
    assert table["most_stable_10k"] == pytest.approx(small)  # fewer than 10,000


@pytest.mark.full
def test_own_code_of_the_benchmark_agrees(folder: Path, results: tuple[Path, float]) -> None:
    """Its metrics of our file; needs a clone of its repository on the path."""
    theirs = pytest.importorskip("matbench_discovery.metrics.discovery")
    import pandas as pd

    known = pd.read_csv(folder / "data" / SUMMARY).set_index("material_id").round(3)
    (path,) = results[0].glob("*-discovery.csv.gz")
    predictions = pd.read_csv(path).set_index("material_id")["e_form_per_atom"].round(3)
    expected = theirs.calc_discovery_metrics(known, predictions)
    out = folder / "metrics.json"
    summary = str(folder / "data" / SUMMARY)
    assert main(["matbench", "metrics", str(path), "--summary", summary, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    for subset, metrics in expected.items():
        for name, value in metrics.items():
            assert found[str(subset)][name] == pytest.approx(value, nan_ok=True), (subset, name)


#: Keys that the benchmark's schema requires, as its guide for contributors lists them.
REQUIRED = {
    "authors", "architecture_types", "environment", "checkpoint_url", "dates", "doi", "license",
    "lifecycle", "model_key", "model_name", "model_params", "model_version", "openness", "paper",
    "pr_url", "repo", "targets", "test_task", "train_task", "training_sets",
}  # fmt: skip


def card(folder: Path, results: Path, out: Path, *more: str) -> int:
    author = "Jane Doe <jane@uni.edu>; Some University"
    arguments = ["--results", str(results), "--name", "EScAIP MP (v1.0)", "--author", author]
    return main(["matbench", "card", str(folder / "model"), *arguments, "--out", str(out), *more])


def test_card(
    folder: Path, results: tuple[Path, float], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The tree of the repository: YAML with all required keys, and the files it names."""
    assert card(folder, results[0], tmp_path, "--fine-tuned", "--openness=OSCD") == 0
    assert "fill in: checkpoint_url" in capsys.readouterr().out
    content = yaml.safe_load((tmp_path / "models/escaip/escaip-mp-v1.0.yml").read_text())
    assert set(content) >= REQUIRED
    assert content["model_key"] == "escaip-mp-v1.0"
    assert (content["targets"], content["train_task"]) == ("EFS_G", "S2EFS")
    assert (content["fine_tune"], content["openness"]) == (True, "OSCD")
    person = {"name": "Jane Doe", "email": "jane@uni.edu", "affiliation": "Some University"}
    assert content["authors"] == [person]
    assert content["hyperparams"]["evaluation"] == {
        "max_force": 0.02, "max_steps": STEPS, "ase_optimizer": "FIRE",
        "cell_filter": "FrechetCellFilter",
    }  # fmt: skip
    for kind, name in (("discovery", "discovery.csv.gz"), ("geo_opt", "geo-opt.jsonl.gz")):
        file = content["metrics"][kind]["pred_file"]
        path = tmp_path / file["name"]
        assert path.parent == tmp_path / "models/escaip/escaip-mp-v1.0"
        assert path.name.endswith(name)
        assert path.stat().st_size == file["size"]
        assert path.read_bytes() == (results[0] / path.name).read_bytes()


def test_card_by_a_schema(
    folder: Path, results: tuple[Path, float], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The schema that is given decides."""
    schema = tmp_path / "schema.yml"
    rules = {"properties": {"license": {"properties": {"code": {"enum": ["MIT"]}}}}}
    schema.write_text(yaml.safe_dump(rules))
    assert card(folder, results[0], tmp_path / "a", "--schema", str(schema)) == 0
    wrong = ["--schema", str(schema), "--license", "mit"]
    assert card(folder, results[0], tmp_path / "b", *wrong) == 2
    assert "schema refuses license.code: 'mit' is not one of" in capsys.readouterr().err
    assert not list((tmp_path / "b").rglob("*.yml"))


def test_card_refuses(
    folder: Path, results: tuple[Path, float], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert card(folder, results[0], tmp_path, "--key", "Not_A_Key") == 2
    assert "--key Not_A_Key: lowercase letters" in capsys.readouterr().err
    save_checkpoint(tmp_path / "other" / "inference_ckpt.pt", conservative=True, stress=True,
                    dataset="mptrj", max_neighbors=9)  # fmt: skip
    assert main(["matbench", "card", str(tmp_path / "other"), "--results", str(results[0]),
                 "--name", "x", "--author", "A <a@b.c>"]) == 2  # fmt: skip
    assert "holds relaxations of another checkpoint" in capsys.readouterr().err


def runner(folder: Path, model: str, **options: Any) -> DiscoveryRunner:
    published = {"entries": str(folder / "data" / ENTRIES)}
    published["references"] = str(folder / "data" / REFERENCES)
    return DiscoveryRunner(model, {"wbm": "nowhere/test"}, cell=True, **(published | options))


def test_refused_before_the_first_relaxation(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Missing files of the benchmark, a model without stress; direct forces get a warning."""
    with pytest.raises(UserError, match="it is the benchmark's 2022-10-19-wbm-computed"):
        runner(folder, str(folder / "model"), entries="absent.jsonl.gz").run()
    save_checkpoint(tmp_path / "a" / "inference_ckpt.pt", conservative=True, stress=False,
                    dataset="mptrj")  # fmt: skip
    with pytest.raises(UserError, match="predicts no stress, which cells are relaxed by"):
        runner(folder, str(tmp_path / "a")).run()
    save_checkpoint(tmp_path / "b" / "inference_ckpt.pt", conservative=False, stress=True,
                    dataset="mptrj")  # fmt: skip
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="does not exist"):
        runner(folder, str(tmp_path / "b")).run()
    assert "has direct forces, not the gradient of its energy" in caplog.text


def test_material_without_energy_is_empty(
    folder: Path, results: tuple[Path, float], tmp_path: Path
) -> None:
    """In the table without a value, and not among the structures; the checker counts it."""
    from escaip_fairchem.matbench.recipe import DiscoveryReducer

    there = tmp_path / "run" / "results"
    shutil.copytree(results[0] / "results", there)
    with np.load(there / "wbm" / "part-00001.npz") as part:
        arrays = dict(part)
    arrays["energy"][0] = np.nan
    np.savez(there / "wbm" / "part-00001.npz", **arrays)
    data = folder / "data"
    DiscoveryReducer(str(data / ENTRIES), str(data / REFERENCES)).reduce_folder(there)
    found, ends = read_discovery(there.parent), read_geo_opt(there.parent)
    assert found.pop("wbm-1-3") == ""
    assert {*found} == {*ends} == {*materials()} - {"wbm-1-3"}
    report = check(there.parent, data / SUMMARY)
    assert not report.problems
    assert "1 without a prediction" in str(report)


def test_other_data(folder: Path, results: tuple[Path, float], tmp_path: Path) -> None:
    """Entries of another composition, or of other materials, are refused."""
    from escaip_fairchem.matbench.recipe import DiscoveryReducer

    lines = rows_of(folder / "data" / ENTRIES)
    for changed, reason in (
        (lines[1:], "the entries have no wbm-1-1"),
        ([lines[1].replace("wbm-1-2", "wbm-1-1"), *lines[1:]], "wbm-1-1 is Mg1 O1, and its entry"),
    ):
        path = tmp_path / "entries.jsonl.gz"
        path.write_bytes(gzip.compress("\n".join(changed).encode()))
        reducer = DiscoveryReducer(str(path), str(folder / "data" / REFERENCES))
        with pytest.raises(UserError, match=reason):
            reducer.reduce_folder(results[0] / "results")


def test_archives_hold_several_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MPtrj's layout: the frames of a material in one file, with labels."""
    monkeypatch.setenv("ESCAIP_DATA", str(tmp_path))
    lattice = 'Lattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3:forces:R:3'
    frame = f'1\n{lattice} energy=-1.5 material_id=mp-1 pbc="T T T"\nCu 0 0 0 0.1 0 0\n'
    with zipfile.ZipFile(tmp_path / "mptrj.extxyz.zip", "w") as archive:
        archive.writestr("mp-1.extxyz", frame + frame.replace("-1.5", "-1.6"))
        archive.writestr("mp-2.extxyz", frame.replace("mp-1", "mp-2").replace("-1.5", "-1.7"))
    convert([str(tmp_path / "mptrj.extxyz.zip")], tmp_path / "out", check_units=False)
    frames: list[Atoms] = [
        a for split in ("train", "val") for a in stored(tmp_path / "out" / split)
    ]
    assert {(a.info["sid"], a.get_potential_energy()) for a in frames} == {
        ("mp-1", -1.5), ("mp-1", -1.6), ("mp-2", -1.7),
    }  # fmt: skip
    assert Composition(frames[0].get_chemical_formula()) == Composition("Cu")
