"""What a finished run tells: loggers, summary, figures and tables, descriptions of checkpoints."""

from __future__ import annotations

import csv
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from data_helpers import stored
from escaip_fairchem import calculator
from escaip_fairchem.cli import main
from escaip_fairchem.describe import describe, rises
from escaip_fairchem.errors import UserError
from escaip_fairchem.train.by_element import by_element
from escaip_fairchem.train.callbacks import read_metrics
from escaip_fairchem.train.metrics import unit_of
from escaip_fairchem.train.parity import Parity
from escaip_fairchem.train.plot import draw_by_element, draw_parity, plot_run
from helpers import SMALL
from run_helpers import MEAN, REFERENCES, STEPS, make_run, save_checkpoint

if TYPE_CHECKING:
    from ase import Atoms


@pytest.fixture(autouse=True)
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESCAIP_DATA", str(tmp_path / "data"))


@pytest.fixture
def trained(quick_start: tuple[Path, str]) -> tuple[Path, str]:
    """The folder and the output of a run with all loggers, by the `fairchem` command."""
    folder, output = quick_start
    return folder / "runs" / "first", output


def curve(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Points of each column of metrics.csv, the last where a step has several."""
    points: dict[str, dict[int, float]] = {}
    for row in read_metrics(run / "metrics.csv"):
        for name, value in row.items():
            points.setdefault(name, {})[row["step"]] = value
    return {name: sorted(values.items()) for name, values in points.items()}


def test_output_of_a_run(trained: tuple[Path, str]) -> None:
    run, output = trained
    assert "\r" not in output
    assert f"training: {STEPS}/{STEPS} (100%)" in output
    assert "atoms/s, loss" in output
    assert f"validation after {STEPS} steps" in output
    assert f"checkpoint: {run.resolve()}/checkpoints/final/inference_ckpt.pt" in output


def test_tensorboard_has_the_learning_curve(trained: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = trained
    events = EventAccumulator(str(run / "logs" / "tensorboard"))
    events.Reload()
    written = curve(run)
    assert {"train/loss", "lr", "val/loss", "val/energy_mae", "val/forces_mae"} <= set(
        events.Tags()["scalars"]
    )
    for tag in events.Tags()["scalars"]:
        found = {event.step: event.value for event in events.Scalars(tag)}
        expected = dict(written[tag.replace("/", "_")])
        assert found == pytest.approx(expected, rel=1e-6)


def log_records(content: bytes) -> list[bytes]:
    """Records of W&B's file: LevelDB's log format (blocks of 32 KiB) behind seven bytes."""
    records, position = [], 7
    while position < len(content):
        left = 32768 - position % 32768
        if left < 7:  # no room for a header: zeros up to the next block
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        part = content[position + 7 : position + 7 + length]
        if kind in (1, 2):  # whole, or first of several
            records.append(b"")
        records[-1] += part
        position += 7 + length
    return records


def test_wandb_offline_has_the_metrics(trained: tuple[Path, str]) -> None:
    from wandb.proto import wandb_internal_pb2

    run, _ = trained
    (file,) = run.glob("logs/wandb/offline-run-*/*.wandb")
    history = []
    for data in log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({i.key or "/".join(i.nested_key): i.value_json for i in items})
    losses = [float(row["train/loss"]) for row in history if "train/loss" in row]
    assert len(losses) == STEPS
    first = curve(run)["train_loss"][0]
    assert first[1] == pytest.approx(np.mean(losses[: first[0]]), rel=1e-5)
    validated = [
        float(row["val/oc20.val,forces,mae"]) for row in history if "val/oc20.val,forces,mae" in row
    ]
    expected = [value for _, value in curve(run)["val_forces_mae"]]
    assert set(np.round(validated, 9)) <= set(np.round(expected, 9))
    assert validated


def test_summary_of_a_run(trained: tuple[Path, str]) -> None:
    from escaip_fairchem import __version__

    run, output = trained
    summary = json.loads((run / "summary.json").read_text())
    points = curve(run)
    assert (summary["steps"], summary["ranks"]) == (STEPS, 1)
    assert summary["wall_time_s"] == points["wall_time_s"][-1][1]
    assert Path(summary["checkpoint"]).samefile(run / "checkpoints/final/inference_ckpt.pt")
    assert (
        0 < summary["atoms_per_s"] == pytest.approx(summary["steps_per_s"] * 110, rel=0.3)
    )  # batches of at most 120 atoms
    forces = summary["metrics"]["val_forces_mae"]
    values = points["val_forces_mae"]
    assert forces["last"] == values[-1][1]
    assert forces["best"] == min(value for _, value in values)
    assert (forces["best_step"], forces["best"]) in values
    assert forces["unit"] == "eV/A"
    cosine = summary["metrics"]["val_forces_cosine_similarity"]
    assert cosine["best"] == max(v for _, v in points["val_forces_cosine_similarity"])
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["versions"]["escaip_fairchem"] == __version__
    assert f"{summary['parameters']:,} parameters" in output


def test_baselines_of_the_summary(trained: tuple[Path, str]) -> None:
    """Against the labels in the files and the references in the configuration."""
    from omegaconf import OmegaConf

    run, _ = trained
    frames = stored(run.parents[1] / "data" / "oc20" / "sample" / "val")
    tasks = OmegaConf.load(run / "canonical_config.yaml").runner.train_eval_unit.tasks
    references = np.array(tasks[0].element_references.element_references._args_[0])
    mean = tasks[0].normalizer.mean
    energies = [abs(a.get_potential_energy() - references[a.numbers].sum() - mean) for a in frames]
    per_atom = np.array(energies) / [len(a) for a in frames]
    forces = np.concatenate([a.calc.results["forces"][a.get_tags() > 0] for a in frames])
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    assert metrics["val_energy_mae"]["baseline"] == pytest.approx(np.mean(energies), rel=1e-5)
    assert metrics["val_energy_per_atom_mae"]["baseline"] == pytest.approx(
        per_atom.mean(), rel=1e-5
    )
    assert metrics["val_forces_mae"]["baseline"] == pytest.approx(np.abs(forces).mean(), rel=1e-5)
    assert "baseline" not in metrics["val_loss"]


def test_info_of_a_run(trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = trained
    summary = json.loads((run / "summary.json").read_text())
    assert main(["info", str(run)]) == 0
    text = capsys.readouterr().out
    for part in (
        "preset paper, hidden 64, 2 layers, 4 heads",
        f"{summary['parameters']:,} parameters",
        "strict nearest 20 within 12 A",
        f"{STEPS} steps",
        "element references of 11 elements: H C N O Al Ni Cu Pd Ag Pt Au",
        "train oc20/sample/train",
        f"torch {torch.__version__}",
    ):
        assert part in text
    assert main(["info", str(run / "checkpoints" / "final"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["averaged_steps"] == STEPS
    assert found["tasks"][1]["unit"] == "eV/A"
    assert found["run"]["metrics"]["val_loss"] == summary["metrics"]["val_loss"]["last"]


@pytest.mark.parametrize(
    "metric, unit",
    [
        ("val_energy_mae", "eV"), ("val_energy_per_atom_mae", "eV/atom"), ("val_loss", ""),
        ("val_id_forces_mae", "eV/A"), ("val_stress_mae", "eV/A^3"), ("val_efwt", ""),
        ("val_forces_cosine_similarity", ""), ("val_energy_per_atom_mse", "eV/atom^2"),
    ],
)  # fmt: skip
def test_units(metric: str, unit: str) -> None:
    assert unit_of(metric) == unit
    assert rises(metric) == (metric in ("val_efwt", "val_forces_cosine_similarity"))


def strained(n_frames: int) -> list[Atoms]:
    """Periodic Cu-Ni and Al crystals with EMT labels and stress; the first atom is fixed."""
    rng = np.random.default_rng(3)
    frames = []
    for index in range(n_frames):
        atoms = bulk("Al" if index % 3 == 0 else "Cu", cubic=True, a=4.0).repeat((1, 1, 2))
        if index % 3:
            atoms.symbols[rng.integers(len(atoms), size=2)] = "Ni"
        atoms.set_cell(atoms.cell @ (np.eye(3) + rng.normal(0, 0.02, (3, 3))), scale_atoms=True)
        atoms.rattle(0.1, rng=rng)
        atoms.set_constraint(FixAtoms([0]))
        atoms.calc = EMT()
        labels = {
            "energy": atoms.get_potential_energy(),
            "forces": atoms.get_forces(apply_constraint=False),
            "stress": atoms.get_stress(apply_constraint=False),
        }
        atoms.calc = SinglePointCalculator(atoms, **labels)
        frames.append(atoms)
    return frames


@pytest.mark.parametrize("conservative", [False, True], ids=["direct", "conservative"])
def test_plot_and_errors_by_element(
    conservative: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against predictions of each structure by itself through ASE."""
    run = make_run(tmp_path, strained(12), conservative=conservative, stress=True)
    written = plot_run(run)
    assert [path.name for path in written] == [
        "learning_curve.png",
        "parity.png",
        "errors_by_element.png",
        "errors_by_element.csv",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[:3])

    calc = calculator(run / "checkpoints" / "final" / "inference_ckpt.pt", device="cpu")
    forces: dict[str, list[np.ndarray]] = {}
    energy, reference, stress = [], [], []
    frames = stored(tmp_path / "set" / "val")
    for atoms in frames:
        labels = atoms.calc.results
        calc.calculate(atoms, ["energy", "forces", "stress"], None)
        error = np.abs(calc.results["forces"] - labels["forces"])
        for symbol, row in list(zip(atoms.symbols, error, strict=True))[1:]:
            forces.setdefault(symbol, []).append(row)
        energy.append(abs(calc.results["energy"] - labels["energy"]) / len(atoms))
        trivial = sum(REFERENCES[z] for z in atoms.numbers) + MEAN
        reference.append(abs(trivial - labels["energy"]) / len(atoms))
        stress.append(np.abs(_full(calc.results["stress"]) - _full(labels["stress"])))
    with written[3].open() as file:
        rows = {row["element"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["Al", "Ni", "Cu"]
    for symbol, row in rows.items():
        share = np.array([np.mean(np.array(a.get_chemical_symbols()) == symbol) for a in frames])
        assert int(row["structures"]) == (share > 0).sum()
        assert int(row["free_atoms"]) == len(forces[symbol])
        assert float(row["force_mae_eV_per_A"]) == pytest.approx(np.mean(forces[symbol]), rel=1e-4)
        for name, values in (("energy_mae", energy), ("energy_reference", reference)):
            expected = (share * values).sum() / share.sum()
            assert float(row[f"{name}_eV_per_atom"]) == pytest.approx(expected, rel=1e-4)
    table = capsys.readouterr().out
    assert f"stress MAE, eV/A^3{np.mean(stress):18.5f}" in table
    assert "6 structures" in table


def _full(voigt: np.ndarray) -> np.ndarray:
    xx, yy, zz, yz, xz, xy = voigt
    return np.array([xx, xy, xz, xy, yy, yz, xz, yz, zz])


def parity(numbers: list[list[int]], free: list[bool], **values: Any) -> Parity:
    """Two structures or so, everything else zero."""
    n_free = sum(free)
    zero = {
        "energy": np.zeros(len(numbers)), "energy_model": np.zeros(len(numbers)),
        "energy_baseline": np.zeros(len(numbers)), "forces": np.zeros((n_free, 3)),
        "forces_model": np.zeros((n_free, 3)), "stress": np.zeros((0, 9)),
        "stress_model": np.zeros((0, 9)),
    }  # fmt: skip
    return Parity(
        n_atoms=np.array([len(each) for each in numbers]),
        numbers=np.concatenate(numbers),
        free=np.array(free),
        **{**zero, **{name: np.array(value) for name, value in values.items()}},
    )


def test_errors_by_element_by_hand(tmp_path: Path) -> None:
    """H2O with fixed O, and H2: energy errors 3 and 1 eV, that is 1 and 0.5 eV per atom."""
    found = by_element(
        parity(
            [[8, 1, 1], [1, 1]],
            [False, True, True, True, True],
            energy_model=[3.0, -1.0],
            forces_model=[[3, 0, 0], [0, 0, 0], [0, 6, 0], [0, 0, -9]],
        )
    )
    hydrogen, oxygen = found
    assert (hydrogen.element, hydrogen.structures, hydrogen.free_atoms) == ("H", 2, 4)
    assert hydrogen.force_mae_eV_per_A == pytest.approx((3 + 6 + 9) / 12)
    # shares of H: 2/3 and 1
    assert hydrogen.energy_mae_eV_per_atom == pytest.approx((2 / 3 * 1 + 1 * 0.5) / (5 / 3))
    assert (oxygen.force_mae_eV_per_A, oxygen.energy_mae_eV_per_atom) == (None, 1.0)
    assert draw_by_element(found, tmp_path / "elements.png").stat().st_size > 5000


def test_structure_that_decides_a_mean_is_named() -> None:
    """A third of all forces is on one of 60 atoms and missed; others are off by half."""
    forces = np.full((60, 3), 0.1)
    forces[7] = 2.95
    off = np.where(np.arange(60) == 7, 1.0, 0.5)[:, None]
    found = parity(
        [[1]] * 60, [True] * 60, energy=np.ones(60), forces=forces, forces_model=forces * (1 - off)
    )
    assert found.dominant() == [
        "forces: structure 7 alone has 33% of the baseline's error; ratio without it 0.500"
    ]
    assert found.dominant()[0] in found.table()
    forces[7] = 0.5  # 8 %
    assert not parity([[1]] * 60, [True] * 60, forces=forces).dominant()


def test_nothing_is_named_where_a_mean_cannot_tell() -> None:
    """Too few with labels, or no other structure that has any error to compare with."""
    stress = np.full((60, 9), np.nan)
    stress[:5] = np.arange(1, 6)[:, None]  # the last of five has a third
    energy = np.where(np.arange(60) == 3, 2.0, 0.0)
    names = np.array([f"{number}-frame-0" for number in range(60)])
    found = parity(
        [[1]] * 60,
        [True] * 60,
        energy=energy,
        stress=stress,
        stress_model=np.zeros((60, 9)),
        names=names,
    )
    assert found.dominant() == []
    found.stress[5:] = 0.1
    [line] = found.dominant()
    assert line.startswith("stress: structure 4-frame-0 alone has 24% of")


def test_parity_without_stress_has_two_panels(tmp_path: Path) -> None:
    from matplotlib.image import imread

    plain = parity([[1, 1]], [True, True], energy=[1.0])
    stressed = parity(
        [[1, 1]], [True, True], energy=[1.0], stress=[[1.0] * 9], stress_model=[[0.5] * 9]
    )
    widths = [
        imread(draw_parity(each, tmp_path / "parity.png")).shape[1] for each in (plain, stressed)
    ]
    assert widths[1] == pytest.approx(1.5 * widths[0], abs=2)
    assert "stress MAE, eV/A^3" in stressed.errors()
    assert stressed.errors()["stress MAE, eV/A^3"] == (0.5, 1.0)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"conservative": True, "stress": True}, "conservative"),
        ({"conservative": False, "stress": False}, "direct"),
    ],
)
def test_info_outside_of_a_run(settings: dict[str, bool], expected: str, tmp_path: Path) -> None:
    path = tmp_path / "model" / "mine.pt"
    save_checkpoint(path, dataset="mine", **settings)
    found = describe(path)
    weights = torch.load(path, weights_only=False).model_state_dict  # written above
    assert found["forces"] == expected
    assert found["parameters"] == sum(weight.numel() for weight in weights.values())
    assert found["hidden_size"] == SMALL["hidden_size"]
    assert found["averaged_steps"] == 41
    assert found["run"] is None
    assert found["tasks"][0]["mean"] == MEAN
    assert found["tasks"][0]["references"][29] == pytest.approx(REFERENCES[29])
    assert len(found["tasks"]) == 2 + settings["stress"]


