"""``escaip bench``: what it refuses, what it counts, what it writes; no speed is asserted."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.io import write
from torch import nn

from escaip_fairchem import UserError
from escaip_fairchem.bench import gpu, measure, others, peer_worker, peers, sweep
from escaip_fairchem.bench.compare import BUILTIN, OURS, Comparison
from escaip_fairchem.bench.graph import _builtin_gib
from escaip_fairchem.bench.pair import model_pair
from escaip_fairchem.bench.report import COLUMNS, Report
from escaip_fairchem.bench.settings import Settings
from escaip_fairchem.bench.structures import (
    DOMAINS,
    batch_by_atoms,
    batch_by_systems,
    from_file,
    solid,
)
from escaip_fairchem.cli import main
from helpers import executable

#: One small layer, one turn.
TINY = ["--hidden", "64", "--layers", "1", "--repeats", "1"]
CPU = torch.device("cpu")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# structures


@pytest.mark.parametrize(
    "domain, sizes", [("slabs", (60, 89)), ("molecules", (22, 50)), ("crystals", (8, 144))]
)
def test_structures_are_those_of_their_seed(domain, sizes):
    make = DOMAINS[domain]
    for seed in range(8):
        first, again, other = make(seed), make(seed), make(seed + 100)
        np.testing.assert_array_equal(first.positions, again.positions)
        assert first.symbols.get_chemical_formula() == again.symbols.get_chemical_formula()
        assert len(first) != len(other) or not np.allclose(first.positions, other.positions)
        assert sizes[0] <= len(first) <= sizes[1]
        distances = first.get_all_distances(mic=True)
        np.fill_diagonal(distances, np.inf)
        assert distances.min() > 0.7
        assert first.pbc.all() == (domain != "molecules")


def test_batches_have_the_size_asked_for():
    assert len(batch_by_systems("crystals", 3, seed=2)) == 3
    for atoms in (1, 150, 500):
        total = sum(map(len, batch_by_atoms("molecules", atoms)))
        assert abs(total - atoms) <= 25 or total < 50
    assert [len(solid(size)) for size in (4, 100, 1000)] == [4, 108, 1008]


# what is measured


def test_saved_bytes_against_a_count_by_hand():
    """A linear map saves its input, tanh its output, a product both factors; each once."""
    layer = nn.Linear(8, 4, bias=False)
    x = torch.randn(16, 8, requires_grad=True)
    assert measure.saved_bytes(lambda: layer(x), layer) == 4 * 16 * 8
    assert measure.saved_bytes(lambda: layer(x).tanh(), layer) == 4 * (16 * 8 + 16 * 4)

    def product():
        y = layer(x)
        return y.tanh() * y.exp()  # both outputs, each saved twice

    assert measure.saved_bytes(product, layer) == 4 * (16 * 8 + 2 * 16 * 4)
    with torch.no_grad():
        assert measure.saved_bytes(lambda: layer(x).tanh(), layer) == 0

    def dropped():
        layer(x).tanh()  # gone at the end, but for the input, which the result saves too
        return layer(x)

    assert measure.saved_bytes(dropped, layer) == 4 * 16 * 8


def test_peak_bytes_against_a_count_by_hand():
    def two_at_once():
        a = torch.zeros(1000, 1000)
        b = a + 1
        del a
        return b + 1

    peak = measure.peak_bytes(two_at_once, CPU)
    assert 8e6 <= peak < 8.1e6


def test_interleaved_measures_each_call_on_its_own_argument():
    seen = []
    calls = {name: measure.Call(object, lambda x, n=name: seen.append((n, x))) for name in "ab"}
    spreads = measure.interleaved(calls, 3, CPU)
    assert [name for name, _ in seen] == ["a", "b"] * 4
    assert len({id(x) for _, x in seen}) == len(seen)
    assert spreads["a"].repeats == 3
    assert spreads["a"].min <= spreads["a"].median <= spreads["a"].max


def test_differences_and_their_refusal():
    ones = {"energy": torch.ones(3)}
    off = {"energy": torch.tensor([1.0, 1.0, 1.1])}
    assert measure.differences(ones, off)["energy"] == pytest.approx(0.1)
    measure.refuse_if_different({"energy": 1e-5})
    for bad in (off, {"energy": torch.tensor([1.0, 1.0, torch.nan])}):
        with pytest.raises(UserError, match="the models differ: energy"):
            measure.refuse_if_different(measure.differences(ones, bad))


def test_attention_switches_and_precision_are_put_back():
    before = torch.backends.cuda.flash_sdp_enabled()
    with measure.kept_attention_switches():
        torch.backends.cuda.enable_flash_sdp(not before)
    assert torch.backends.cuda.flash_sdp_enabled() == before
    numerics = torch.get_float32_matmul_precision()
    with measure.precision("tf32", CPU):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == numerics


def test_memory_is_extrapolated_from_the_last_two_sizes():
    past = [(100, 100 * 2 + 100**2 * 3), (300, 300 * 2 + 300**2 * 3)]
    assert sweep.expected_memory(past, 1000) == pytest.approx(1000 * 2 + 1000**2 * 3)
    assert sweep.expected_memory(past[:1], 200) == pytest.approx(2 * past[0][1])
    assert sweep.expected_memory([], 1000) == 0.0
    assert _builtin_gib(solid(10000)) > 100 > 1 > _builtin_gib(solid(100))


# the comparison


def test_no_speed_where_a_weight_differs():
    settings = Settings(hidden=64, layers=1, repeats=1, domain="molecules")
    comparison = Comparison(settings)
    atoms = [DOMAINS["molecules"](0)]
    assert max(comparison.errors(atoms).values()) < 1e-5
    with torch.no_grad():
        next(p for n, p in comparison.models[OURS].named_parameters() if "ffn" in n).mul_(1.5)
    for quantity in ("forward", "train", "saved for backward"):
        with pytest.raises(UserError, match="a speed would mean nothing"):
            comparison.rows((quantity,), atoms)


def test_no_speed_is_printed_or_written_where_models_differ(tmp_path, capsys, monkeypatch):
    def spoilt(config, seed=0, **keys):
        pair = model_pair(config, seed, **keys)
        with torch.no_grad():
            next(iter(pair[1].output_heads.energy.parameters())).mul_(1.5)
        return pair

    monkeypatch.setattr("escaip_fairchem.bench.compare.model_pair", spoilt)
    out = tmp_path / "rows.csv"
    argv = ["bench", "forward", *TINY, "--atoms", "30", "--domain", "molecules", "--out", str(out)]
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert " ms" not in printed.out
    assert "escaip: error: the models differ" in printed.err
    assert not out.exists()


def test_a_row_of_each_model_in_one_table(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    for command, kind in (("train", "direct"), ("memory", "conservative")):
        argv = ["bench", command, *TINY, "--atoms", "8", "--domain", "crystals", "--seed", "5"]
        assert main([*argv, "--kind", kind, "--out", str(out)]) == 0
    found = rows_of(out)
    assert list(found[0]) == list(COLUMNS)
    assert [row["model"] for row in found] == [BUILTIN, OURS] * 4
    assert [row["command"] for row in found] == ["train"] * 2 + ["memory"] * 6
    for row in found:
        assert float(row["min"]) > 0
        assert bool(row["ratio"]) == (row["model"] == OURS)
        assert row["config"] == "v2 H64 L1 K30"
        assert row["kind"] == {"train": "direct", "memory": "conservative"}[row["command"]]
        assert row["hardware"]
        assert row["torch"] == torch.__version__
    assert "saved for backward, MiB" in capsys.readouterr().out


def test_sweep_writes_rows_and_a_figure(tmp_path, capsys):
    out = tmp_path / "sweep.csv"
    argv = ["bench", "forward", *TINY, "--domain", "crystals", "--sweep-batch", "1"]
    assert main([*argv, "--seed", "5", "--batches", "1", "--out", str(out)]) == 0
    assert [row["quantity"] for row in rows_of(out)] == ["forward"] * 2 + ["peak of inference"] * 2
    figure = tmp_path / "sweep.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert str(figure) in capsys.readouterr().out


def test_the_builtin_stops_where_memory_ends(tmp_path, capsys):
    out = tmp_path / "sizes.csv"
    argv = ["bench", "forward", *TINY, "--sweep-atoms", "8,16,108", "--max-memory", "0.04"]
    assert main([*argv, "--out", str(out)]) == 0
    assert "built-in stops: 108 atoms would take" in capsys.readouterr().out
    largest = [row for row in rows_of(out) if row["atoms"] == "108"]
    assert {row["model"] for row in largest} == {OURS}


def test_graph_agrees_and_is_timed(tmp_path):
    out = tmp_path / "graph.csv"
    argv = ["bench", "graph", "--sizes", "32", "--repeats", "1", "--search", "fairchem"]
    assert main([*argv, "--out", str(out)]) == 0
    assert [row["model"] for row in rows_of(out)] == [BUILTIN, "ours fairchem", "ours fairchem"]


def test_dynamics_runs_through_the_calculator(tmp_path):
    out = tmp_path / "md.csv"
    argv = ["bench", "md", *TINY, "--sizes", "8,32", "--steps", "1", "--out", str(out)]
    assert main([*argv, "--peers", "esen_K2L2", "--neighbors", "12", "--fits", "1"]) == 0
    rows = rows_of(out)
    steps = [row["model"] for row in rows if row["quantity"] == "md step"]
    bare = [f"{name}, bare model" for name in (BUILTIN, OURS, "eSEN K2L2 12")]
    assert steps == 2 * [*bare, "ours, calculator"]
    peaks = {
        (row["model"], int(row["atoms"])): float(row["max"])
        for row in rows
        if row["quantity"] == "peak of inference"
    }
    sizes = sorted({atoms for _, atoms in peaks})
    for row in rows[-3:]:
        small, large = (peaks[row["model"], size] for size in sizes)
        # of a n + b n^2 through the two
        square = max(0, (large / sizes[1] - small / sizes[0]) / (sizes[1] - sizes[0]))
        linear, fit = large / sizes[1] - square * sizes[1], float(row["max"])
        assert linear * fit + square * fit**2 == pytest.approx(1024, rel=0.1)  # rounded rows


def test_what_runs_on_a_gpu_runs_on_a_cpu():
    """The loop of ``escaip bench gpu``; a failure of one measurement does not end it."""
    report = Report("gpu", None)
    settings = Settings(hidden=64, layers=1, repeats=1, domain="crystals", seed=5, precision="bf16")
    gpu.one_model(settings, report, {"forward": 8}, 8, 1)
    assert [row.quantity for row in report.rows] == ["forward"] * 2 + ["md step"] * 3
    gpu.one_model(settings, report, {"forward": 8}, 1, 1)  # no crystal of one atom
    assert len(report.rows) == 7


def test_peers_of_the_installed_fairchem(tmp_path, capsys):
    out = tmp_path / "peers.csv"
    argv = ["bench", "peers", *TINY, "--atoms", "30", "--domain", "molecules", "--out", str(out)]
    assert main([*argv, "--peers", "esen_K2L2", "--max-neighbors", "30"]) == 0
    assert [row["model"] for row in rows_of(out)] == [OURS, "eSEN K2L2 30", "EMT"]
    assert main(["bench", "peers", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*others.OTHERS, "esen_K10L4"))


def test_the_worker_of_other_environments_needs_nothing_of_this_package():
    text = Path(peer_worker.__file__).read_text()
    assert "escaip" not in text.lower()
    assert set(peer_worker.FAIRCHEM_1) | {"mace", "lammps"} == set(others.OTHERS)


@pytest.mark.parametrize("name, measure", [("escn", "memory"), ("lammps", "forward")])
def test_peers_of_another_environment(name, measure, tmp_path):
    """A program in place of Python keeps the task and gives a ready answer."""
    answer = {"config": "c", "kind": "direct", "parameters": 1, "versions": "v"}
    answer["values"] = {"memory": [2**30], "forward": [0.5, 0.25]}[measure]
    (tmp_path / "ready").write_text(json.dumps(answer))
    program = f'#!/bin/sh\ncp "$2" "{tmp_path}/task"\ncp "{tmp_path}/ready" "$3"\n'
    python, out = executable(tmp_path / "python", program), tmp_path / "rows.csv"
    argv = ["bench", "peers", *TINY, "--atoms", "30", "--domain", "molecules", "--peers", name]
    assert main([*argv, "--python", str(python), "--measure", measure, "--out", str(out)]) == 0
    task, rows = json.loads((tmp_path / "task").read_text()), rows_of(out)
    quantity, largest = {
        "memory": ("peak of inference", "1024"),
        "forward": ("forward", "500"),
    }[measure]
    (ours,) = (r for r in rows if r["model"] == OURS and r["quantity"] == quantity)
    theirs = rows[-1]
    assert (theirs["model"], theirs["quantity"], theirs["max"]) == (name, quantity, largest)
    ratio = float(ours["min"]) / float(theirs["min"])
    assert float(theirs["ratio"]) == pytest.approx(ratio, rel=1e-3)
    assert (task["model"], task["quantity"]) == (name, quantity)
    elements = {number for atoms in task["structures"] for number in atoms["numbers"]}
    assert (elements <= {29, 79}) == (name == "lammps")
    assert theirs["domain"] == ("solid" if name == "lammps" else "molecules")


def test_kernels_of_a_comparison_with_peers(monkeypatch):
    seen = []

    def pair(config, **keys):
        seen.append((os.environ["ESCAIP_KERNELS"], keys["checkpointing"]))
        raise UserError("enough")

    monkeypatch.setattr(peers, "model_pair", pair)
    monkeypatch.setenv("ESCAIP_KERNELS", "torch")
    assert main(["bench", "peers", *TINY, "--kernels", "triton"]) == 2
    assert seen == [("triton", "pointwise")]


# mistakes


def test_mistakes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    table = tmp_path / "other.csv"
    table.write_text("a,b\n1,2\n")
    empty = tmp_path / "empty.xyz"
    empty.write_text("nothing\n")
    other = ["--python", str(empty)]
    for argv, message in [
        (["gpu"], "torch finds no CUDA device here"),
        (["forward", "--device", "cuda"], "--device cuda: torch finds no CUDA device"),
        (["forward", "--precision", "tf32"], "--precision tf32 exists on GPUs only"),
        (["forward", "--hidden", "100"], "--hidden is 100; give a multiple of 64"),
        (["forward", "--repeats", "0"], "--repeats is 0; give a positive number"),
        (["forward", "--stress"], "--stress needs --kind conservative"),
        (["train", "--out", str(table)], "has other columns; name another file"),
        (["train", "--out", str(tmp_path / "no" / "a.csv")], "does not exist"),
        (["memory", "--sweep-batch", "1,x"], "--sweep-batch: '1,x'; give positive whole numbers"),
        (["forward", "--sweep-batch", "--batches", "0"], "--batches is 0"),
        (["forward", "--structures", str(tmp_path / "a.xyz")], "no structures at"),
        (["forward", "--structures", str(empty)], "ASE cannot read"),
        (["graph", "--search", "kd-tree"], "--search: 'kd-tree' is not one of"),
        (["md", "--steps", "0"], "--steps is 0"),
        (["peers", "--peers", "esen_K9"], "no peer 'K9'"),
        (["peers", "--peers", "mace"], "mace: give --python; see escaip bench peers --list"),
        (["peers", "--python", str(tmp_path / "python")], "--python: no file"),
        (["peers", *other, "--peers", "escn", "--measure", "train"], "escn: --measure forward or"),
        (
            ["peers", *other, "--peers", "lammps", "--measure", "memory"],
            "lammps: --measure forward",
        ),
        (["peers", *TINY, *other, "--peers", "escn"], "empty.xyz does not start"),
    ]:
        assert main(["bench", *argv]) == 2, argv
        lines = capsys.readouterr().err.splitlines()
        assert message in lines[-1], argv
        assert lines[-1].startswith("escaip: error: ")


def test_structures_of_a_file(tmp_path):
    write(tmp_path / "two.xyz", [molecule("H2O"), molecule("CH4")])
    assert [len(atoms) for atoms in from_file(tmp_path / "two.xyz", ":")] == [3, 5]
    assert [len(atoms) for atoms in from_file(tmp_path / "two.xyz", "1")] == [5]


def test_settings_reach_the_models():
    settings = dataclasses.replace(Settings(), neighbors=20, domain="molecules")
    config = settings.config()
    assert (config["knn_k"], config["knn_pad_size"], config["use_pbc"]) == (20, 30, False)
    assert Settings().config()["knn_pad_size"] == 45
    assert Report("forward", None).rows == []
