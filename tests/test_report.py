"""`escaip report`: pages of made-up runs, read back by the standard library's HTML parser."""

from __future__ import annotations

import csv
import json
import random
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from escaip_fairchem.cli import main
from escaip_fairchem.report.curves import thinned
from escaip_fairchem.report.differences import differences, flat

if TYPE_CHECKING:
    from pathlib import Path

EVIL = "<img src=x onerror=alert(1)>&amp;\"'"
VOID = {"meta", "link", "img", "input", "wbr", "br", "base"}


class Page(HTMLParser):
    """Tags of a page, the text in it, and its tables as {title: {row: {column: cell}}}."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.tables: dict[str, list[list[dict[str, Any]]]] = {}
        self._title = ""
        self._cell: dict[str, Any] | None = None
        self.feed(text)
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h2", "h3"):
            self._title = ""
        elif tag == "table":
            self.tables.setdefault(self._title.strip(), [])
        elif tag == "tr":
            self.tables[self._title.strip()].append([])
        elif tag in ("th", "td"):
            self._cell = {"text": "", "values": [], "class": (given.get("class") or "").split()}
            self.tables[self._title.strip()][-1].append(self._cell)
        elif tag == "data" and self._cell is not None:
            self._cell["values"].append(float(given["value"]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("th", "td"):
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            return
        self.text += data
        if self.open[-1:] in (["h2"], ["h3"]):
            self._title += data
        if self._cell is not None:
            self._cell["text"] += data

    def cells(self, title: str) -> dict[str, dict[str, dict[str, Any]]]:
        """A table by the names of its rows and columns."""
        header, *rows = self.tables[title]
        columns = [cell["text"].strip() for cell in header]
        return {
            row[0]["text"].strip(): dict(zip(columns[1:], row[1:], strict=True)) for row in rows
        }


def make_run(folder: Path, *, seed: int = 0, name: str = "r", lr: Any = 1e-3) -> Path:
    """Folder of a finished run, with all files that a report reads."""
    from PIL import Image

    draw = random.Random(seed).random
    folder.mkdir(parents=True)
    rows = [
        {"step": 10 * n, "epoch": n // 4, "lr": 1e-3, "wall_time_s": 7.5 * n, "samples": 40 * n}
        | {"train_loss": 3 + draw(), "val_loss": 2 + draw(), "val_forces_mae": 0.1 + 0.2 * draw()}
        for n in range(1, 9)
    ]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    forces = [row["val_forces_mae"] for row in rows]
    summary = {
        "run": str(folder), "checkpoint": None, "steps": 80, "epochs": 2.0, "wall_time_s": 60.0,
        "steps_per_s": draw(), "atoms_per_s": 1000 * draw(), "parameters": 390626, "ranks": 2,
        "device": "NVIDIA H100", "peak_memory_GiB": draw(), "versions": {"torch": "2.13.0"},
        "metrics": {
            "val_forces_mae": {
                "last": forces[-1], "best": min(forces), "unit": "eV/A", "baseline": 0.36717121306,
                "best_step": rows[forces.index(min(forces))]["step"],
            }
        },
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "status.json").write_text(
        json.dumps({"state": "finished", "step": 80, "total_steps": 80, "epoch": 2.0})
    )
    task = {"name": "energy", "loss_fn": {"coefficient": 4}}
    config = {
        "job": {"run_name": name, "timestamp_id": str(seed), "seed": 0},
        "runner": {
            "eval_dataloader": {"dataset": {"src": "a/val"}, "collate_fn": {"tasks": [task]}},
            "train_eval_unit": {"tasks": [task], "optimizer_fn": {"lr": lr}},
        },
    }
    (folder / "canonical_config.yaml").write_text(yaml.safe_dump(config))
    Image.new("RGB", (40, 30), "white").save(folder / "parity.png")
    (folder / "errors_by_element.csv").write_text(
        "element,structures,atoms,free_atoms,force_mae_eV_per_A,force_zero_eV_per_A,"
        f"energy_mae_eV_per_atom,energy_reference_eV_per_atom\r\nCu,5,20,10,{draw()},0.5,0.1,0.2\r\n"
        "Xe,1,1,0,,,0.3,0.4\r\n"
    )
    return folder


def make_evaluation(folder: Path) -> Path:
    """Folder of an evaluation of two splits, with subsets."""
    folder.mkdir(parents=True)
    metric = {"value": 0.123456789, "baseline": 0.36717, "unit": "eV/A", "count": 30, "of": "x"}
    nan = {"value": None, "baseline": None, "unit": "", "count": 30, "of": "x"}
    counts = {"structures": 10, "atoms": 1234, "free_atoms": 10, "not_finite": 1}
    split = {
        "counts": counts, "metrics": {"forces_mae": metric, "forces_cosine_similarity": nan},
        "by_subset": {EVIL: {"forces_mae": {**metric, "value": 7.25}}},
        "by_element": [{"element": "Au", "free_atoms": 3, "force_mae_eV_per_A": 0.25,
                        "force_zero_eV_per_A": 0.5, "structures": 2}],
    }  # fmt: skip
    content = {
        "checkpoint": "c.pt", "forces_on": "free atoms", "baseline": "zero",
        "splits": {"id": split, "ood": split}, "average": {"forces_mae": metric},
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(content))
    return folder


def report(*folders: Path, options: tuple[str, ...] = ()) -> str:
    """The text of the page that the command writes."""
    out = folders[0].parent / "page.html"
    assert main(["report", *map(str, folders), "--out", str(out), *options]) == 0
    return out.read_text()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder of two runs, one of an unfriendly name, and an evaluation; their page."""
    folder = tmp_path_factory.mktemp("two")
    make_run(folder / "runs" / "first", seed=1)
    make_run(folder / "runs" / EVIL, seed=2, name=EVIL, lr=f"</td><script>{EVIL}</script>")
    status = {"state": "failed", "step": 80, "reason": f"</small><script>alert(2)</script>{EVIL}"}
    (folder / "runs" / EVIL / "status.json").write_text(json.dumps(status))
    make_evaluation(folder / "evaluations" / "e1")
    return folder, report(folder / "runs", folder / "evaluations")