class Harmful:
    """Runs a command when it is unpickled without care."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.file,))


def test_info_mistakes(tmp_path: Path) -> None:
    from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint

    def saved(name: str, content: Any) -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    def of_model(name: str) -> MLIPInferenceCheckpoint:
        return MLIPInferenceCheckpoint({"backbone": {"model": name}, "heads": {}}, {}, {}, [])

    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "cut.pt").write_bytes(saved("whole.pt", torch.zeros(9999)).read_bytes()[:9999])
    builtin = "fairchem.core.models.escaip.EScAIP.EScAIPBackbone"
    touched = tmp_path / "touched"
    for path, message in [
        (tmp_path / "absent.pt", "no checkpoint at"),
        (tmp_path, r"give a checkpoint or the folder of a run"),
        (tmp_path / "text.pt", "is no inference checkpoint"),
        (tmp_path / "cut.pt", "is no inference checkpoint"),
        (saved("tensor.pt", torch.zeros(3)), "is no inference checkpoint"),
        (saved("harmful.pt", Harmful(touched)), "holds other objects"),
        (saved("builtin.pt", of_model(builtin)), "escaip import-checkpoint"),
        (saved("other.pt", of_model("some.Other")), "checkpoint of some.Other, not of this"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            describe(path)
        assert "\n" not in str(error.value)
    assert not touched.exists()
