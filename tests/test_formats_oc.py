"""OC20 and OC22 originals: text pairs."""

from __future__ import annotations

import gzip
import io
import lzma
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from ase.io import read, write

from escaip_fairchem.data.formats import extxyz
from escaip_fairchem.data.formats.oc20_text import OC20Text
from escaip_fairchem.errors import UserError
from oc_files import (
    assert_equal,
    built,
    oc20_frame,
    pack,
    slabs,
    write_pair,
    write_trajectories,
)

if TYPE_CHECKING:
    from ase import Atoms


@pytest.fixture(scope="module")
def real_frames(test_data) -> list[Atoms]:
    """Real relaxations of OC20, total energies."""
    with gzip.open(test_data / "oc20_sample.extxyz.gz", "rt") as file:
        text = io.StringIO(file.read())  # ASE seeks, which is slow in a compressed file
    return read(text, ":500", format="extxyz")


@pytest.mark.parametrize("packed", [True, False])
def test_pairs_in_folders(tmp_path, packed):
    frames = slabs()
    folder = tmp_path / "s2ef_train_200K" / "s2ef_train_200K"
    references = [-3.25 - 1e-7 * i for i in range(6)]
    write_pair(folder, "10", frames[4:], references[4:], packed=packed)
    write_pair(folder, "2", frames[:4], references[:4], packed=packed)
    for energy in ("referenced", "total"):
        got = built(OC20Text(energy=energy), tmp_path)
        for atoms, source, reference in zip(got, frames, references, strict=True):
            total = float(source.calc.results["energy"])
            expected = total - reference if energy == "referenced" else total
            assert_equal(atoms, source, energy=expected)
            assert atoms.info == {
                "sid": str(source.info["sid"]),
                "fid": source.info["fid"],
                "reference_energy": reference,
            }
    reader = OC20Text()
    ids = [record.id for part in reader.parts([tmp_path]) for record in reader.read(part)]
    assert ids == ["100_0", "100_7", "100_14", "101_0", "101_7", "101_14"]


def test_trajectories_and_archives(tmp_path):
    frames = slabs()
    systems = {"100": frames[:3], "101": frames[3:]}
    write_trajectories(tmp_path / "0", systems, {"100": -1.5, "101": -2.5})
    write_pair(tmp_path / "s2ef_md", "0", frames, [-1.0] * 6)
    for name in ("0", "s2ef_md"):
        pack(tmp_path / name, tmp_path / f"{name}.tar")
    for source in (tmp_path / "0", tmp_path / "0.tar"):
        got = built(OC20Text(), source)
        assert [atoms.info["fid"] for atoms in got] == [0, 1, 2, 0, 1, 2]
        for atoms, expected, reference in zip(got, frames, 3 * [-1.5] + 3 * [-2.5], strict=True):
            total = float(expected.calc.results["energy"])
            assert_equal(atoms, expected, energy=total - reference)
    got = built(OC20Text(energy="total"), tmp_path / "s2ef_md.tar")
    for atoms, expected in zip(got, frames, strict=True):
        assert_equal(atoms, expected)
    # MD frames carry the ids of the frames they started from, so these are no duplicates.
    for source in (tmp_path / "s2ef_md", tmp_path / "s2ef_md.tar"):
        (part,) = OC20Text().parts([source])
        assert {record.id for record in OC20Text().read(part)} == {None}


def test_genuine_frames_are_read_as_ase_reads_them(real_frames, tmp_path):
    """Both ways of reading: the layout of OC20, and other keys and columns."""
    frames = real_frames[::20]
    for index, text in enumerate((None, "other")):
        path = tmp_path / f"{index}.extxyz"
        if text is None:
            path.write_text("".join(map(oc20_frame, frames)))
        else:
            write(path, frames)
        expected = read(path, ":")
        with path.open("rb") as stream:
            got = [frame.parse() for frame in extxyz.read_frames(stream)]
        for ours, theirs in zip(got, expected, strict=True):
            assert_equal(ours, theirs)
            assert ours.calc.results.keys() == theirs.calc.results.keys()
            assert ours.info.keys() == theirs.info.keys()
    assert len(got) > 20


