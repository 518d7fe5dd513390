"""``escaip bench peers --peers escaip_v1``; its environment and code are replaced by small ones."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from escaip_fairchem import EScAIP
from escaip_fairchem.bench import authors, authors_worker, v1_names
from escaip_fairchem.bench.structures import DOMAINS
from escaip_fairchem.cli import main
from helpers import executable
from slow_paper import SlowPaper

#: What the small model that stands for the authors' takes.
OPTIONS = ["--hidden", "64", "--layers", "1", "--neighbors", "12", "--domain", "molecules"]
SECONDS = (9, 0.5, 0.25)


@pytest.fixture(scope="module")
def published() -> dict:
    """Random weights by the authors' names; energy and forces by loops in float64."""
    backbone = {"preset": "paper", "hidden_size": 64, "num_layers": 1, "num_heads": 1}
    heads = {"energy": "EnergyHead", "forces": "DirectForceHead"}
    state = EScAIP(
        backbone={"model": "escaip_fairchem.EScAIPBackbone", **backbone},
        heads={name: {"module": f"escaip_fairchem.{cls}"} for name, cls in heads.items()},
    ).state_dict()
    noise = np.random.default_rng(0)
    weights = {
        theirs: state[ours].double().numpy() + 0.1 * noise.normal(size=tuple(state[ours].shape))
        for theirs, ours in v1_names.names(1).items()
    }
    atoms = DOMAINS["molecules"](0)
    slow = SlowPaper(weights, layers=1, heads=1, cutoff=12.0, max_neighbors=12)
    found = slow(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
    return {
        "weights": {k: torch.as_tensor(v, dtype=torch.float32) for k, v in weights.items()},
        "energy": torch.tensor([found["energy"]]),
        "forces": torch.as_tensor(found["forces"]),
        "versions": "loops",
    }


@pytest.fixture
def code(tmp_path) -> Path:
    """The files that the command looks for."""
    for file in ("src/EScAIP.py", authors.CONFIG):
        path = tmp_path / "code" / file
        path.parent.mkdir(parents=True)
        path.touch()
    return tmp_path / "code"


def bench(folder: Path, code: Path, answer: dict, *options: str) -> int:
    """The command, with a program in place of Python that gives a ready answer."""
    torch.save(answer, folder / "ready.pt")
    turns = "".join(f"read -r line; echo {seconds}\n" for seconds in SECONDS)
    copies = f'cp "$2" "{folder}/task.json"\ncp "{folder}/ready.pt" "$3"\n'
    python = executable(folder / "python", f"#!/bin/sh\n{copies}{turns}echo broken >&2\n")
    argv = ["bench", "peers", "--peers", authors.NAME, "--python", str(python), *OPTIONS]
    return main([*argv, "--atoms", "30", "--authors", str(code), "--repeats", "2", *options])


def test_models_agree_and_take_turns(tmp_path, code, published, capsys):
    out = tmp_path / "rows.csv"
    assert bench(tmp_path, code, published, "--out", str(out)) == 0
    with out.open(newline="") as file:
        ours, theirs = csv.DictReader(file)
    assert (ours["model"], ours["config"]) == ("ours", "paper H64 L1 K12")
    assert (theirs["model"], theirs["config"]) == ("escaip_v1", "v1 H64 L1 K12")
    assert 0 < float(ours["error"]) < 1e-5
    assert [float(theirs[key]) for key in ("min", "median", "max")] == [250, 375, 500]
    assert float(theirs["ratio"]) == pytest.approx(float(ours["min"]) / 250, rel=1e-3)
    assert ours["repeats"] == theirs["repeats"] == "2"
    printed = capsys.readouterr().out
    size = sum(tensor.numel() for tensor in published["weights"].values())
    assert f"{size / 1e6:.1f} M parameters; escaip_v1: loops" in printed


def test_task_of_their_code(tmp_path, code, published):
    assert bench(tmp_path, code, published) == 0
    task = json.loads((tmp_path / "task.json").read_text())
    atoms = DOMAINS["molecules"](0)
    assert task["structures"][0]["positions"] == atoms.positions.tolist()
    assert task["structures"][0]["pbc"] == [False] * 3
    assert np.linalg.det(task["structures"][0]["cell"]) > 0
    assert (Path(task["folder"]), task["threads"]) == (code, 1)
    sizes = {"hidden_size": 64, "num_layers": 1, "atten_num_heads": 1, "max_neighbors": 12}
    assert sizes.items() <= task["changes"].items()


@pytest.mark.parametrize("key", ["energy", "forces"])
def test_no_speed_where_their_numbers_differ(key, tmp_path, code, published, capsys):
    out = tmp_path / "rows.csv"
    changed = published | {key: published[key] * (1 + 1e-3)}
    assert bench(tmp_path, code, changed, "--out", str(out)) == 2
    printed = capsys.readouterr()
    assert " ms" not in printed.out
    assert f"escaip: error: the models differ: {key} by 1.0e-03" in printed.err
    assert not out.exists()


def test_weights_of_another_code_are_refused(tmp_path, code, published, capsys):
    name, own = "energy_head/energy_layer.final_output.0", "output_heads.energy.energy.final"
    for changed, reason in [
        ({"backbone/gate.weight": torch.ones(1)}, "backbone/gate.weight"),
        ({f"{name}.weight": torch.ones(1, 7)}, f"{own}.weight is [1, 7], not [1, 64]"),
    ]:
        other = published | {"weights": published["weights"] | changed}
        assert bench(tmp_path, code, other) == 2
        message = f"the weights are not those of the authors' cea229e: {reason}"
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_default_size_is_that_of_their_oc20_model(monkeypatch):
    seen = []
    monkeypatch.setattr(authors, "run", lambda settings, *_: seen.append(settings))
    argv = ["bench", "peers", "--peers", "escaip_v1"]
    assert main(argv) == main([*argv, "--hidden", "128"]) == 0
    assert [(s.hidden, s.layers, s.neighbors) for s in seen] == [(512, 10, 20), (128, 10, 20)]


def test_mistakes(tmp_path, code, capsys):
    fails = executable(tmp_path / "fails", "#!/bin/sh\necho first >&2\necho last >&2\nexit 1\n")
    # a script around a program that waits
    talks = "#!/bin/sh\nsleep 60 &\nread -r line; echo hello; wait\n"
    talks, begin = executable(tmp_path / "talks", talks), time.monotonic()
    text = tmp_path / "text"
    text.touch()
    there = ["--authors", str(code)]
    for argv, message in [
        (there, "escaip_v1: give --python; see escaip bench peers --list"),
        (["--python", str(fails)], "escaip_v1: give --authors, their code"),
        (
            ["--python", str(fails), "--authors", str(code / "src")],
            "--authors: no src/EScAIP.py in",
        ),
        ([*there, "--python", str(tmp_path / "none")], "--python: no file"),
        ([*there, "--python", str(text)], "text does not start: Permission denied"),
        ([*there, "--python", str(fails)], "escaip_v1 does not run in"),
        ([*there, "--python", str(fails)], "fails: last"),
        ([*there, "--python", str(talks)], "talks: no output"),
        ([*there, "--python", str(fails), "--kind", "conservative"], "direct forces only"),
        ([*there, "--python", str(fails), "--precision", "bf16"], "on CPUs in fp32 only"),
        (["--measure", "train"], "escaip_v1 is measured alone, without --measure"),
        (["--peers", "escaip_v1,mace"], "escaip_v1 is measured alone, without --measure"),
    ]:
        command = ["bench", "peers", "--peers", authors.NAME, *OPTIONS, "--atoms", "30"]
        assert main([*command, *argv]) == 2, argv
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("escaip: error: "), argv
        assert message in line, argv
    assert time.monotonic() - begin < 30, "a program was waited for"


# the worker, with a model of one weight in place of theirs

MODEL = """
import torch
from torch import nn

class EScAIPBackbone(nn.Module):
    def __init__(self, **config):
        super().__init__()
        print("a line of their own", config)
        torch.set_float32_matmul_precision("high")
        self.norm = nn.Parameter(torch.ones(3))

    def forward(self, positions):
        assert not self.training and not torch.is_grad_enabled()
        return positions * self.norm

class Head(nn.Module):
    def __init__(self, backbone):
        super().__init__()

class EScAIPEnergyHead(Head):
    def forward(self, positions, embedding):
        exact = torch.get_float32_matmul_precision() == "highest"
        return {"energy": torch.full((1, 1), float(exact))}

class EScAIPDirectForceHead(Head):
    def forward(self, positions, embedding):
        return {"forces": embedding}
"""
GRAPHS = """
import torch

class AtomsToGraphs:
    def __init__(self, r_edges, r_pbc):
        self.convert = lambda atoms: torch.tensor(atoms.positions, dtype=torch.float32)
"""
COLLATER = "import torch\ndata_list_collater = lambda graphs, otf_graph: torch.cat(graphs)\n"


def test_worker(tmp_path):
    files = {
        "src/EScAIP.py": MODEL,
        "config.yml": "model: {backbone: {model: m, hidden_size: 512, activation: gelu}}",
        "fairchem/__init__.py": "",
        "fairchem/core/preprocessing.py": GRAPHS,
        "fairchem/core/datasets.py": COLLATER,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    task = {
        "folder": str(tmp_path),
        "config": "config.yml",
        "changes": {"hidden_size": 64},
        "perturbation": 0.02,
        "threads": 1,
        "structures": [{"numbers": [1, 8], "positions": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]}],
    }
    (tmp_path / "task.json").write_text(json.dumps(task))
    command = [sys.executable, authors_worker.__file__, tmp_path / "task.json", tmp_path / "answer"]
    done = subprocess.run(command, input="\n\n", capture_output=True, text=True, check=True)
    assert len([float(line) for line in done.stdout.splitlines()]) == 2
    assert "a line of their own {'hidden_size': 64, 'activation': 'gelu'}" in done.stderr
    answer = torch.load(tmp_path / "answer", weights_only=True)
    assert list(answer["weights"]) == ["backbone/norm"]
    norm = answer["weights"]["backbone/norm"]
    assert 0 < (norm - 1).abs().min() < (norm - 1).abs().max() < 0.1
    assert answer["energy"].tolist() == [1.0]
    assert torch.equal(answer["forces"], torch.tensor(task["structures"][0]["positions"]) * norm)


def test_the_worker_needs_nothing_of_this_package():
    assert "escaip_fairchem" not in Path(authors_worker.__file__).read_text()
