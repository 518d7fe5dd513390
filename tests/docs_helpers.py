"""The code in README.md and docs/: found, taken apart into calls, and carried out.

Blocks of bash run in bash, with the programs replaced by ones that note how they were called, so
loops, quotes and variables mean what they mean to a user.
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ase.build import add_adsorbate, fcc111
from ase.io import write

from data_helpers import labelled_atoms
from escaip_fairchem.cli import main
from escaip_fairchem.train.runner import instantiate
from run_helpers import compose_quickly

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parents[1]
# Fenced code, with the reason not to run it if there is one: ``<!-- not run: REASON -->``.
BLOCK = re.compile(r"(?:<!-- not run: ([^>]*) -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
_KEPT = ("ESCAIP_DATA", "WANDB_MODE")
_PROGRAM = """#!/bin/bash
printf '%s\\0' {kept} {name} "$@" >> '{notes}'
printf '\\1' >> '{notes}'
"""


class Block(NamedTuple):
    """Fenced code of a page."""

    excuse: str
    language: str
    code: str


class Call(NamedTuple):
    """A program as a block of bash called it."""

    environment: dict[str, str]
    program: str
    arguments: list[str]


def blocks(page: Path) -> list[Block]:
    return [Block(*match) for match in BLOCK.findall(page.read_text())]


def calls(code: str, folder: Path) -> list[Call]:
    """What a block of bash calls, by running it with programs that only take notes."""
    programs, notes = folder / "programs", folder / "notes"
    programs.mkdir(parents=True, exist_ok=True)
    notes.write_text("")
    kept = " ".join(f'"{name}=${name}"' for name in _KEPT)
    for name in ("escaip", "fairchem", "python"):
        (programs / name).write_text(_PROGRAM.format(kept=kept, name=name, notes=notes))
        (programs / name).chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", "-euc", code], capture_output=True, text=True, cwd=folder, check=False,
        env={"PATH": str(programs), "ESCAIP_DATA": "data", "WANDB_MODE": ""},
    )  # fmt: skip
    assert done.returncode == 0, f"{code}\n{done.stderr}"
    found = []
    for note in notes.read_text().split("\1")[:-1]:
        parts = note.split("\0")[:-1]
        variables = dict(part.split("=", 1) for part in parts[: len(_KEPT)])
        program, *arguments = parts[len(_KEPT) :]
        found.append(Call(variables, program, arguments))
    return found


def quick_start_calls(folder: Path) -> list[Call]:
    """Those of README's quick start: sample data, a training, what looks at it."""
    block = next(b for b in blocks(ROOT / "README.md") if "sample-data" in b.code)
    return calls(block.code, folder)


def carry_out(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what a call says in this process; a training is composed, on a CPU its model built."""
    for name, value in call.environment.items():
        monkeypatch.setenv(name, value)
    if call.program == "escaip":
        _escaip(call.arguments)
    elif call.program == "fairchem":
        compose(call.arguments)
    else:
        script, *arguments = call.arguments
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(script, run_name="__main__")


def _escaip(arguments: list[str]) -> None:
    # the last value of an option wins
    few = ["--frames", "24", "--overwrite"] if arguments[0] == "sample-data" else []
    try:
        code = main([*arguments, *few])
    except SystemExit as stop:  # --help and --version
        code = stop.code
    assert code == 0, arguments


def compose(arguments: list[str]) -> Any:
    """The configuration of a `fairchem` command, as the command composes it."""
    option, recipe, *overrides = arguments
    assert option == "-c"
    config = compose_quickly(recipe, overrides)
    if str(config.job.device_type.value) == "cpu" and "train_eval_unit" in config.runner:
        model = instantiate(config.runner.train_eval_unit.model)
        assert sum(weight.numel() for weight in model.parameters()) > 0
    return config


def fill(folder: Path) -> None:
    """The files that pages speak of as the user's own."""
    from test_inference import builtin_checkpoint

    for name in ("configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    write(folder / "my_frames.extxyz", labelled_atoms(12, sid=[0, 1, 2] * 4))
    (folder / "relaxations").mkdir()
    write(folder / "relaxations" / "a.traj", labelled_atoms(4))
    frames = labelled_atoms(4)
    for atoms in frames:
        atoms.info["dft_energy"] = atoms.calc.results["energy"]
        atoms.arrays["dft_forces"] = atoms.calc.results["forces"]
        atoms.calc = None
    write(folder / "labelled.extxyz", frames)
    slab = fcc111("Cu", (2, 2, 3), vacuum=8, periodic=True)
    add_adsorbate(slab, "O", 1.4, "fcc")
    slab.info.clear()
    write(folder / "slab.extxyz", slab)
    builtin_checkpoint(folder / "inference_ckpt.pt", direct=True)