def test_numbers_are_those_of_the_files(two: tuple[Path, str]) -> None:
    folder, text = two
    page = Page(text)
    runs = page.cells("Runs")
    metrics = page.cells("Metrics of the validation")
    speed = page.cells("Speed and memory")
    for name in ("first", EVIL):
        summary = json.loads((folder / "runs" / name / "summary.json").read_text())
        forces = summary["metrics"]["val_forces_mae"]
        cell = metrics[name]["val_forces_mae, eV/A"]
        notes = [] if forces["best"] == forces["last"] else [forces["best"]]
        ratio = forces["last"] / forces["baseline"]
        assert cell["values"] == [forces["last"], *notes, pytest.approx(ratio)]
        assert float(cell["text"].split()[0]) == pytest.approx(forces["last"], rel=1e-3)
        assert runs[name]["steps"]["values"][0] == 80
        assert runs[name]["samples"]["values"] == [320]
        assert runs[name]["time, s"]["values"] == [60]
        for title, key in (("steps/s", "steps_per_s"), ("atoms/s", "atoms_per_s"),
                           ("peak memory, GiB", "peak_memory_GiB")):  # fmt: skip
            assert speed[name][title]["values"] == [summary[key]]
        with (folder / "runs" / name / "errors_by_element.csv").open() as file:
            copper, xenon = csv.DictReader(file)
        table = page.cells("force MAE by element, eV/A")
        assert table["Cu"][name]["values"] == [float(copper["force_mae_eV_per_A"])]
        assert xenon["force_mae_eV_per_A"] == ""
        assert table["Xe"][name]["text"].strip() == "\N{EN DASH}"
    assert metrics["baseline"]["val_forces_mae, eV/A"]["values"] == [0.36717121306]
    forces = {name: row["val_forces_mae, eV/A"] for name, row in metrics.items()}
    lowest = min(("first", EVIL), key=lambda name: forces[name]["values"][0])
    assert [name for name in forces if "best" in forces[name]["class"]] == [lowest]
    evaluated = page.cells("Evaluations")
    assert evaluated["e1: id"]["forces_mae, eV/A"]["values"] == [0.123456789, 0.36717]
    assert evaluated["e1: id"]["atoms"]["values"] == [1234]
    assert "nan" in evaluated["e1: ood"]["forces_cosine_similarity"]["text"]
    assert page.cells("By subset")[f"e1: id: {EVIL}"]["forces_mae, eV/A"]["values"][0] == 7.25


