"""Tables from sweeps: power laws against laws that are known, counted parameters, equal sizes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from escaip_fairchem.cli import main
from escaip_fairchem.errors import UserError
from escaip_fairchem.features import bond_orientational_order
from escaip_fairchem.sweep.compose import composer, to_yaml
from escaip_fairchem.sweep.points import expand
from escaip_fairchem.sweep.spec import load_spec
from escaip_fairchem.sweep.store import Sweep
from escaip_fairchem.tables.points import count_parameters, require_equal, variant
from escaip_fairchem.tables.powerlaw import fit
from escaip_fairchem.tables.scaling import fits_of
from escaip_fairchem.train.status import RunStatus, write_status

CONFIGS = Path(__file__).parents[1] / "configs" / "oc20"
SIZES = np.array([100, 300, 1000, 3000, 10_000, 30_000])


def noisy(law, seeds: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.repeat(SIZES, seeds)
    random = np.random.default_rng(seed)
    return sizes, law(sizes) * np.exp(noise * random.standard_normal(len(sizes)))


def test_exact_laws_are_found():
    found = fit(SIZES, 3.0 * SIZES**-0.4)
    assert found.supported
    assert found.exponent == pytest.approx(0.4)
    assert found.factor == pytest.approx(3.0)
    assert (found.offset, found.offset_range) == (0, None)
    np.testing.assert_allclose(found([10.0, 1e6]), [3 * 10**-0.4, 3 * 1e6**-0.4])
    found = fit(SIZES, 0.05 + 3.0 * SIZES**-0.6)
    assert found.offset == pytest.approx(0.05, rel=1e-4)
    assert found.exponent == pytest.approx(0.6, rel=1e-4)
    assert found.factor == pytest.approx(3.0, rel=1e-3)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """95 % of the time, within four standard errors of counting."""
    draws, inside, with_offset = 120, 0, 0
    for seed in range(draws):
        found = fit(*noisy(lambda n: 2.0 * n**-0.3, 2, 0.1, seed))
        with_offset += found.offset_range is not None
        if found.offset_range is None:
            low, high = found.exponent_range
            inside += low < 0.3 < high
    counted = draws - with_offset
    assert with_offset < draws * (0.05 + 4 * np.sqrt(0.05 * 0.95 / draws))
    assert abs(inside / counted - 0.95) < 4 * np.sqrt(0.05 * 0.95 / counted)


def test_an_offset_is_found_in_noise():
    found = fit(*noisy(lambda n: 0.05 + 3.0 * n**-0.6, 4, 0.03))
    assert found.offset_range[0] < 0.05 < found.offset_range[1]
    assert found.exponent_range[0] < 0.6 < found.exponent_range[1]


@pytest.mark.parametrize(
    "sizes, errors, why",
    [
        ([100, 100, 200], [1, 1.1, 0.9], "2 sizes; a power law needs 3"),
        ([1, 2, 4, 8], [1.0, 0.7, 1.1, 0.9], "not supported: exponent"),
        ([1, 2, 4, 8], [1.0, 2.1, 3.9, 8.2], "not supported: exponent"),
        ([1, 2, 4], [1.0, float("nan"), 0.5], "2 sizes"),
    ],
)
def test_unsupported(sizes, errors, why):
    found = fit(sizes, errors)
    assert not found.supported
    assert why in found.verdict


@pytest.mark.parametrize("name", ["attention", "attention_cpu"])
def test_shipped_variants_are_equally_large(name: str):
    """Counted by making the models; the tables refuse what differs by more than 2 %."""
    recipe = {"attention": "escaip_2m.yml", "attention_cpu": "escaip_few_frames.yml"}[name]
    counts, lmax = {}, set()
    with composer(CONFIGS / recipe) as compose:
        for point in expand(load_spec(CONFIGS / "ablations" / f"{name}.yml"), ["dataset=sample"]):
            if point.varied["seed"] == 0:
                config = compose(point.overrides)
                counts[variant(point.varied)] = count_parameters(config)
                model = config["runner"]["train_eval_unit"]["model"]
                lmax.add(model["backbone"]["boo_lmax"])
    sizes = [count["parameters"] for count in counts.values()]
    assert max(sizes) / min(sizes) < 1.04
    assert all(abs(size / sizes[0] - 1) < 0.02 for size in sizes)
    shares = [count["attention"] / count["parameters"] for count in counts.values()]
    assert max(shares) > 1.2 * shares[0] > 1.2 * 1.2 * min(shares)
    assert lmax == {0, 9}
    rows = [{"variant": name, **count} for name, count in counts.items()]
    assert require_equal(rows, 2) < 2
    with pytest.raises(UserError, match="change its sizes"):
        require_equal(rows, 0.1)


def test_groups_of_parameters_by_hand():
    """L = 1, H = 64: q, k, v and the output have 4 (H + 1) H."""
    with composer(CONFIGS / "escaip_few_frames.yml") as compose:
        config = compose(["dataset=sample", "backbone.num_layers=1"])
    counts = count_parameters(config)
    assert counts["attention"] == 4 * 65 * 64
    assert counts["messages"] == (2 * 64 + 1) * 64 + 65 * 64 + (3 * 64 + 1) * 64
    groups = [count for name, count in counts.items() if name != "parameters"]
    assert sum(groups) == counts["parameters"]  # norm: skip, so nothing else is there


def test_without_orders_boo_tells_nothing():
    """What the ablation takes as no BOO: Q_0 is the same for any surroundings."""
    random = torch.Generator().manual_seed(0)
    directions = torch.randn(40, 3, generator=random)
    directions /= directions.norm(dim=1, keepdim=True)
    receivers = torch.arange(5).repeat_interleave(8)
    for scale in ("unit", "component"):
        boo = bond_orientational_order(
            directions, receivers, torch.ones(40), 5, lmax=0, scale=scale
        )
        torch.testing.assert_close(boo, torch.ones(5, 1))


def test_variants_are_named_by_what_differs():
    given = {"seed": 1, "train_fraction": 0.5, "+backbone.ffn_multiplier": 4, "lr": 1e-3}
    assert variant(given) == "ffn_multiplier=4 lr=0.001"
    assert variant({"seed": 1}) == "-"


def test_fits_of_a_grid():
    """Each curve has a law of its own; the energy has none."""
    rows = [
        {
            "parameters": p, "structures": n, "val_energy_mae": None,
            "val_forces_mae": 5.0 * p**-0.1 * n**-0.3,
        }
        for p in (1e4, 1e5, 1e6)
        for n in (100, 400, 1600, 6400)
    ]  # fmt: skip
    found = fits_of(rows)
    assert len(found) == 3 + 4
    for row, _ in found:
        assert row["supported"]
        expected = {"structures": 0.3, "parameters": 0.1}[row["against"]]
        assert row["exponent"] == pytest.approx(expected)


def made_up(folder: Path, sizes: dict[int, float], fractions: list[float], n: int) -> None:
    """A finished sweep whose errors are known: size effect x (structures)^-0.5."""
    sweep = Sweep(folder.resolve())
    with composer(CONFIGS / "escaip_few_frames.yml") as compose:
        for hidden, factor in sizes.items():
            for fraction in fractions:
                name = f"{hidden}_{fraction}"
                varied = {"backbone.hidden_size": hidden, "train_fraction": fraction}
                sweep.points[name] = varied
                config = compose([f"{k}={v}" for k, v in varied.items()])
                sweep.config(name).parent.mkdir(exist_ok=True, parents=True)
                sweep.config(name).write_text(to_yaml(config))
                run = sweep.run(name)
                run.mkdir(parents=True)
                write_status(run, RunStatus(state="finished", step=10))
                error = factor * round(n * fraction) ** -0.5
                metrics = {"val_forces_mae": {"last": error, "baseline": 0.9}}
                summary = {"steps": 10, "atoms_per_s": 1.0, "metrics": metrics}
                (run / "summary.json").write_text(json.dumps(summary))
    sweep.save()


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ESCAIP_DATA", str(tmp_path / "data"))
    assert main(["sample-data", "oc20", "--frames", "48"]) == 0
    with np.load("data/oc20/sample/train/metadata.npz") as metadata:
        n = len(metadata["natoms"])
    fractions = [0.25, 0.5, 1.0]
    made_up(Path("sweep"), {32: 2.0, 64: 1.0}, fractions, n)
    assert main(["bench", "scaling", "sweep"]) == 0
    printed = capsys.readouterr().out
    assert "fall with every larger model" in printed
    assert "2 sizes; a power law needs 3" in printed
    with open("scaling.csv", newline="") as file:
        points = list(csv.DictReader(file))
    assert {int(row["structures"]) for row in points} == {round(n * f) for f in fractions}
    with open("scaling_fits.csv", newline="") as file:
        fits = [row for row in csv.DictReader(file) if row["against"] == "structures"]
    assert [float(row["exponent"]) for row in fits] == pytest.approx([0.5, 0.5], abs=1e-4)
    assert Path("scaling.png").read_bytes().startswith(b"\x89PNG")

    assert main(["bench", "ablation", "sweep"]) == 2
    assert "change its sizes, or allow it by --within" in capsys.readouterr().err
    assert main(["bench", "ablation", "sweep", "--within", "300"]) == 0
    assert "gains most from parameters in the attention" in capsys.readouterr().out
    with open("ablation.csv", newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    mean = np.mean([float(r["val_forces_mae"]) for r in points if r["variant"] == "hidden_size=64"])
    assert float(rows["hidden_size=64"]["val_forces_mae"]) == pytest.approx(mean, rel=1e-4)
    assert main(["bench", "scaling", "data"]) == 2
    assert "no sweep.json" in capsys.readouterr().err
