"""The command ``escaip``: help, and one line for each mistake of a user."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from data_helpers import labelled_atoms, stored
from escaip_fairchem.cli import main


@pytest.fixture(autouse=True)
def data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("ESCAIP_DATA", str(tmp_path / "root"))
    return tmp_path / "root"


def fails(argv, capsys) -> str:
    """Run a command that must fail, and return the one line it prints."""
    assert main([str(argument) for argument in argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("escaip: error: ")
    assert "Traceback" not in "\n".join(lines)
    return lines[-1]


def test_help_lists_the_subcommands_and_imports_nothing_heavy():
    code = (
        "import sys; from escaip_fairchem.cli import build_parser; build_parser().print_help();"
        "print([m for m in ('numpy', 'torch', 'ase') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = "sample-data convert import-checkpoint finetune info plot bench config-reference"
    for name in names.split():
        assert f"\n    {name}" in out.stdout
    assert out.stdout.rstrip().endswith("[]")


def test_sample_then_refusal_to_overwrite(tmp_path, capsys, data_root):
    assert main(["sample-data", "oc20", "--frames", "12", "--seed", "3"]) == 0
    folder = data_root / "oc20/sample"
    assert "10 train and 2 val frames" in capsys.readouterr().out
    assert len(stored(folder / "train")) == 10
    assert "pass --overwrite" in fails(["sample-data", "oc20"], capsys)
    assert "--frames is 1" in fails(["sample-data", "oc20", "--frames", 1, "--overwrite"], capsys)
    assert len(stored(folder / "train")) == 10


def test_convert_with_a_glob_and_a_split_key(tmp_path, capsys, data_root):
    for name, sids in (("a", [1, 1]), ("b", [2, 2])):
        write(tmp_path / f"{name}.traj", labelled_atoms(2, sid=sids))
    argv = ["convert", tmp_path / "*.traj", tmp_path / "out", "--split-by", "sid", "--name", "cu"]
    assert main([str(argument) for argument in argv]) == 0
    out = capsys.readouterr().out
    assert "2 train and 2 val frames" in out
    assert "dataset=cu" in out
    assert (data_root / "configs/dataset/cu.yaml").read_text() == (
        tmp_path / "out/dataset.yaml"
    ).read_text()
    assert len({atoms.info["sid"] for atoms in stored(tmp_path / "out/val")}) == 1


def test_convert_keeps_the_group_file_of_another_set(tmp_path, capsys, data_root):
    write(tmp_path / "in.traj", labelled_atoms(2))
    group = data_root / "configs/dataset/mine.yaml"
    group.parent.mkdir(parents=True)
    group.write_text("# mine\n")
    argv = ["convert", str(tmp_path / "in.traj"), str(tmp_path / "mine")]
    assert "mine.yaml exists; choose another --name or pass --overwrite" in fails(argv, capsys)
    assert group.read_text() == "# mine\n"
    assert main([*argv, "--overwrite"]) == 0
    assert group.read_text() != "# mine\n"


def test_elements_of_val_alone_are_named(tmp_path, capsys):
    frames = labelled_atoms(3, sid=["a", "a", "b"])
    frames[2].symbols[0] = "Ni"
    labels = frames[2].calc.results
    frames[2].calc = SinglePointCalculator(frames[2], **labels)
    write(tmp_path / "in.traj", frames)
    argv = ["convert", str(tmp_path / "in.traj"), str(tmp_path / "out"), "--split-by", "sid"]
    assert main(argv) == 0
    assert "only val has Ni: train gives" in capsys.readouterr().out


def test_convert_mistakes(tmp_path, capsys):
    good, out = tmp_path / "good.traj", tmp_path / "out"
    write(good, labelled_atoms(4, sid=[1, 1, 1, 1]))
    (tmp_path / "text.xyz").write_text("not a structure\n")
    write(tmp_path / "one.traj", labelled_atoms(1))
    write(tmp_path / "bare.traj", bulk("Cu"))
    water = molecule("H2O")
    water.calc = SinglePointCalculator(water, energy=-1.0, forces=np.full((3, 3), 500.0))
    bad = tmp_path / "bad.traj"
    write(bad, [*labelled_atoms(1), water])
    for argv, message in [
        (["missing.xyz", out], "input missing.xyz does not exist; give files"),
        ([tmp_path, out], "holds no .aselmdb file"),
        ([tmp_path / "text.xyz", out], "ASE cannot read"),
        ([tmp_path / "one.traj", out], "1 frame cannot be split"),
        ([tmp_path / "bare.traj", out], "frame 0: no energy"),
        ([bad, out], "bad.traj, frame 1: the force rms is 500 eV/A"),
        ([bad, out, "--strict"], "error: {bad}, frame 1: the force rms is 500 eV/A"),
        ([good, out, "--set", "energykey=e"], "no option 'energykey'; did you mean 'energy_key'?"),
        ([good, out, "--set", "energy_key"], "--set energy_key: give KEY=VALUE"),
        ([good, out, "--format", "asse"], "--format 'asse' is unknown; did you mean 'ase'?"),
        ([good, out, "--workers", "0"], "--workers is 0; give at least 1"),
        ([good, out, "--seed", "1", "--val", good], "--val and a split exclude each other"),
        ([good, out, "--split-by", "mol"], "no info key 'mol' to split by; info has index, sid"),
        ([good, out, "--split-by", "sid"], "same value of the split key"),
        ([good, out, "--val-within", "index"], "every group has a single frame"),
        ([good, out, "--val-fraction", "1.5"], "--val-fraction is 1.5; give a number between"),
        ([good, out, "--name", "a/b"], "name 'a/b': use letters"),
        ([good, tmp_path], "exists; choose another folder or pass --overwrite"),
    ]:
        assert message.format(bad=bad) in fails(["convert", *argv], capsys)
    assert not out.exists()


def test_forces_of_a_whole_set_in_kcal_per_mol(tmp_path, capsys):
    frames = labelled_atoms(5)
    for atoms in frames:
        atoms.calc.results["forces"] *= 23.06
    write(tmp_path / "in.traj", frames)
    argv = ["convert", str(tmp_path / "in.traj"), str(tmp_path / "out")]
    assert "looks like kcal/mol/A: multiply the forces by 0.0433641" in fails(argv, capsys)
    assert main([*argv, "--skip-unit-checks"]) == 0