def test_nothing_outside_is_needed_or_run(two: tuple[Path, str]) -> None:
    page = Page(two[1])
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert "http" not in re.sub(r'http-equiv|base64,[^"]*', "", two[1])
    assert "@import" not in two[1]
    images = 0
    for tag, given in page.tags:
        assert not any(name.startswith("on") for name in given)
        for name, value in given.items():
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                images += tag == "img"
                assert value.startswith("data:image/png;base64," if tag == "img" else "#"), tag
            assert "url(" not in (value or "") or re.fullmatch(r"url\(#\w+\)", value)
    assert images == 2
    (policy,) = (given["content"] for _, given in page.tags if "http-equiv" in given)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_names_and_values_are_text(two: tuple[Path, str]) -> None:
    """What would be HTML in a name, a setting, a reason, stands there as it was given."""
    page = Page(two[1])
    assert EVIL in page.cells("Runs")
    row = page.cells("Differences of configuration")["runner.train_eval_unit.optimizer_fn.lr"]
    assert row[EVIL]["text"].strip() == f"</td><script>{EVIL}</script>"
    assert f"</small><script>alert(2)</script>{EVIL}" in page.cells("Runs")[EVIL]["state"]["text"]


def test_only_what_differs(two: tuple[Path, str]) -> None:
    assert list(Page(two[1]).cells("Differences of configuration")) == [
        "runner.train_eval_unit.optimizer_fn.lr"
    ]
    task = {"name": "forces", "loss_fn": {"coefficient": 1}}
    first = flat({"tasks": [{"name": "energy", "w": 1}, task], "a": {"b": [1, 2]}, "c": "1"})
    second = flat({"tasks": [task, {"name": "energy", "w": 2}], "a": {"b": [1, 3]}, "c": 1})
    assert differences([first, None, second]) == {
        "tasks.energy.w": ["1", None, "2"],
        "a.b": ["[1, 2]", None, "[1, 3]"],
        "c": ['"1"', None, "1"],
    }


