"""What cannot be used is named with file, index and reason; everything else is converted."""

from __future__ import annotations

import csv
import hashlib
import json
import lzma

import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from data_helpers import labelled_atoms, stored
from escaip_fairchem.cli import main
from escaip_fairchem.data import work
from escaip_fairchem.data.convert import convert
from escaip_fairchem.data.formats import registry
from escaip_fairchem.data.formats.base import Card, Format, Part, Record
from escaip_fairchem.errors import UserError


@pytest.fixture(autouse=True)
def data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("ESCAIP_DATA", str(tmp_path / "root"))
    return tmp_path / "root"


def rejected(out):
    """Rows of the list of what was left out: file name, index and reason."""
    with (out / "rejected.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [(row["file"].rpartition("/")[2], int(row["index"]), row["reason"]) for row in rows]


def indices(out, *sides):
    """``info['index']`` of everything that was converted."""
    return sorted(a.info["index"] for side in sides for a in stored(out / side))


def frames_as_text(n_frames, tmp_path):
    """Frames as extxyz, one text each."""
    write(tmp_path / "plain.extxyz", labelled_atoms(n_frames))
    lines = (tmp_path / "plain.extxyz").read_text().splitlines(keepends=True)
    return ["".join(lines[i : i + 10]) for i in range(0, len(lines), 10)]  # 8 atoms


def test_defects_of_single_frames(tmp_path, capsys):
    texts = frames_as_text(9, tmp_path)
    texts[1] = texts[1].replace("energy=", "energy=nan old=")
    texts[3] = texts[3].replace("energy=", "other=")
    lines = texts[4].splitlines(keepends=True)
    texts[4] = "".join([*lines[:4], "Cu 1.0 garbage\n", *lines[5:]])
    texts[6] = texts[6].replace("Cu ", "Qq ", 1)
    (tmp_path / "in.extxyz").write_text("".join(texts))
    out = tmp_path / "out"
    assert main(["convert", str(tmp_path / "in.extxyz"), str(out)]) == 0
    found = rejected(out)
    assert [(name, index) for name, index, _ in found] == [("in.extxyz", i) for i in (1, 3, 4, 6)]
    assert found[0][2] == "the energy is nan; remove the structure"
    assert found[1][2].startswith("no energy; name the key")
    assert "Qq" in found[3][2]
    assert indices(out, "train", "val") == [0, 2, 5, 7, 8]
    assert "left out: 4, listed in" in capsys.readouterr().out


def test_a_lost_line_ends_the_file_but_not_the_others(tmp_path):
    texts = frames_as_text(5, tmp_path)
    texts[2] = texts[2].split("\n", 3)[3]
    (tmp_path / "a.extxyz").write_text("".join(texts))
    (tmp_path / "b.extxyz").write_text("".join(texts[3:]))
    convert([tmp_path / "a.extxyz", tmp_path / "b.extxyz"], tmp_path / "out")
    ((name, index, reason),) = rejected(tmp_path / "out")
    assert (name, index) == ("a.extxyz", 2)
    assert reason.startswith("all from here on: ASE cannot read")
    assert indices(tmp_path / "out", "train", "val") == [0, 1, 3, 4]
    with pytest.raises(UserError, match=r"a\.extxyz, from frame 2 on: ASE cannot read"):
        convert([tmp_path / "a.extxyz"], tmp_path / "strict", strict=True)
    assert not (tmp_path / ".strict.partial").exists()


def test_a_truncated_archive_gives_what_is_whole(tmp_path):
    text = "".join(frames_as_text(200, tmp_path)).encode()
    packed = lzma.compress(text)
    (tmp_path / "in.extxyz.xz").write_bytes(packed[: len(packed) // 2])
    convert([tmp_path / "in.extxyz.xz"], tmp_path / "out")
    ((name, index, reason),) = rejected(tmp_path / "out")
    assert name == "in.extxyz.xz"
    assert "EOFError" in reason
    assert 20 < index < 180
    assert indices(tmp_path / "out", "train", "val") == list(range(index))


def test_blank_lines_do_not_end_a_file(tmp_path):
    texts = frames_as_text(4, tmp_path)
    (tmp_path / "in.extxyz").write_text("\n".join([*texts[:2], "", *texts[2:], ""]))
    convert([tmp_path / "in.extxyz"], tmp_path / "out")
    assert indices(tmp_path / "out", "train", "val") == [0, 1, 2, 3]


def test_an_input_given_twice_is_refused(tmp_path):
    """Its frames would be doubled, and their twins on the other side of the split."""
    source = tmp_path / "plain.extxyz"
    frames_as_text(4, tmp_path)
    (tmp_path / "link.extxyz").symlink_to(source)
    for other in (source, tmp_path / "link.extxyz"):
        with pytest.raises(UserError, match=r"plain\.extxyz is given twice"):
            convert([source, other], tmp_path / "out")
        with pytest.raises(UserError, match=r"plain\.extxyz is given twice"):
            convert([source], tmp_path / "out", val=[other])


def test_only_data_sets_are_replaced(tmp_path):
    """The last input may stand where OUT was forgotten."""
    frames_as_text(4, tmp_path)
    source, other = tmp_path / "plain.extxyz", tmp_path / "other.extxyz"
    other.write_bytes(source.read_bytes())
    with pytest.raises(UserError, match=r"other\.extxyz is a file; name the folder to make last"):
        convert([source], other, overwrite=True)
    assert other.read_bytes() == source.read_bytes()
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="results is no converted data set, so it is not replaced"):
        convert([source], folder, overwrite=True)
    assert (folder / "thesis.tex").read_text() == "precious"


def test_a_setting_that_is_no_yaml(tmp_path, capsys):
    argv = ["convert", str(tmp_path / "x"), str(tmp_path / "out"), "--set", "energy_key=[1"]
    assert main(argv) == 2
    assert "--set energy_key=[1: the value is no YAML" in capsys.readouterr().err


def test_reasons_are_one_short_line():
    reason = work.reason_of(UserError("a\nb\ud800" + "c" * 10_000))
    assert reason.startswith("a b\\ud800c")
    assert len(reason) < 600


def test_wrong_units_are_found_early(tmp_path, monkeypatch):
    """Not after all of a large set was read."""
    frames = labelled_atoms(12)
    for atoms in frames:
        results = atoms.calc.results
        results["forces"] = 30 * results["forces"] / np.sqrt(np.mean(results["forces"] ** 2))
    write(tmp_path / "in.traj", frames)
    taken = []
    take = work._take
    monkeypatch.setattr(work, "_take", lambda *args: (taken.append(1), take(*args)))
    monkeypatch.setattr(work, "RECORDS_PER_CHUNK", 4)
    with pytest.raises(UserError, match=r"in\.traj, first 4 frames: the median force rms.* is 30"):
        convert([tmp_path / "in.traj"], tmp_path / "out")
    assert len(taken) == 4
    convert([tmp_path / "in.traj"], tmp_path / "out", check_units=False)


class Numbered(Format):
    """Frames whose ids are given by a file of numbers; it must come in two parts."""

    name = "numbered"
    summary = "for tests"

    @classmethod
    def claims(cls, path):
        return path.suffix == ".numbers"

    def parts(self, paths):
        return [Part((path,)) for path in paths]

    def read(self, part):
        frames = labelled_atoms(10)
        for index, word in enumerate(part.paths[0].read_text().split()):
            yield Record(index, lambda i=int(word): frames[i], name=f"key {word}", id=word)

    def card(self, paths):
        return Card(data="Numbers", energy="total", theory="EMT", notes=("none",))


@pytest.fixture
def numbered(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "formats", lambda: iter([Numbered]))
    for name, numbers in (("a", "0 1 2 1"), ("b", "3 0 4 5")):
        (tmp_path / f"{name}.numbers").write_text(numbers)
    return [tmp_path / "a.numbers", tmp_path / "b.numbers"]


def test_of_one_id_the_first_stays(numbered, tmp_path):
    convert(numbered, tmp_path / "out")
    assert rejected(tmp_path / "out") == [
        ("a.numbers", 3, f"same id as {numbered[0]}, frame 1"),
        ("b.numbers", 1, f"same id as {numbered[0]}, frame 0"),
    ]
    assert indices(tmp_path / "out", "train", "val") == [0, 1, 2, 3, 4, 5]
    card = json.loads((tmp_path / "out/dataset.json").read_text())
    assert card["rejected"] == {"records": 2, "duplicates": 2}


def test_official_validation_files(numbered, tmp_path, capsys):
    convert(numbered[:1], tmp_path / "out", val=numbered[1:])
    assert indices(tmp_path / "out", "train") == [0, 1, 2]
    assert indices(tmp_path / "out", "val") == [0, 3, 4, 5]  # one id may be on both sides
    card = json.loads((tmp_path / "out/dataset.json").read_text())
    assert card["conversion"]["split"] == "official validation files"


def test_structures_without_labels(tmp_path, capsys, data_root):
    frames = labelled_atoms(3)
    for atoms in frames:
        atoms.calc = None
    frames[1].positions[2] = np.nan
    write(tmp_path / "in.extxyz", frames)
    argv = ["convert", str(tmp_path / "in.extxyz"), str(tmp_path / "out"), "--unlabelled"]
    assert main(argv) == 0
    assert "out: 2 frames without labels" in capsys.readouterr().out
    found = stored(tmp_path / "out/test")
    assert [atoms.calc for atoms in found] == [None, None]
    np.testing.assert_allclose(found[1].positions, frames[2].positions, atol=1e-7)
    assert np.load(tmp_path / "out/test/metadata.npz")["natoms"].tolist() == [8, 8]
    assert [index for _, index, _ in rejected(tmp_path / "out")] == [1]
    assert not data_root.exists()


def test_charge_and_spin_under_other_names(tmp_path):
    frames = labelled_atoms(2)
    for atoms in frames:
        atoms.info |= {"total_charge": -1.0, "multiplicity": 3}
    write(tmp_path / "in.extxyz", frames)
    keys = ["--charge-key", "total_charge", "--spin-key", "multiplicity"]
    assert main(["convert", str(tmp_path / "in.extxyz"), str(tmp_path / "out"), *keys]) == 0
    (atoms,) = stored(tmp_path / "out/train")
    assert (atoms.info["charge"], atoms.info["spin"]) == (-1, 3)
    with pytest.raises(UserError, match=r"no charge under 'q' \(info has .*total_charge"):
        convert([tmp_path / "in.extxyz"], tmp_path / "b", settings={"charge_key": "q"})


def test_the_card_tells_what_is_in_the_set(tmp_path):
    frames = labelled_atoms(12)
    energies = np.array([atoms.get_potential_energy() for atoms in frames])
    forces = [atoms.calc.results["forces"] for atoms in frames]
    for atoms in frames[:4]:
        atoms.symbols[1] = "Ni"
        atoms.calc = SinglePointCalculator(atoms, **atoms.calc.results)
    source = tmp_path / "in.traj"
    write(source, frames)
    convert([source], tmp_path / "out", label="cu")
    card = json.loads((tmp_path / "out/dataset.json").read_text())
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    expected = {"path": str(source), "size": source.stat().st_size, "sha256": digest}
    assert card["files"] == [expected]
    assert card["label"] == "cu"
    sets = card["sets"]
    train = [atoms.info["index"] for atoms in stored(tmp_path / "out/train")]
    assert (sets["train"]["frames"], sets["val"]["frames"]) == (11, 1)
    assert sets["train"]["energy"] == [energies[train].min(), energies[train].max()]
    n_nickel = sum(index < 4 for index in train)
    assert sets["train"]["elements"] == {
        "Ni": {"frames": n_nickel, "atoms": n_nickel},
        "Cu": {"frames": 11, "atoms": 88 - n_nickel},
    }
    bins = sets["train"]["natoms"]
    assert dict(zip(bins["from"], bins["frames"], strict=True))[5] == sum(bins["frames"]) == 11
    free = np.concatenate([forces[index][1:] for index in train])
    assert sets["train"]["force_rms_free_atoms"] == pytest.approx(np.sqrt((free**2).mean()))
    counts = np.array([[index < 4, 8 - (index < 4)] for index in train], dtype=float)
    rest = energies[train] - counts @ np.linalg.lstsq(counts, energies[train])[0]
    above = sets["train"]["energy_above_references"]
    assert above["rms"] == pytest.approx(np.sqrt((rest**2).mean()), abs=1e-9)
    assert above["max"] == pytest.approx(rest.max(), abs=1e-9)
