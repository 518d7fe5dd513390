"""References, splits, inspection, float64 energies: on real frames, against numpy and ASE."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers, covalent_radii
from ase.io import read, write
from ase.neighborlist import neighbor_list
from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch
from fairchem.core.modules.loss import DDPMTLoss, MAELoss
from fairchem.core.modules.normalization.element_references import ElementReferences
from fairchem.core.modules.normalization.normalizer import Normalizer
from fairchem.core.units.mlip_unit.mlip_unit import OutputSpec, Task, compute_loss

from data_helpers import labelled_atoms, read_sample, stored
from escaip_fairchem import calculator
from escaip_fairchem.cli import main
from escaip_fairchem.data.convert import convert
from escaip_fairchem.data.datasets import create_dataset
from escaip_fairchem.data.energies import exact_energy, use_exact_energy
from escaip_fairchem.data.fingerprint import composition_key, equal_structures, fingerprint
from escaip_fairchem.data.references import ReferenceFit
from escaip_fairchem.data.survey import FORCE_EDGES, gather
from run_helpers import save_checkpoint

RECIPES = Path(__file__).parents[1] / "configs"
ISOLATED = {"H": -13.587222780835477, "C": -1029.4889999855063}


@pytest.fixture(scope="module")
def spice(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SPICE frames, total energies to -213,274 eV, converted; every third one."""
    folder = tmp_path_factory.mktemp("spice")
    write(folder / "frames.extxyz", read_sample(test_data / "spice_sample.extxyz.gz", "::3"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("ESCAIP_DATA", str(folder))
        convert([str(folder / "frames.extxyz")], folder / "spice")
    return folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ESCAIP_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def counts_of(frames: list[Atoms]) -> np.ndarray:
    return np.array([np.bincount(atoms.numbers, minlength=120) for atoms in frames], dtype=float)


def energies_of(frames: list[Atoms]) -> np.ndarray:
    return np.array([atoms.get_potential_energy() for atoms in frames])


def test_residuals_of_large_totals_are_exact(spice: Path) -> None:
    """Through fairchem's loss: the target that it forms of loaded labels and references."""
    frames = {atoms.info["sid"]: atoms for atoms in stored(spice / "spice" / "train")}
    references = yaml.safe_load((spice / "spice" / "dataset.yaml").read_text())
    values = np.array(references["element_refs"]["energy"])
    dataset = create_dataset("spice", "train", str(spice / "spice" / "train"))
    batch = atomicdata_list_to_batch([dataset[index] for index in range(len(dataset))])
    batch.batch_full, batch.atomic_numbers_full = batch.batch, batch.atomic_numbers
    ordered = [frames[sid] for sid in batch.sid]
    totals = energies_of(ordered)
    expected = totals - counts_of(ordered) @ values
    assert totals.min() < -50_000
    task = Task(
        name="energy", level="system", property="energy", out_spec=OutputSpec([1], "float32"),
        loss_fn=DDPMTLoss(MAELoss(), reduction="sum"), normalizer=Normalizer(0.0, 1.0),
        element_references=ElementReferences(torch.DoubleTensor(values)),
        datasets=["spice"], metrics=["mae"],
    )  # fmt: skip
    errors = {}
    for name in ("float32", "float64"):
        if name == "float64":
            use_exact_energy(batch)
        guess = torch.tensor(expected[:, None], requires_grad=True)
        losses = compute_loss([task], {"energy": {"energy": guess}}, batch)
        errors[name] = losses["energy"].item() / len(ordered)
    assert errors["float32"] > 1e-4
    assert errors["float64"] < 1e-8


def test_old_structures_have_their_float32_energy() -> None:
    data = SimpleNamespace(energy=torch.tensor([1.5]), get=lambda key, default: default)
    assert exact_energy(data).dtype == torch.float64
    assert float(exact_energy(data)) == 1.5


def test_predictions_of_large_totals_differ_by_less_than_a_meV(
    test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The difference of two totals is that of the residuals, whatever the references."""
    frames = read_sample(test_data / "spice_sample.extxyz.gz", ":")
    atoms = max(frames, key=len)
    small, large = [0.0] * 120, [-50.0 * z * z for z in range(120)]
    found = {}
    for name, references in {"small": small, "large": large}.items():
        monkeypatch.setattr("run_helpers.REFERENCES", references)
        save_checkpoint(
            tmp_path / name / "model.pt", conservative=False, stress=False, dataset="mine"
        )
        calc = calculator(tmp_path / name / "model.pt", device="cpu")
        energies = []
        for shift in (0.0, 0.001, 0.01):
            moved = Atoms(atoms.numbers, atoms.positions)
            moved.positions[0, 0] += shift
            moved.calc = calc
            energies.append(moved.get_potential_energy())
        found[name] = np.array(energies)
    offset = np.array(large)[atoms.numbers].sum()
    assert offset < -50_000
    np.testing.assert_allclose(found["large"] - offset, found["small"], atol=1e-9)
    assert np.ptp(found["small"]) > 0


def test_references_against_numpy(spice: Path, root: Path, capsys) -> None:
    assert main(["references", str(spice / "spice"), "--name", "again", "--workers", "2"]) == 0
    printed = capsys.readouterr().out
    frames = stored(spice / "spice" / "train")
    counts, energies = counts_of(frames), energies_of(frames)
    present = np.flatnonzero(counts.any(axis=0))
    expected, _, rank, _ = np.linalg.lstsq(counts[:, present], energies, rcond=None)
    assert rank == len(present)
    group = yaml.safe_load((root / "configs" / "element_refs" / "again.yaml").read_text())
    np.testing.assert_allclose(np.array(group["energy"])[present], expected, rtol=1e-9)
    residual = energies - counts[:, present] @ expected
    rms = np.sqrt(np.mean(residual**2))
    per_atom = np.sqrt(np.mean((residual / counts.sum(axis=1)) ** 2))
    assert f"{rms:.6g} eV, {per_atom:.6g} eV per atom" in printed
    forces = np.concatenate([atoms.get_forces() for atoms in frames])
    assert f"free atoms: {np.sqrt(np.mean(forces**2)):.6g} eV/A" in printed
    dataset = yaml.safe_load((root / "configs" / "dataset" / "again.yaml").read_text())
    assert dataset["dataset"]["train"] == str(spice / "spice" / "train")
    assert dataset["normalizer"]["energy_residual"] == pytest.approx(rms, rel=1e-6)
    assert main(["references", str(spice / "spice"), "--name", "again"]) == 2
    assert "again.yaml exists; choose another name or pass --overwrite" in capsys.readouterr().err


def test_options_of_a_format(test_data: Path, root: Path, capsys) -> None:
    """Normal equations of the fit, with either energies of the file."""
    path = test_data / "formats" / "SPICE-1.1.4_n2.hdf5"
    said = []
    for energy, key in (("total", "dft_total_energy"), ("formation", "formation_energy")):
        arguments = [str(path), "--set", f"energy={energy}"]
        assert main(["references", *arguments, "--out", f"{energy}.yaml"]) == 0
        values = np.array(yaml.safe_load((root / f"{energy}.yaml").read_text())["energy"])
        with h5py.File(path) as file:
            counts, energies = zip(
                *((np.bincount(group["atomic_numbers"], minlength=120), 27.21138602 * label)
                  for group in file.values() for label in group[key]), strict=True,
            )  # fmt: skip
        left = (np.array(energies) - np.array(counts) @ values) @ np.array(counts)
        assert np.abs(left).max() < 1e-7 * np.abs(energies).sum()
        capsys.readouterr()
        assert main(["inspect", *arguments]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] != said[1]
    for tool in ("references", "inspect"):
        assert main([tool, str(path), "--set", "energie=total"]) == 2
        assert "did you mean 'energy'?" in capsys.readouterr().err


@pytest.mark.parametrize("by_file", [False, True])
def test_isolated_atoms_are_kept_and_the_rest_is_fitted(
    by_file: bool, test_data: Path, root: Path, capsys
) -> None:
    source = root / "some.extxyz"
    write(source, read_sample(test_data / "3bpa_sample.extxyz.gz", "::20"))
    isolated = ",".join(f"{symbol}={value!r}" for symbol, value in ISOLATED.items())
    if by_file:
        (root / "atoms.yaml").write_text(yaml.safe_dump(ISOLATED))
        isolated = "atoms.yaml"
    assert main(["references", str(source), "--isolated", isolated, "--out", "refs.yaml"]) == 0
    printed = capsys.readouterr().out
    values = np.array(yaml.safe_load((root / "refs.yaml").read_text())["energy"])
    frames = read(source, ":")
    for symbol, value in ISOLATED.items():
        assert values[atomic_numbers[symbol]] == pytest.approx(value, abs=1e-9)
    counts, left = counts_of(frames), energies_of(frames)
    left = left - counts[:, [1, 6]] @ list(ISOLATED.values())
    expected = np.linalg.lstsq(counts[:, [7, 8]], left, rcond=None)[0]  # one composition
    np.testing.assert_allclose(values[[7, 8]], expected, rtol=1e-9)
    assert "(H, C given); only 1 independent compositions" in printed
    assert "(N, O: the smallest solution is taken" in printed


def test_only_elements_that_are_open_are_named() -> None:
    fit = ReferenceFit()
    for numbers, energy in (([1, 1], -2.0), ([1, 6, 8], -9.0), ([6, 8], -8.0)):
        fit.add(np.array(numbers), energy)
    found = fit.solve()
    assert found.open == (6, 8)
    assert found.values[[1, 6, 8]] == pytest.approx([-1.0, -4.0, -4.0])


def test_fits_merge_and_weigh(test_data: Path) -> None:
    frames = read_sample(test_data / "spice_sample.extxyz.gz", ":120")
    parts = [ReferenceFit(), ReferenceFit()]
    for index, atoms in enumerate(frames):
        parts[index % 2].add(atoms.numbers, atoms.get_potential_energy(), 1 / len(atoms))
    parts[0].merge(parts[1])
    counts, n = counts_of(frames), np.array([len(atoms) for atoms in frames])
    found = parts[0].solve()
    present = found.elements
    expected = np.linalg.lstsq(counts[:, present] / n[:, None], energies_of(frames) / n, rcond=None)
    np.testing.assert_allclose(found.values[present], expected[0], rtol=1e-8)
    guess = np.random.default_rng(0).normal(size=120)
    residual = (energies_of(frames) - counts @ guess) / n
    assert parts[0].rms(guess) == pytest.approx(np.sqrt(np.mean(residual**2)), rel=1e-10)


@pytest.mark.parametrize("wrong", ["Hh=1.0", "H=much", "H"])
def test_isolated_that_cannot_be_meant(wrong: str, root: Path, capsys) -> None:
    write(root / "a.extxyz", labelled_atoms(2))
    assert main(["references", "a.extxyz", "--isolated", wrong]) == 2
    assert "--isolated: " in capsys.readouterr().err


def rotated(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """The same structure: turned, moved, its atoms in another order and other images."""
    other = atoms.copy()
    other.rotate(rng.uniform(10, 80), rng.normal(size=3), rotate_cell=True)
    other.positions += rng.normal(size=3)
    if other.pbc.all():
        other.wrap()
    return other[rng.permutation(len(other))]


@pytest.mark.parametrize("name", ["oc20_sample", "spice_sample", "mptrj_sample"])
def test_equal_geometries(name: str, test_data: Path) -> None:
    rng = np.random.default_rng(0)
    frames = read_sample(test_data / f"{name}.extxyz.gz", "::120")
    groups = [frames, [rotated(atoms, rng) for atoms in frames]]
    for size in (5e-5, 3e-2):  # rounded to four decimals, and one atom moved
        others = [atoms.copy() for atoms in frames]
        for atoms in others:
            if size < 1e-3:
                atoms.positions = atoms.positions.round(4)
            else:
                atoms.positions[rng.integers(len(atoms))] += size
        groups.append(others)
    every = [atoms for group in groups for atoms in group]
    prints = [fingerprint(a.numbers, a.positions, a.cell.array, a.pbc) for a in every]
    _, composition = np.unique([composition_key(a.numbers) for a in every], return_inverse=True)
    label = equal_structures(composition, np.array(prints)).reshape(4, -1)
    n = len(frames)
    assert len(set(label[0])) == n
    assert (label[1] == label[0]).all()
    assert (label[2] == label[0]).all()
    assert not np.isin(label[3], label[0]).any()


def swapped() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.numbers[0] = 28
    return atoms


def test_species_on_other_sites_are_another_geometry() -> None:
    atoms = bulk("NaCl", "rocksalt", 5.6, cubic=True)
    other = atoms.copy()
    other.numbers[[0, 1]] = other.numbers[[1, 0]]
    prints = [fingerprint(a.numbers, a.positions, a.cell.array, a.pbc) for a in (atoms, other)]
    assert len(set(equal_structures(np.zeros(2), np.array(prints)))) == 2


@pytest.fixture
def trajectories(root: Path) -> Path:
    """Ten frames of three systems, the last of system 2 a copy of its first."""
    frames = labelled_atoms(10, sid=["a"] * 4 + ["b"] * 4 + ["c"] * 2, fid=[*range(4)] * 2 + [0, 1])
    copy = frames[4].copy()
    copy.calc, copy.info = frames[4].calc, {**frames[7].info}
    frames[7] = copy
    write(root / "frames.extxyz", frames)
    assert main(["convert", "frames.extxyz", "set", "--label", "cu"]) == 0
    return root / "set"


def sides_of(folder: Path) -> dict[str, list[tuple[str, int]]]:
    """(sid, fid) of each side."""
    return {
        side.name: sorted((a.info["sid"], a.info["fid"]) for a in stored(side))
        for side in folder.iterdir()
        if side.is_dir()
    }


def test_split_by_time(trajectories: Path, root: Path, capsys) -> None:
    arguments = ["split", "set", "late", "--ordered", "fid", "--ratios", "0.75", "0.25"]
    assert main(arguments) == 0
    found = sides_of(root / "late")
    assert found["val"] == [("a", 3), ("b", 3), ("c", 1)]
    assert len(found["train"]) == 7
    printed = capsys.readouterr().out
    assert "leakage: 3 of 3 val frames (100.0%) have system ids of train" in printed
    assert "leakage: 1 of 3 val frames (33.3%) have geometries of train" in printed


def test_split_of_whole_systems_in_three(trajectories: Path, root: Path, capsys) -> None:
    arguments = ["split", "set", "new", "--by", "sid", "--ratios", "0.4", "0.4", "0.2"]
    assert main([*arguments, "--workers", "2"]) == 0
    found = sides_of(root / "new")
    assert sorted(map(len, found.values())) == [2, 4, 4]
    assert found["test"] == [("c", 0), ("c", 1)]
    systems = [{sid for sid, _ in frames} for frames in found.values()]
    assert sum(map(len, systems)) == 3
    printed = capsys.readouterr().out
    assert "0 of 4 val frames (0.0%) have system ids of train" in printed
    frames = stored(root / "new" / "train")
    group = yaml.safe_load((root / "configs" / "dataset" / "new.yaml").read_text())
    assert group["dataset"]["name"] == "cu"
    assert group["dataset"]["train"] == str(root / "new" / "train")
    mean = sum(energies_of(frames)) / sum(len(atoms) for atoms in frames)
    assert group["element_refs"]["energy"][29] == pytest.approx(mean, abs=1e-9)
    free = np.concatenate([atoms.get_forces(apply_constraint=False)[1:] for atoms in frames])
    assert group["normalizer"]["rmsd"] == pytest.approx(np.sqrt(np.mean(free**2)), rel=1e-9)
    card = json.loads((root / "new" / "dataset.json").read_text())
    assert {side: found["frames"] for side, found in card["sets"].items()} == {
        "train": 4, "val": 4, "test": 2,
    }  # fmt: skip
    assert len(create_dataset("cu", "train", "new/train")) == 4


def test_split_keeps_equal_geometries_together(trajectories: Path, root: Path, capsys) -> None:
    for seed in range(3):
        name = f"g{seed}"
        assert main(["split", "set", name, "--by", "geometry", "--seed", str(seed)]) == 0
        assert "have geometries of train" in (printed := capsys.readouterr().out)
        assert "0 of 1 val frames (0.0%) have geometries" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--by", "sidd"], "no info key 'sidd'; it has fid, index, sid"),
        (["--ratios", "0.5", "0.6"], "--ratios 0.5 0.6: give parts of train, val (and test)"),
        (["--by", "sid", "--ordered", "fid"], "--by and --ordered exclude each other"),
        (["--ordered", "sid"], "--ordered needs numbers, not 'a'"),
        (["--ordered", "fid", "--within", "index"], "are too short for these --ratios"),
    ],
)
def test_split_that_cannot_be_meant(arguments, message, trajectories: Path, capsys) -> None:
    assert main(["split", "set", "wrong", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("wrong").exists()


def test_facts_against_ase(test_data: Path, tmp_path: Path) -> None:
    for name, step in {"oc20_sample": 300, "mptrj_sample": 100, "mad_sample": 10}.items():
        frames = read_sample(test_data / f"{name}.extxyz.gz", f"::{step}")
        write(tmp_path / "some.extxyz", frames)
        facts = gather({"": [tmp_path / "some.extxyz"]}, cutoff=4.0)
        chosen = [frames[index] for _, index in facts.place]
        neighbors = np.concatenate(
            [np.bincount(neighbor_list("i", a, 4.0), minlength=len(a)) for a in chosen]
        )
        expected = np.bincount(neighbors, minlength=len(facts.neighbors))
        np.testing.assert_array_equal(facts.neighbors, expected)
        i, j, d = neighbor_list("ijd", chosen[-1], 4.0)
        ratio = d / covalent_radii[chosen[-1].numbers[np.stack([i, j])]].sum(axis=0)
        assert facts.contact[-1] == pytest.approx(_nearest(i, d, ratio), rel=1e-9)
        np.testing.assert_array_equal(facts.element_atoms, counts_of(chosen).sum(axis=0))
        free = [np.delete(a.get_forces(apply_constraint=False), fixed(a), axis=0) for a in chosen]
        components = np.concatenate([forces.ravel() for forces in free])
        assert facts.force_rms == pytest.approx(np.sqrt(np.mean(components**2)))
        exact = np.quantile(np.abs(components), 0.99, method="inverted_cdf")
        assert exact <= facts.force_quantile(0.99) <= 1.011 * exact + FORCE_EDGES[1]


def _nearest(owner: np.ndarray, distance: np.ndarray, ratio: np.ndarray) -> float:
    """Smallest ratio among the nearest neighbours of each atom."""
    order = np.lexsort((distance, owner))
    _, first = np.unique(owner[order], return_index=True)
    return ratio[order][first].min()


def fixed(atoms: Atoms) -> list[int]:
    return [index for constraint in atoms.constraints for index in constraint.index]


def test_inspection_finds_what_is_wrong(root: Path, capsys) -> None:
    """A duplicate, an energy that is off, a large force, a short contact, a new element in val."""
    frames = labelled_atoms(40)
    frames[7].calc.results["energy"] += 90.0
    frames[9].calc.results["forces"][3] = [80.0, 0.0, 0.0]
    frames[11].positions[5] = frames[11].positions[4] + [0.9, 0.0, 0.0]
    frames[20] = frames[19]
    for name, some in {"train": frames[:36], "val": [*frames[36:]]}.items():
        write(root / f"{name}.extxyz", some)
    nickel = swapped()
    nickel.calc = frames[0].calc
    nickel.calc.results = {"energy": -1.0, "forces": np.zeros((4, 3))}
    write(root / "val.extxyz", nickel, append=True)
    convert_arguments = ["convert", "train.extxyz", "set", "--val", "val.extxyz"]
    assert main([*convert_arguments, "--skip-unit-checks"]) == 0
    capsys.readouterr()
    recipe = str(RECIPES / "oc20" / "escaip_2m.yml")
    arguments = ["inspect", "set", "--plot", "found.png", "--recipe", recipe, "max_atoms=7"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    sections = printed.split("\n")
    after = {
        line.split(" (")[0].rstrip(":"): sections[index + 1]
        for index, line in enumerate(sections[:-1])
    }
    assert "frame 7 " in after["energy outliers"]
    assert "frame 9 " in after["largest forces"]
    assert "80 eV/A" in after["largest forces"]
    assert "frame 11 " in after["shortest contacts"]
    assert "Cu-Cu 0.900 A" in after["shortest contacts"]
    assert "duplicate geometries: 1" in sections
    assert "frame 20 (Cu8) is" in printed
    assert "structures: 41 (36 train, 5 val)" in printed
    assert "Ni: only in val, never trained" in printed
    assert "no element reference of Ni" in printed
    assert "WRONG max_atoms 7, largest structure 8 atoms: 40 structures are never" in printed
    assert read_png(root / "found.png")


def read_png(path: Path) -> bool:
    from matplotlib.image import imread

    return float(np.std(imread(path))) > 0.01


def test_a_fitting_recipe_fits(spice: Path, root: Path, capsys) -> None:
    recipe = str(RECIPES / "spice" / "escaip_direct.yml")
    assert main(["inspect", str(spice / "spice"), "--recipe", recipe]) == 0
    printed = capsys.readouterr().out
    verdict = printed.partition("does it fit")[2]
    assert "WRONG" not in verdict
    assert "ok    element references of all" in verdict
    assert (root / "inspect_spice.png").is_file()
    recipe = str(RECIPES / "mptrj" / "escaip_direct.yml")
    assert main(["inspect", str(spice / "spice"), "--sample", "20", "--recipe", recipe]) == 0
    verdict = capsys.readouterr().out.partition("does it fit")[2]
    assert "WRONG stress is learnt, 0 of" in verdict
    assert main(["inspect", str(spice / "spice"), "--recipe", "none.yml"]) == 2
    assert "no recipe at none.yml" in capsys.readouterr().err


def test_unlabelled_structures_can_be_inspected(root: Path, capsys) -> None:
    write(root / "bare.extxyz", [bulk("Cu", cubic=True), bulk("Ni", cubic=True)])
    assert main(["inspect", "bare.extxyz"]) == 0
    assert "without energy or forces: 2 structures" in capsys.readouterr().out
    assert main(["references", "bare.extxyz"]) == 2