def test_curves_are_those_of_metrics_csv(two: tuple[Path, str]) -> None:
    """Distances in the figure are in proportion to those of the values."""
    folder, text = two
    with (folder / "runs" / "first" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for axis in ("step", "samples", "wall_time_s"):
        panels = text.partition(f'<div class="panels {axis}">')[2]
        figure = panels[panels.index('aria-label="force MAE, eV/A"') :]
        number = sorted(["first", EVIL]).index("first")
        line = re.search(rf'<g class="run-{number}">.*?d="([^"]*)"', figure)[1]
        drawn = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", line)]
        given = [(float(row[axis]), float(row["val_forces_mae"])) for row in rows]
        assert len(drawn) == len(given) == 8
        for place, sign in ((0, 1), (1, -1)):  # an SVG's y goes down
            (low, high) = (choose(point[place] for point in given) for choose in (min, max))
            ends = [choose(point[place] for point in drawn) for choose in (min, max)][::sign]
            for inside, value in zip(drawn, given, strict=True):
                part = (inside[place] - ends[0]) / (ends[1] - ends[0])
                assert part == pytest.approx((value[place] - low) / (high - low), abs=1e-3)


def test_long_curves_keep_their_extremes() -> None:
    draw = random.Random(3).random
    points = [(float(x), draw()) for x in range(5000)]
    points[1234] = (1234.0, 50.0)
    points[4321] = (4321.0, -50.0)
    kept = thinned(points, 100)
    assert len(kept) <= 100
    assert {points[0], points[1234], points[4321], points[-1]} <= set(kept)
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    assert thinned(points[:100], 100) == points[:100]


def spoil(path: Path, how: str) -> None:
    """Damage a file: cut it, or put in what is of another kind."""
    content = path.read_bytes()
    path.write_bytes(
        {"cut": content[: 2 * len(content) // 3], "list": b"[1, 2]", "binary": bytes(range(256)),
         "empty": b""}[how]
    )  # fmt: skip


DAMAGE = [
    *((name, how) for name in ("summary.json", "status.json") for how in ("cut", "list", "binary")),
    *(("metrics.csv", how) for how in ("cut", "binary", "empty")),
    *(("canonical_config.yaml", how) for how in ("list", "binary")),
    *(("parity.png", how) for how in ("cut", "binary", "empty")),
    *(("errors_by_element.csv", how) for how in ("cut", "binary")),
]


def test_damaged_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each in a run of its own, beside one that is whole."""
    make_run(tmp_path / "runs" / "whole", seed=3)
    spoiled = []
    for name, how in DAMAGE:
        run = make_run(tmp_path / "runs" / f"{name}_{how}", seed=3)
        spoil(run / name, how)
        spoiled.append(run / name)
    whole = json.loads((tmp_path / "runs/whole/summary.json").read_text())
    page = Page(report(tmp_path / "runs"))
    said = capsys.readouterr().err
    for path in spoiled:
        assert str(path) in page.text, path
        assert str(path) in said, path
    assert "/whole/" not in said
    metrics = page.cells("Metrics of the validation")
    last = whole["metrics"]["val_forces_mae"]["last"]
    for name in ["whole", *(f"{name}_{how}" for name, how in DAMAGE)]:
        if "metrics.csv_" not in name:
            assert metrics[name]["val_forces_mae, eV/A"]["values"][0] == last, name
    assert page.cells("Runs")["metrics.csv_cut"]["samples"]["values"] == [200]


def test_values_of_the_wrong_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"steps": [1], "versions": 3, "metrics": {"a": 1, "b": {"last": "x"}}}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "status.json").write_text('{"state": 7, "step": "many", "reason": ["x"]}')
    evaluation = make_evaluation(tmp_path / "e")
    (evaluation / "metrics.json").write_text(
        '{"splits": {"id": {"metrics": {"x": {"value": []}}}}}'
    )
    page = Page(report(run, evaluation))
    said = capsys.readouterr().err
    for part in ("a is no metric", "b is no metric", "step is no number", "id has no metrics"):
        assert part in said
        assert part in page.text


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "bare")
    for name in ("summary.json", "parity.png", "errors_by_element.csv", "status.json"):
        (run / name).unlink()
    text = (run / "metrics.csv").read_text().replace("samples", "other")
    (run / "metrics.csv").write_text(text)
    page = Page(report(run))
    state = page.cells("Runs")["bare"]["state"]["text"]
    assert state.strip() == "unknown"
    for part in ("no summary.json", "no status.json", "no samples", "no checkpoint"):
        assert part in page.text.partition("Not there")[2]
    assert "Not drawn, as metrics.csv does not have samples: bare." in page.text
    forces = page.cells("Metrics of the validation")["bare"]["val_forces_mae, eV/A"]
    with (run / "metrics.csv").open() as file:
        assert forces["values"][0] == float(list(csv.DictReader(file))[-1]["val_forces_mae"])


def test_points_of_a_sweep(tmp_path: Path) -> None:
    """The best first, one that never began among them."""
    last = {}
    for seed in range(3):
        run = make_run(tmp_path / "sweep" / "points" / f"seed_{seed}", seed=seed, lr=seed)
        summary = json.loads((run / "summary.json").read_text())
        last[f"seed_{seed}"] = summary["metrics"]["val_forces_mae"]["last"]
    points = {f"seed_{seed}": {"seed": seed} for seed in range(4)}
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"points": points}))
    page = Page(report(tmp_path / "sweep"))
    assert list(page.cells("Runs")) == [*sorted(last, key=last.get), "seed_3"]
    assert "Sweep sweep: 4 points, 3 finished, 1 new; by val_forces_mae, best first" in page.text
    assert page.cells("Runs")["seed_3"]["state"]["text"].strip() == "new"
    (tmp_path / "sweep" / "sweep.json").write_text('{"points": ')
    page = Page(report(tmp_path / "sweep"))
    assert list(page.cells("Runs")) == ["seed_0", "seed_1", "seed_2"]
    assert "sweep.json is damaged" in page.text


def test_names_that_repeat(tmp_path: Path) -> None:
    for group in ("a", "b"):
        make_run(tmp_path / group / "seed_0")
    page = Page(report(tmp_path, tmp_path / "a"))
    assert list(page.cells("Runs")) == ["a/seed_0", "b/seed_0"]


@pytest.mark.parametrize("what", ["absent", "empty", "out"])
def test_mistakes(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "x", tmp_path / "page.html"
    if what != "absent":
        folder.mkdir()
    if what == "out":
        make_run(folder / "run")
        out = tmp_path / "nowhere" / "page.html"
    assert main(["report", str(folder), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    expected = {"absent": "is no folder", "empty": "no run, sweep or evaluation", "out": "--out"}
    assert expected[what] in message
