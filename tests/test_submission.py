"""Files for leaderboards: written from predictions by hand, spoiled, and checked."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from data_helpers import stored
from escaip_fairchem.cli import main
from escaip_fairchem.errors import UserError
from escaip_fairchem.predict.parts import Plan, Split, part_path, write_part
from escaip_fairchem.submission.boards import BOARDS
from escaip_fairchem.submission.check import Expectations, check
from escaip_fairchem.submission.write import write_submission
from submission_helpers import OC20_SPLITS, make_test_set, slabs

if TYPE_CHECKING:
    from collections.abc import Callable

    from ase import Atoms

    Arrays = dict[str, np.ndarray]

BOARD = BOARDS["oc20_s2ef"]
PART_ROWS = 4


def predictions(folder: Path, splits: dict[str, list[Atoms]], *, energy: float = 0.0) -> Arrays:
    """A folder of random predictions, and what the file must hold, made without the writer."""
    rng = np.random.default_rng(5)
    sources = {name: Split((name,), len(frames), "") for name, frames in splits.items()}
    plan = Plan.make(
        checkpoint="", checkpoint_sha256="", task="oc20", part_rows=PART_ROWS, settings={},
        splits=sources,
    )  # fmt: skip
    plan.write(folder)
    expected = {}
    for name, frames in splits.items():
        energies = energy + rng.normal(size=len(frames))
        forces = [rng.normal(size=(len(atoms), 3)).astype(np.float32) for atoms in frames]
        for index in range(-(-len(frames) // PART_ROWS)):
            rows = plan.rows(name, index)
            of_part = [frames[row] for row in rows]
            fixed = [np.isin(range(len(atoms)), held(atoms)) for atoms in of_part]
            arrays = {
                "row": np.array(rows),
                "natoms": np.array([len(atoms) for atoms in of_part], np.int32),
                "numbers": np.concatenate([atoms.numbers for atoms in of_part]).astype(np.uint8),
                "fixed": np.concatenate(fixed),
                "sid": np.array([atoms.info["sid"] for atoms in of_part]),
                "fid": np.array([str(atoms.info.get("fid", "")) for atoms in of_part]),
                "energy": energies[rows.start : rows.stop],
                "forces": np.concatenate(forces[rows.start : rows.stop]),
            }
            write_part(folder, name, index, arrays)
        for atoms, force in zip(frames, forces, strict=True):
            force[held(atoms)] = 0
        expected[f"{name}_energy"] = energies.astype(np.float32)
        expected[f"{name}_forces"] = np.concatenate(forces)
        expected[f"{name}_chunk_idx"] = np.cumsum([len(atoms) for atoms in frames])[:-1]
        expected[f"{name}_ids"] = np.array(
            [f"{atoms.info['sid']}_{atoms.info['fid']}" for atoms in frames]
        )
    return expected


def held(atoms: Atoms) -> np.ndarray:
    return atoms.constraints[0].index


@pytest.fixture(scope="module")
def frames() -> dict[str, list[Atoms]]:
    return {split: slabs(number, 4) for number, split in enumerate(OC20_SPLITS)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, frames: dict) -> Path:
    return make_test_set(tmp_path_factory.mktemp("published"), frames)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, frames: dict) -> tuple[Path, Arrays]:
    folder = tmp_path_factory.mktemp("predictions")
    return folder, predictions(folder, frames)


@pytest.fixture(scope="module")
def good(folder: tuple[Path, Arrays]) -> Path:
    path = folder[0] / "good.npz"
    write_submission(folder[0], BOARD, path)
    return path


def test_writer(folder: tuple[Path, Arrays], good: Path, dataset: Path, capsys) -> None:
    """As NumPy makes it of the predictions, with equal bytes again, and nothing left beside it."""
    with np.load(good) as found:
        assert sorted(found) == sorted(folder[1])
        for name, values in folder[1].items():
            np.testing.assert_array_equal(found[name], values)
            assert found[name].dtype == values.dtype
    again = folder[0] / "again.npz"
    write_submission(folder[0], BOARD, again)
    assert again.read_bytes() == good.read_bytes()
    assert not list(folder[0].glob(".*"))
    assert main(["submission", "check", str(good), "--dataset", str(dataset)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no problem found"


def test_choices(tmp_path: Path, folder: tuple[Path, Arrays], dataset: Path) -> None:
    """Free atoms only; forces of fixed atoms as predicted; sids where they are unique."""
    free = tmp_path / "free.npz"
    write_submission(folder[0], BOARD, free, atoms="free")
    with np.load(free) as found:
        for split in OC20_SPLITS:
            forces = folder[1][f"{split}_forces"]
            np.testing.assert_array_equal(found[f"{split}_forces"], forces[forces.any(axis=1)])
            cuts = np.cumsum([len(a) - len(held(a)) for a in stored(dataset / f"test_{split}")])
            np.testing.assert_array_equal(found[f"{split}_chunk_idx"], cuts[:-1])
    assert not check(free, Expectations(dataset=[str(dataset)], atoms="free")).problems
    predicted = tmp_path / "predicted.npz"
    write_submission(folder[0], BOARD, predicted, fixed_forces="predicted")
    with np.load(predicted) as found:
        assert found["id_forces"].any(axis=1).all()
    assert not check(predicted, Expectations(dataset=[str(dataset)])).problems
    with pytest.raises(UserError, match=r"ids are there more than once.* set ids=sid_fid"):
        write_submission(folder[0], BOARD, tmp_path / "no.npz", ids="sid")
    with pytest.raises(UserError, match="atoms=some; choose one of all, free"):
        write_submission(folder[0], BOARD, tmp_path / "no.npz", atoms="some")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["free.npz", "predicted.npz"]


def test_unique_sids(tmp_path: Path) -> None:
    """They are the ids, with no fid needed; both forms are accepted against the data."""
    frames = {split: slabs(number, 3, frames=1) for number, split in enumerate(OC20_SPLITS)}
    dataset = make_test_set(tmp_path / "set", frames)
    predictions(tmp_path / "run", frames)
    for board in ("oc20_s2ef", "oc20_is2re"):
        chosen = write_submission(tmp_path / "run", BOARDS[board], tmp_path / "file.npz")
        assert chosen["ids"] == "sid"
        with np.load(tmp_path / "file.npz") as found:
            assert list(found["id_ids"]) == [atoms.info["sid"] for atoms in frames["id"]]
            assert len(found) == 4 * len(BOARDS[board].fields)
        assert not check(tmp_path / "file.npz", Expectations(dataset=[str(dataset)])).problems
    write_submission(tmp_path / "run", BOARD, tmp_path / "file.npz", ids="sid_fid")
    assert not check(tmp_path / "file.npz", Expectations(dataset=[str(dataset)])).problems


def test_oc22(tmp_path: Path) -> None:
    """Two splits; total energies are wanted there, and refused by OC20."""
    frames = {split: slabs(number, 3) for number, split in enumerate(("id", "ood"))}
    predictions(tmp_path / "run", frames, energy=-50.0)
    write_submission(tmp_path / "run", BOARDS["oc22_s2ef_total"], tmp_path / "oc22.npz")
    assert not check(tmp_path / "oc22.npz").problems
    with pytest.raises(UserError, match="no predictions of ood_ads, ood_cat, ood_both: OC20 S2EF"):
        write_submission(tmp_path / "run", BOARD, tmp_path / "oc20.npz")
    predictions(tmp_path / "low", frames)
    write_submission(tmp_path / "low", BOARDS["oc22_s2ef_total"], tmp_path / "oc22.npz")
    assert any("wants total energies" in line for line in check(tmp_path / "oc22.npz").problems)


def test_missing_part(tmp_path: Path, frames: dict) -> None:
    predictions(tmp_path, frames)
    part_path(tmp_path, "ood_cat", 1).unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 12 parts, first part-00001\.npz of ood_cat"):
        write_submission(tmp_path, BOARD, tmp_path / "file.npz")
    assert not (tmp_path / "file.npz").exists()


# ------------------------------------------------------------------------- spoiled files


def change(name: str, function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], None]:
    """Replace one array."""

    def spoil(arrays: Arrays) -> None:
        arrays[name] = function(arrays[name].copy())

    return spoil


def put(where: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def function(array: np.ndarray) -> np.ndarray:
        array[where] = value
        return array

    return function


def without_split(arrays: Arrays) -> None:
    for field in BOARD.fields:
        del arrays[f"ood_cat_{field}"]


def swap_splits(arrays: Arrays) -> None:
    for field in BOARD.fields:
        one, other = f"id_{field}", f"ood_cat_{field}"
        arrays[one], arrays[other] = arrays[other], arrays[one]


def repeat_split(arrays: Arrays) -> None:
    for field in BOARD.fields:
        arrays[f"ood_both_{field}"] = arrays[f"ood_ads_{field}"]


def swap_ids(one: int, other: int) -> Callable[[np.ndarray], np.ndarray]:
    def function(ids: np.ndarray) -> np.ndarray:
        ids[[one, other]] = ids[[other, one]]
        return ids

    return function


def repeat_structure(arrays: Arrays) -> None:
    """As the padding of distributed samplers does."""
    first = arrays["id_chunk_idx"][0]
    rows = len(arrays["id_forces"])
    arrays["id_ids"] = np.append(arrays["id_ids"], arrays["id_ids"][:1])
    arrays["id_energy"] = np.append(arrays["id_energy"], arrays["id_energy"][:1])
    arrays["id_forces"] = np.concatenate([arrays["id_forces"], arrays["id_forces"][:first]])
    arrays["id_chunk_idx"] = np.append(arrays["id_chunk_idx"], rows)


def drop_structure(arrays: Arrays) -> None:
    last = arrays["id_chunk_idx"][-1]
    arrays["id_ids"], arrays["id_energy"] = arrays["id_ids"][:-1], arrays["id_energy"][:-1]
    arrays["id_forces"] = arrays["id_forces"][:last]
    arrays["id_chunk_idx"] = arrays["id_chunk_idx"][:-1]


def free_only(arrays: Arrays) -> None:
    for split in OC20_SPLITS:
        forces, cuts = arrays[f"{split}_forces"], arrays[f"{split}_chunk_idx"]
        free = forces.any(axis=1)
        arrays[f"{split}_chunk_idx"] = np.cumsum(free)[cuts - 1]
        arrays[f"{split}_forces"] = forces[free]


def shift_structures(arrays: Arrays) -> None:
    """Each structure has the forces of the one before it, with their number."""
    forces = np.split(arrays["id_forces"], arrays["id_chunk_idx"])
    forces = forces[-1:] + forces[:-1]
    arrays["id_forces"] = np.concatenate(forces)
    arrays["id_chunk_idx"] = np.cumsum([len(force) for force in forces])[:-1]


SPOILED = {
    "a split is missing": (without_split, "ood_cat_ids is missing"),
    "a misspelt key": (
        lambda arrays: arrays.update(id_force=arrays.pop("id_forces")),
        "id_force is no array of OC20 S2EF (instead of id_forces?)",
    ),
    "splits swapped": (swap_splits, "id_ids: 12 are not in the data set"),
    "a split twice": (repeat_split, "ood_both_ids: 12 are in ood_ads_ids too"),
    "ids of different sizes swapped": (
        change("id_ids", swap_ids(0, 3)), "2 structures have another number of forces",
    ),
    "ids of one size swapped": (
        change("id_ids", swap_ids(0, 1)), "2 are in another order than in the data set",
    ),
    "an id twice": (change("id_ids", lambda ids: ids[[0, 0, *range(2, 12)]]), "more than once"),
    "a structure twice": (repeat_structure, "id_ids: 1 are there more than once"),
    "a structure missing": (drop_structure, "id_ids: 1 are missing, first"),
    "a foreign id": (
        change("id_ids", lambda ids: np.array(["random7_0", *ids[1:]])),
        "id_ids: 1 are not in the data set, first random7_0",
    ),
    "sids that are not unique": (
        change("id_ids", lambda ids: np.array([name.partition("_")[0] for name in ids])),
        "ids are sid, which several structures share",
    ),
    "ids as bytes": (change("id_ids", lambda ids: ids.astype("S")), "strings are expected"),
    "cuts out of order": (
        change("id_chunk_idx", lambda cuts: cuts[::-1]), "id_chunk_idx falls, first at",
    ),
    "cuts with the end": (
        lambda arrays: arrays.update(
            id_chunk_idx=np.append(arrays["id_chunk_idx"], len(arrays["id_forces"]))
        ),
        "leave out the last",
    ),
    "cuts with the start": (
        change("id_chunk_idx", lambda cuts: np.insert(cuts, 0, 0)), "leave out the first",
    ),
    "cuts out of range": (change("id_chunk_idx", put(-1, 10**6)), "cuts outside of 0 to"),
    "cuts off by one": (
        change("id_chunk_idx", lambda cuts: cuts + 1), "another number of forces than in the",
    ),
    "cuts as floats": (
        change("id_chunk_idx", lambda cuts: cuts.astype(float)), "integers are expected",
    ),
    "NaN": (change("ood_ads_energy", put(3, np.nan)), "1 values are NaN or infinite, first 3"),
    "infinite forces": (
        change("id_forces", put(7, np.inf)), "id_forces: 3 values are NaN or infinite, first 7",
    ),
    "float16": (
        change("id_energy", lambda energy: energy.astype(np.float16)), "is of type float16",
    ),
    "float16 in float32": (
        change("id_energy", lambda energy: energy.astype(np.float16).astype(np.float32)),
        "id_energy has float16 precision",
    ),
    "float64": (change("id_forces", lambda f: f.astype(np.float64)), "is of type float64"),
    "energies as strings": (
        change("id_energy", lambda energy: energy.astype(str)), "float32 is expected",
    ),
    "too few energies": (change("id_energy", lambda e: e[1:]), "has 11 values for 12 ids"),
    "energies in a column": (change("id_energy", lambda e: e[:, None]), "has shape (12, 1)"),
    "constant energies": (change("id_energy", lambda e: 0 * e + 1.5), "constant (1.5 eV)"),
    "total energies": (change("id_energy", lambda e: e - 300), "these look like total ones"),
    "fixed atoms missing": (free_only, "are those of free atoms, all are expected"),
    "transposed forces": (change("id_forces", lambda f: f.T), "(transposed), not (N, 3)"),
    "zero forces": (change("id_forces", lambda f: 0 * f), "id_forces are all zero"),
    "rows shifted by one": (
        change("id_forces", lambda f: np.roll(f, 1, axis=0)), "rows have changed places",
    ),
    "structures shifted by one": (shift_structures, "ids or forces have changed places"),
    "pickled objects": (
        change("id_ids", lambda ids: ids.astype(object)), "id_ids holds pickled objects",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled(name: str, tmp_path: Path, good: Path, dataset: Path, capsys) -> None:
    """Refused with exit code 1 and the reason in a line."""
    spoil, reason = SPOILED[name]
    with np.load(good) as stored_arrays:
        arrays = dict(stored_arrays)
    spoil(arrays)
    path = tmp_path / "spoiled.npz"
    np.savez(path, **arrays)
    with pytest.raises(SystemExit) as refusal:
        main(["submission", "check", str(path), "--dataset", str(dataset)])
    assert refusal.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("problem: ") and reason in line for line in lines), lines


def test_damaged_files(tmp_path: Path, good: Path) -> None:
    """Cut off, changed by one bit, not an archive, or with a pickle that would run something."""
    content = good.read_bytes()
    path = tmp_path / "file.npz"
    for wrong in (content[: len(content) // 2], content[:-30], b"PK", b""):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match=r"no \.npz file, or is cut off"):
            check(path)
    with zipfile.ZipFile(good) as archive:
        start = archive.getinfo("ood_cat_forces.npy").header_offset
    changed = bytearray(content)
    changed[start + 400] ^= 1
    path.write_bytes(changed)
    damaged = [line for line in check(path).problems if line.endswith("the file is damaged")]
    assert [line.split()[0] for line in damaged] == ["ood_cat_forces"]
    np.savez(path, id_ids=np.array([_Runs()], object))
    assert "id_ids holds pickled objects; store an array of plain values" in check(path).problems
    assert not Path("executed").exists()
    with pytest.raises(UserError, match="no file"):
        check(tmp_path / "other.npz")


class _Runs:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


def test_pickle_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap of the test before works."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(_Runs()))
    assert Path("executed").exists()


def test_off_by_one_without_data(tmp_path: Path, folder: tuple[Path, Arrays]) -> None:
    """Forces that sum to zero in each structure show where the cuts belong."""
    arrays = dict(folder[1])
    for split in OC20_SPLITS:
        forces = np.split(arrays[f"{split}_forces"], arrays[f"{split}_chunk_idx"])
        arrays[f"{split}_forces"] = np.concatenate([f - f.mean(axis=0) for f in forces])
    np.savez(tmp_path / "file.npz", **arrays)
    assert not check(tmp_path / "file.npz").problems
    arrays["id_chunk_idx"] = arrays["id_chunk_idx"] - 1
    np.savez(tmp_path / "file.npz", **arrays)
    (problem,) = check(tmp_path / "file.npz").problems
    assert problem == (
        "id_chunk_idx is off by one: forces cut 1 row later sum to zero in each structure"
    )


def test_limits_and_order(tmp_path: Path, good: Path, dataset: Path) -> None:
    """A limit of size; another order of structures is accepted when said, and only then."""
    (problem,) = check(good, Expectations(max_gib=1e-6)).problems
    assert "more than 1e-06" in problem
    with np.load(good) as found:
        arrays = dict(found)
    forces = np.split(arrays["id_forces"], arrays["id_chunk_idx"])
    order = np.random.default_rng(0).permutation(len(forces))
    arrays["id_ids"], arrays["id_energy"] = arrays["id_ids"][order], arrays["id_energy"][order]
    arrays["id_forces"] = np.concatenate([forces[place] for place in order])
    arrays["id_chunk_idx"] = np.cumsum([len(forces[place]) for place in order])[:-1]
    np.savez(tmp_path / "file.npz", **arrays)
    expected = Expectations(dataset=[str(dataset)])
    (problem,) = check(tmp_path / "file.npz", expected).problems
    assert "another order than in the data set" in problem
    expected = Expectations(dataset=[str(dataset)], any_order=True)
    assert not check(tmp_path / "file.npz", expected).problems


def test_places(dataset: Path, good: Path) -> None:
    """Data given split by split; a split that is not there or unknown."""
    words = [f"{split}={dataset / f'test_{split}'}" for split in OC20_SPLITS]
    assert not check(good, Expectations(dataset=words)).problems
    with pytest.raises(UserError, match=r"no data of split ood_both .* --dataset ood_both=PATH"):
        check(good, Expectations(dataset=words[:3]))
    with pytest.raises(UserError, match="OC20 S2EF has no split train"):
        check(good, Expectations(dataset=[*words, "train=x"]))
