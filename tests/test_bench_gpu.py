"""``escaip bench gpu`` in a tiny form on a CPU; no speed is asserted."""

from __future__ import annotations

import csv
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from escaip_fairchem.bench import gpu, stages
from escaip_fairchem.bench.headlines import headlines
from escaip_fairchem.bench.pair import batch_of, own_model
from escaip_fairchem.bench.report import Report, Row
from escaip_fairchem.bench.settings import Settings
from escaip_fairchem.bench.structures import solid
from escaip_fairchem.cli import main
from escaip_fairchem.compiled import Compiled

if TYPE_CHECKING:
    from pathlib import Path

TINY = Settings(hidden=64, layers=1, repeats=1, domain="crystals", seed=5)


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    """Compilation ends with the graph, which is what takes seconds instead of minutes."""
    monkeypatch.setattr("escaip_fairchem.backbone.Compiled", partial(Compiled, "eager"))


def test_flags_choose_the_form_and_are_written_down(tmp_path: Path):
    pytest.importorskip("triton")
    out = tmp_path / "rows.csv"
    argv = ["--hidden", "64", "--layers", "1", "--repeats", "1", "--atoms", "8", "--seed", "5"]
    argv += ["--domain", "crystals", "--kernels", "triton", "--compile", "--out", str(out)]
    assert main(["bench", "forward", *argv]) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["config"] for row in rows] == ["v2 H64 L1 K30 triton compiled"] * 2


def test_a_form_that_fails_is_named_and_the_others_are_measured(monkeypatch, capsys):
    forms = ({"kernels": "torch"}, {"kernels": "none"}, {"kernels": "torch", "compile": True})
    monkeypatch.setattr(gpu, "FORMS", forms)
    report = Report("gpu", None)
    gpu.every_form(TINY, report, {"forward": 8}, 8, 1)
    printed = capsys.readouterr().out
    assert "forward, not measured: UserError: ESCAIP_KERNELS=none is not one of" in printed
    assert "md, not measured: UserError: ESCAIP_KERNELS=none is not one of" in printed
    forms = [row.common["config"] for row in report.rows if row.quantity == "forward"]
    assert forms == ["v2 H64 L1 K30"] * 2 + ["v2 H64 L1 K30 compiled"] * 2
    # bare models twice, and the calculator
    assert [row.quantity for row in report.rows].count("md step") == 2 * 3


def test_large_systems_stop_before_memory_ends(monkeypatch, capsys):
    report = Report("gpu", None)
    gpu.large_system(TINY, report, [4, 32], 4, limit=1e-3)
    assert "ours stops: 32 atoms would take about" in capsys.readouterr().out
    assert {row.atoms for row in report.rows} == {4}
    assert {row.quantity for row in report.rows} == {"forward", "peak of inference"}
    assert "v2 H64 L1 K30 inference_chunk=4 triton" in {r.common["config"] for r in report.rows}


def test_stages_have_times_and_floors():
    report = Report("gpu", None)
    stages.run(TINY, report)
    quantities = [row.quantity for row in report.rows]
    for stage in stages.STAGES:
        assert quantities.count(f"stage {stage}") == 1
        assert quantities.count(f"stage {stage}, of its floor") == 1
    assert all(row.min > 0 for row in report.rows)


def test_operations_are_those_that_torch_counts():
    model = own_model(TINY.config()).eval()
    batch = batch_of([solid(8)])
    with torch.no_grad():
        graph = model.backbone(batch.clone())["graph"]
        with FlopCounterMode(display=False) as counter:
            model(batch.clone())
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    needs = stages.work(model.backbone, graph, 4)
    ffns = [counts[f"EScAIP.backbone.blocks.0.{name}_ffn"] for name in ("node", "edge")]
    assert needs["FFN"].operations == sum(ffns)
    heads = [counts[f"EScAIP.output_heads.{name}"] for name in ("energy", "forces")]
    assert needs["heads"].operations == sum(heads)


def test_time_of_calls_inside_is_not_counted_twice(monkeypatch):
    watch, now = stages.Stopwatch(torch.device("cpu")), [0.0]
    monkeypatch.setattr(watch, "_now", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    inner = watch.timed("attention", wait)

    def outer() -> None:
        wait(1.0)
        inner(10.0)
        inner(20.0)

    watch.timed("attention GEMMs", outer)()
    found = watch.seconds()
    assert (found["attention GEMMs"], found["attention"]) == (1.0, 30.0)
    assert not any(watch.seconds().values())


def test_headlines_by_hand():
    def row(quantity: str, atoms: int, milliseconds: float, config: str, model: str = "ours"):
        common = {"config": config, "kind": "direct", "precision": "bf16"}
        times = dict.fromkeys(("min", "median", "max"), milliseconds)
        return Row(model, quantity, "ms", 1, atoms, **times, repeats=1, common=common)

    rows = [
        row("forward", 4000, 10.0, "v2 H256 L4 K30"),
        row("forward", 4000, 5.0, "v2 H256 L4 K30 triton"),
        row("forward", 4000, 1.0, "v2 H256 L4 K30", model="built-in"),
        row("forward", 4000, 20.0, "v2 H512 L10 K30"),
        row("train", 800, 20.0, "v2 H512 L10 K30"),
        row("md step", 1008, 4.0, "v2 H256 L4 K30 triton compiled", model="ours, calculator"),
        row("md step", 108, 2.0, "v2 H256 L4 K30"),
    ]
    assert headlines(rows, 1000) == [
        "800,000 atoms per second, v2 H256 L4 K30 triton, direct, bf16",
        "5 microseconds per atom, v2 H512 L10 K30, direct, bf16",
        "250 MD steps per second, 1008 atoms, v2 H256 L4 K30 triton compiled, direct, bf16",
        "1.01 hours per epoch of OC20-2M (73 atoms each), v2 H512 L10 K30, direct, bf16",
    ]
