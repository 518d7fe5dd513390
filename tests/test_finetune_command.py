"""`escaip finetune` as docs/finetuning.md shows it, and on a user's own VASP trajectory."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.io import read, write

import escaip_fairchem
from escaip_fairchem.cli import main
from escaip_fairchem.train.callbacks import read_metrics
from fork_runs import launch

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "finetuning.md").read_text()
#: Fewer steps than on the page.
STEPS = {"300": "20"}


def run_line(line: str) -> None:
    """Run a command of the page: `escaip` in this process, `fairchem` in its own."""
    for given, fewer in STEPS.items():
        line = re.sub(rf"(steps[ =]){given}\b", rf"\g<1>{fewer}", line)
    program, *arguments = shlex.split(line)
    if program == "escaip":
        assert main(arguments) == 0, line
        return
    assert arguments.pop(0) == "-c"
    done = launch(Path.cwd(), *arguments, search=arguments[0].endswith("recipe.yml"))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything on the page was run, in order."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(ROOT / "configs", folder / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ESCAIP_DATA", "data")
        # one thread, so that sums are done in the same order by every process
        patch.setenv("OMP_NUM_THREADS", "1")
        for language, text in re.findall(r"```(bash|python)\n(.*?)```", PAGE, re.DOTALL):
            if language == "python":
                exec(compile(text, "docs/finetuning.md", "exec"), {})
            else:
                for line in text.splitlines():
                    run_line(line)
    return folder


def final(run: Path) -> dict[str, torch.Tensor]:
    # Written by the runs above; fairchem's checkpoint holds its own classes.
    path = run / "checkpoints" / "final" / "inference_ckpt.pt"
    return torch.load(path, weights_only=False).ema_state_dict


def test_errors_fall(page: Path):
    rows = [row for row in read_metrics(page / "runs/own/metrics.csv") if "val_loss" in row]
    assert rows[-1]["step"] == 20
    assert rows[-1]["val_forces_mae"] < 0.9 * rows[0]["val_forces_mae"]


def test_another_zero_of_energy_is_absorbed(page: Path, monkeypatch):
    monkeypatch.setenv("ESCAIP_DATA", str(page / "data"))
    atoms = read(page / "own.extxyz", 0)
    label = atoms.get_potential_energy()
    # the checkpoint it starts from already has the references of the new data
    atoms.calc = escaip_fairchem.calculator(page / "runs/own/start.pt")
    assert label < -60  # the shift alone is -67 eV
    assert abs(atoms.get_potential_energy() - label) < 2.0
    atoms.calc = escaip_fairchem.calculator(page / "runs/own/checkpoints/final/inference_ckpt.pt")
    assert abs(atoms.get_potential_energy() - label) < 2.0


def test_the_recipe_repeats_the_run(page: Path):
    first, second = final(page / "runs/own"), final(page / "runs/own_again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.full  # parts are in test_finetune
def test_own_slab_low_rank(page: Path, test_data: Path, monkeypatch, capfd):
    """VASP's relaxation, total energies: frozen parts stay, no trace of peft, ASE calculator.

    The run is named by a date, which Hydra would read as a number.
    """
    source = test_data / "formats" / "oc20_random1000156_vasp.traj"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = (
        f"finetune {page}/runs/base {source} --out {page}/runs/2026_11_21 --energy total --steps 6 "
        "--lora 4 --freeze embedding,blocks.0 --layer-decay 0.8 --max-atoms 100"
    )
    assert main(shlex.split(command)) == 0
    out = capfd.readouterr().out
    assert "the checkpoint never saw Na, Tl" in out
    assert "element references: refitted" in out
    path = page / "runs/2026_11_21/checkpoints/final/inference_ckpt.pt"
    checkpoint = torch.load(path, weights_only=False)
    assert checkpoint.model_config["_target_"] == "escaip_fairchem.EScAIP"
    start = torch.load(page / "runs/2026_11_21/start.pt", weights_only=False).model_state_dict
    trained = {
        name.removeprefix("module."): value for name, value in checkpoint.model_state_dict.items()
    }
    assert trained.keys() == start.keys()
    changed = {name for name in start if not torch.equal(trained[name], start[name])}
    assert "backbone.blocks.1.attention.qkv.weight" in changed
    assert "output_heads.forces.magnitude.final.weight" in changed
    frozen = ("backbone.input_block.", "backbone.blocks.0.")
    assert not any(name.startswith(frozen) for name in changed)
    assert not any(name.endswith("bias") and name.startswith("backbone.") for name in changed)
    atoms = read(source, -1)
    label = atoms.get_potential_energy()
    atoms.calc = escaip_fairchem.calculator(path)
    assert abs(atoms.get_potential_energy() - label) < 2.0  # of -67 eV
    assert np.isfinite(atoms.get_forces()).all()


def test_mistakes_before_any_work(page: Path, tmp_path, capsys):
    base = page / "runs/base"
    heavy = read(page / "own.extxyz", ":2")
    for atoms in heavy:
        atoms.numbers[-1] = 110
    write(tmp_path / "heavy.extxyz", heavy)
    for arguments, message in [
        (["--freeze", "block.0"], "no part 'block.0' to freeze; the model has backbone,"),
        (["--freeze", "backbone,heads"], "leaves nothing to train"),
        (["--energy", "adsorption"], "are total energies, not adsorption energies"),
        (["--references", "keep", "--energy", "total"], "pass --references refit"),
        (["--max-atoms", "5", "--energy", "total"], "less than the largest structure has"),
        (["--task", "other"], "name one with --task"),
        (["--set", "lr", "--energy", "total"], "give KEY=VALUE"),
        (["--out", str(base)], "exists; name another folder with --out"),
    ]:
        out = ["--out", str(tmp_path / "out")]
        argv = ["finetune", str(base), str(page / "own.extxyz"), *out, *arguments]
        assert main(argv) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("escaip: error: ")
        assert message in line
        assert not (tmp_path / "out").exists()
    argv = ["finetune", str(base), str(tmp_path / "heavy.extxyz"), "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert "no place for Ds" in capsys.readouterr().err