def test_energies_and_forces_of_trajectories_fit_each_other(real_frames, tmp_path):
    """-F.dx is dE along real relaxations, through the published layout with references."""
    by_system: dict[int, list[Atoms]] = {}
    for atoms in real_frames:
        by_system.setdefault(atoms.info["sid"], []).append(atoms)
    steps = []
    for sid, trajectory in by_system.items():
        write_pair(tmp_path / str(sid), "0", trajectory, [-50.0] * len(trajectory))
        got = built(OC20Text(), tmp_path / str(sid))
        for before, after in pairwise(got):
            if after.info["fid"] - before.info["fid"] > 2:
                continue  # steps left out of the sample are too long
            moved = after.positions - before.positions
            if np.abs(moved).max() > 0.05:
                continue
            mean = (before.calc.results["forces"] + after.calc.results["forces"]) / 2
            d_energy = after.get_potential_energy() - before.get_potential_energy()
            steps.append((-(mean * moved).sum(), d_energy))
    work, d_energy = np.array(steps).T
    assert len(work) > 50
    assert np.corrcoef(work, d_energy)[0, 1] > 0.99
    assert np.polyfit(work, d_energy, 1)[0] == pytest.approx(1, abs=0.05)


def test_text_defects_are_named(tmp_path):
    frames = slabs()
    write_pair(tmp_path, "0", frames, range(6))
    table = tmp_path / "0.txt.xz"
    lines = lzma.decompress(table.read_bytes()).decode().splitlines(keepends=True)

    def outcome(text: str) -> tuple[int, list[str]]:
        table.write_bytes(lzma.compress(text.encode()))
        n_good, errors = 0, []
        reader = OC20Text()
        try:
            for record in reader.read(reader.parts([tmp_path])[0]):
                try:
                    record.build()
                    n_good += 1
                except UserError as error:
                    errors.append(f"{record.index}: {error}")
        except UserError as error:
            errors.append(f"end: {error}")
        return n_good, errors

    good, (error,) = outcome("".join([*lines[:2], "random1;frame\n", *lines[3:]]))
    assert good == 5
    assert "2: " in error
    assert "0.txt.xz, line 3: 'random1;frame'" in error
    good, (error,) = outcome("".join(lines[:4]))
    assert (good, "0.txt.xz has 4 lines, but 0.extxyz.xz has more frames" in error) == (4, True)
    good, (error,) = outcome("".join([*lines, lines[0]]))
    assert (good, "ends after 6 frames, but" in error) == (6, True)
    without = "".join(line.rpartition(",")[0] + "\n" for line in lines)
    good, errors = outcome(without)
    assert (good, "energy=total" in errors[0], len(errors)) == (0, True, 6)
    table.unlink()
    assert not OC20Text.claims(tmp_path)
    with pytest.raises(UserError, match=r"0\.extxyz\.xz has no 0\.txt\.xz"):
        OC20Text().parts([tmp_path])
    with pytest.raises(UserError, match="energy=free: choose one of referenced, total"):
        OC20Text(energy="free")


def test_damaged_frames_are_named(tmp_path):
    frames = slabs(3)
    texts = [oc20_frame(atoms) for atoms in frames]
    write_pair(tmp_path, "0", frames, range(3), packed=False)
    path = tmp_path / "0.extxyz"

    def errors_of(text: str) -> list[str]:
        path.write_text(text)
        reader, errors = OC20Text(), []
        try:
            for record in reader.read(reader.parts([path])[0]):
                try:
                    record.build()
                except UserError as error:
                    errors.append(f"{record.index}: {error}")
        except UserError as error:
            errors.append(f"end: {error}")
        return errors

    first_row = texts[1].splitlines()[2]
    (error,) = errors_of(texts[0] + texts[1].replace(first_row, first_row[:30]) + texts[2])
    assert error.startswith("1: damaged frame")
    (error,) = errors_of(texts[0] + texts[1].replace(" F ", " ? ") + texts[2])
    assert error.startswith("1: damaged frame")
    lines = "".join(texts[:2]).splitlines(keepends=True)
    (error,) = errors_of("".join(lines[:-2]))
    assert "the file ends after 6 of 8 atoms" in error
    (error,) = errors_of(texts[0] + "".join(texts[1].splitlines(keepends=True)[1:]))
    assert "stands where a frame begins" in error
    packed = lzma.compress("".join(texts).encode())
    path.unlink()
    (tmp_path / "0.extxyz.xz").write_bytes(packed[:-30])
    reader = OC20Text()
    with pytest.raises(EOFError, match="end-of-stream"):
        list(reader.read(reader.parts([tmp_path])[0]))
