"""OC20 and OC22 originals: text pairs, LMDB files of fairchem 1, hostile pickles."""

from __future__ import annotations

import builtins
import gzip
import io
import lzma
import os
import pickle
import struct
import zipfile
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch

from data_helpers import labelled_atoms
from escaip_fairchem import LegacyLmdbDataset
from escaip_fairchem.data import store
from escaip_fairchem.data.datasets import create_dataset
from escaip_fairchem.data.formats import extxyz, safe_pickle
from escaip_fairchem.data.formats.legacy_lmdb import LegacyLmdb
from escaip_fairchem.data.formats.legacy_record import structures_of
from escaip_fairchem.data.formats.lmdb_pages import NumberedEntries
from escaip_fairchem.data.formats.oc20_text import OC20Text
from escaip_fairchem.errors import UserError
from oc_files import (
    legacy_fields,
    oc20_frame,
    pack,
    pickled,
    s2ef_fields,
    torch_file,
    write_lmdb,
    write_pair,
    write_trajectories,
)

if TYPE_CHECKING:
    from pathlib import Path

    from ase import Atoms

    from escaip_fairchem.data.formats.base import Format


@pytest.fixture(scope="module")
def real_frames(test_data) -> list[Atoms]:
    """Real relaxations of OC20, total energies."""
    with gzip.open(test_data / "oc20_sample.extxyz.gz", "rt") as file:
        text = io.StringIO(file.read())  # ASE seeks, which is slow in a compressed file
    return read(text, ":500", format="extxyz")


def built(reader: Format, *paths: Path) -> list[Atoms]:
    """Read everything."""
    assert all(type(reader).claims(path) for path in paths)
    return [record.build() for part in reader.parts(paths) for record in reader.read(part)]


def slabs(n_frames: int = 6) -> list[Atoms]:
    """EMT-labelled frames with ids and tags, of 8 decimals as text stores them."""
    frames = labelled_atoms(n_frames, sid=[100 + i // 3 for i in range(n_frames)])
    for index, atoms in enumerate(frames):
        atoms.info["fid"] = 7 * (index % 3)
        atoms.set_tags(np.arange(len(atoms)) % 3)
        atoms.positions = atoms.positions.round(8)
        atoms.calc.results = {k: np.round(v, 8) for k, v in atoms.calc.results.items()}
    return frames


def assert_equal(got: Atoms, expected: Atoms, *, energy: float | None = None, rtol=0.0) -> None:
    """Compare structure, tags, fixed atoms and labels; to all digits by default."""
    np.testing.assert_array_equal(got.numbers, expected.numbers)
    np.testing.assert_allclose(got.positions, expected.positions, rtol=rtol)
    np.testing.assert_allclose(got.cell.array, expected.cell.array, rtol=rtol)
    np.testing.assert_array_equal(got.pbc, expected.pbc)
    np.testing.assert_array_equal(got.get_tags(), expected.get_tags())
    fixed = [[i for c in atoms.constraints for i in c.index] for atoms in (got, expected)]
    assert fixed[0] == fixed[1]
    labels = expected.calc.results
    forces = got.get_forces(apply_constraint=False)
    np.testing.assert_allclose(forces, labels["forces"], rtol=rtol)
    energy = labels["energy"] if energy is None else energy
    assert got.get_potential_energy() == pytest.approx(energy, rel=1e-12, abs=0)


# OC20 text


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


# LMDB files of fairchem 1


@pytest.mark.parametrize("version", [1, 2])
def test_lmdb_of_both_versions(tmp_path, version):
    frames = slabs()
    values = [pickled(s2ef_fields(atoms), version) for atoms in frames]
    write_lmdb(tmp_path / "data.0002.lmdb", values[:4])
    write_lmdb(tmp_path / "data.0010.lmdb", {0: values[4], 3: values[5]}, length=False)
    got = built(LegacyLmdb(), tmp_path)
    for atoms, source in zip(got, frames, strict=True):
        single = source.copy()
        single.positions = source.positions.astype(np.float32)
        single.cell = source.cell.array.astype(np.float32)
        forces = source.calc.results["forces"].astype(np.float32)
        single.calc = SinglePointCalculator(
            single, energy=source.calc.results["energy"], forces=forces
        )
        assert_equal(atoms, single)
        assert atoms.info == {"sid": str(source.info["sid"]), "fid": source.info["fid"]}


def test_parts_share_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("escaip_fairchem.data.formats.legacy_lmdb.KEYS_PER_PART", 4)
    frames = slabs()
    values = [pickled(s2ef_fields(atoms), 2) for atoms in frames]
    keys = [0, 1, 2, 9, 10, 11]
    write_lmdb(tmp_path / "data.lmdb", dict(zip(keys, values, strict=True)))
    reader = LegacyLmdb()
    parts = reader.parts([tmp_path])
    assert [(part.start, part.stop) for part in parts] == [(0, 4), (4, 6)]
    records = [record for part in parts for record in reader.read(part)]
    assert [record.index for record in records] == list(range(6))
    assert [record.name for record in records] == list(map(str, keys))
    assert len({record.id for record in records}) == 6


def test_genuine_pickles(test_data):
    """Values equal what torch_geometric itself unpickles."""
    formats = test_data / "formats"
    for name in ("oc22_pickle16_train.pkl", "ani1x_pickle16_train.pkl"):
        with (formats / name).open("rb") as file:
            expected = pickle.load(file)
        for atoms, data in zip(built(LegacyLmdb(), formats / name), expected, strict=True):
            assert atoms.get_potential_energy() == data.y
            np.testing.assert_array_equal(atoms.get_forces(apply_constraint=False), data.force)
            np.testing.assert_array_equal(atoms.positions, data.pos)
            np.testing.assert_array_equal(atoms.numbers, data.atomic_numbers)
            assert atoms.info["sid"] == str(data.sid)
            assert atoms.info["fid"] == data.fid
            periodic = "oc22" in name
            assert atoms.pbc.tolist() == [periodic] * 3
            if periodic:
                np.testing.assert_array_equal(atoms.cell.array, data.cell[0])
                assert (atoms.info["nads"], atoms.info["oc22"]) == (data.nads, 1)
    batch = torch.load(formats / "OC20_batch_3.pt", weights_only=False)
    got = built(LegacyLmdb(), formats / "OC20_batch_3.pt")
    for atoms, data in zip(got, batch.to_data_list(), strict=True):
        assert atoms.get_potential_energy() == data.energy.item()
        np.testing.assert_array_equal(atoms.get_forces(apply_constraint=False), data.forces)
        np.testing.assert_array_equal(atoms.positions, data.pos)
        np.testing.assert_array_equal(atoms.get_tags(), data.tags)
        (constraint,) = atoms.constraints
        np.testing.assert_array_equal(constraint.index, torch.nonzero(data.fixed).ravel())
        assert atoms.info["sid"] == str(data.sid.item())
    assert [atoms.info["sid"] for atoms in got] == ["1246402", "2271895", "1668231"]


def test_genuine_is2re_layout(test_data):
    path = test_data / "formats" / "ocp_legacy_is2re_layout.lmdb"
    got = built(LegacyLmdb(), path)
    assert len(got) == 68
    assert all(atoms.calc is None for atoms in got)
    assert got[0].info["y_relaxed"] == -0.8713222080618858
    assert got[0].info["y_init"] == -2.555855710100681


def test_is2re(tmp_path):
    frames = slabs(2)
    relaxed = torch.tensor(frames[0].positions + 0.25, dtype=torch.float32)
    fields = legacy_fields(
        frames[0],
        sid=100,
        y_init=1.5,
        y_relaxed=0.25,
        pos_relaxed=relaxed,
        force=torch.ones(len(frames[0]), 3),
    )
    write_lmdb(tmp_path / "data.lmdb", [pickled(fields, 1)])
    (initial,) = built(LegacyLmdb(), tmp_path)
    assert initial.calc is None
    assert initial.info == {"sid": "100", "y_init": 1.5, "y_relaxed": 0.25}
    (final,) = built(LegacyLmdb(structure="relaxed"), tmp_path)
    np.testing.assert_array_equal(final.positions, relaxed)
    assert final.calc is None
    (labelled,) = built(LegacyLmdb(label_initial=True), tmp_path)
    assert labelled.calc.results["energy"] == 1.5
    assert (labelled.calc.results["forces"] == 1).all()
    with pytest.raises(UserError, match="choose one of initial, relaxed"):
        LegacyLmdb(structure="final")
    with pytest.raises(UserError, match="needs structure=initial"):
        LegacyLmdb(structure="relaxed", label_initial=True)


def test_unlabelled(tmp_path):
    fields = [legacy_fields(a, sid=a.info["sid"], fid=a.info["fid"]) for a in slabs()]
    write_lmdb(tmp_path / "data.lmdb", [pickled(values, 2) for values in fields])
    assert all(atoms.calc is None for atoms in built(LegacyLmdb(), tmp_path))


def test_oc20_references(tmp_path):
    """Total energies in float64: those of OC22 stay, OC20's get the reference added."""
    oc20, oc22 = slabs(6)[0], slabs(6)[3]
    values = [pickled(s2ef_fields(oc20), 1), pickled(s2ef_fields(oc22, oc22=1, nads=1), 2)]
    write_lmdb(tmp_path / "data" / "data.lmdb", values)
    reference = -75123.456789012345
    table = tmp_path / "oc20_ref.pkl"
    table.write_bytes(pickle.dumps({"random100": np.float64(reference)}))
    got = built(LegacyLmdb(oc20_references=str(table)), tmp_path / "data")
    expected = [oc20.calc.results["energy"] + reference, oc22.calc.results["energy"]]
    assert [atoms.get_potential_energy() for atoms in got] == pytest.approx(expected, rel=1e-15)
    config = {"src": str(tmp_path / "data"), "oc20_references": str(table)}
    atoms = LegacyLmdbDataset(config).get_atoms(0)
    assert atoms.get_potential_energy() == pytest.approx(expected[0], rel=1e-15)
    table.write_bytes(pickle.dumps({"random7": 1.0}, protocol=2))
    other = tmp_path / "other.pkl"
    table.rename(other)
    with pytest.raises(UserError, match="no energy of random100"):
        built(LegacyLmdb(oc20_references=str(other)), tmp_path / "data")
    with pytest.raises(UserError, match=r"oc20_ref\.pkl is no file"):
        LegacyLmdb(oc20_references=str(table))


def test_damaged_lmdb(tmp_path):
    frames = slabs()
    path = tmp_path / "data.lmdb"
    values = [pickled(s2ef_fields(atoms), 2) for atoms in frames]
    values[1] = values[1][:900]
    values[2] = pickled({"pos": torch.zeros(2, 3)}, 2)
    values[3] = pickled(s2ef_fields(frames[3]) | {"force": torch.zeros(5, 3)}, 1)
    values[4] = pickle.dumps({"pos": 1})
    write_lmdb(path, values)
    reader = LegacyLmdb()
    records = [record for part in reader.parts([path]) for record in reader.read(part)]
    errors = {}
    for record in records:
        try:
            record.build()
        except UserError as error:
            errors[record.name] = str(error)
    assert sorted(errors) == ["1", "2", "3", "4"]
    for key, words in {"1": "damaged", "2": "no field atomic_numbers", "4": "a dict is"}.items():
        assert words in errors[key]
    assert "field forces has shape (5, 3) instead of (8, 3)" in errors["3"]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    for reason in ("is cut short", "is no LMDB file"):
        (part,) = reader.parts([path])
        with pytest.raises(UserError, match=reason):
            list(reader.read(part))
        assert not LegacyLmdb.claims(path)
        path.write_bytes(b"what is this" * 1000)


def damage(path: Path, page: int) -> None:
    """Fill a page with numbers that lead anywhere."""
    with path.open("r+b") as file:
        file.seek(4096 * page)
        file.write(np.random.default_rng(0).bytes(4096))


@pytest.mark.parametrize("kind", ["leaf", "value"])
def test_a_damaged_lmdb_page_costs_its_own_entries(kind, tmp_path):
    """The pages are found by the library, in the undamaged file."""
    path = tmp_path / "data.lmdb"
    frames = slabs(6) * 80  # entries of several pages
    write_lmdb(path, [pickled(s2ef_fields(atoms), 2) for atoms in frames[:6]] * 80)
    whole = path.read_bytes()
    heads = [struct.unpack_from("<QHH", whole, start) for start in range(0, len(whole), 4096)]
    flag = 2 if kind == "leaf" else 4
    page = next(i for i, (own, _, kinds) in enumerate(heads[2:], 2) if own == i and kinds == flag)
    damage(path, page)
    reader = LegacyLmdb()
    records = [record for part in reader.parts([tmp_path]) for record in reader.read(part)]
    lost = [record for record in records if record.id is None]
    with pytest.raises(UserError, match=f"the {'page' if kind == 'leaf' else 'key 0'}.*damaged"):
        lost[0].build()
    assert len(lost) == 1
    kept = [record for record in records if record.id is not None]
    assert [record.index for record in records] == list(range(len(records)))
    assert len(frames) // 2 < len(kept) < len(frames)
    for record in kept:
        np.testing.assert_array_equal(
            record.build().positions, frames[int(record.name)].positions.astype(np.float32)
        )
    with pytest.raises(UserError, match=r"data\.lmdb: the .* is damaged"):
        LegacyLmdbDataset({"src": str(path)})


def test_any_damage_of_lmdb_is_survived(tmp_path):
    """What is given for a key is its value, unless the damage is in the value itself."""
    path = tmp_path / "data.lmdb"
    random = np.random.default_rng(0)
    values = [random.bytes(size) for size in random.choice([40, 300, 3000, 9000], 200)]
    write_lmdb(path, values)
    whole = path.read_bytes()
    pages = range(0, len(whole), 4096)
    tree = [i for i in pages if struct.unpack_from("<H", whole, i + 10)[0] in (1, 2)]
    outcomes = set()
    for start in [*tree, *pages[:2]] * 4:
        spoiled = bytearray(whole)
        for place in start + random.integers(0, 64, 3):
            spoiled[place] ^= 1 << random.integers(8)
        path.write_bytes(spoiled)
        try:
            entries = NumberedEntries(path)
        except UserError:
            outcomes.add("refused")
            continue
        outcomes.add("damaged" if entries.damaged else "whole")
        for key in entries.keys.tolist():
            assert len(entries[key]) <= len(whole)
    assert outcomes >= {"refused", "damaged"}


# Hostile pickles


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(canary: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that would make a file, and the names that they must be refused for."""
    shell, code = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    system = Call(os.system, shell)
    chain = Call(getattr, Call(builtins.__import__, "os"), "system")
    nested = pickle.dumps(system, protocol=2)
    inner = Call(torch.storage._load_from_bytes, nested)
    legacy = torch_file(torch.zeros(2), zipped=False)
    script = io.BytesIO()
    torch.jit.save(torch.jit.trace(lambda x: x + 1, torch.zeros(1)), script)
    return {
        "os.system": (pickle.dumps(system), "posix.system"),
        "protocol 0": (pickle.dumps(system, protocol=0), "posix.system"),
        "eval": (pickle.dumps(Call(eval, code)), "builtins.eval"),
        "getattr": (pickle.dumps(chain), "builtins.getattr"),
        "dotted": (b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.", "torch.os.system"),
        "as a field": (pickled({"pos": torch.zeros(1, 3), "x": system}, 2), "posix.system"),
        "old, as a field": (pickled({"pos": torch.zeros(1, 3), "x": system}, 1), "posix.system"),
        "in a tensor": (pickle.dumps(inner), "posix.system"),
        "pickle.loads": (pickle.dumps(Call(pickle.loads, nested)), "_pickle.loads"),
        "torch.load": (pickle.dumps(Call(torch.load, "x")), "torch.serialization.load"),
        "torch file": (torch_file({"a": system}, zipped=True), "posix.system"),
        "old torch file": (torch_file({"a": system}, zipped=False), "posix.system"),
        "behind a torch file": (legacy[:14] + nested + legacy, "posix.system"),
        "script": (script.getvalue(), "__torch__"),
        "numpy objects": (pickle.dumps(np.array([system], dtype=object)), "type O8"),
        "class of jit": (b"\x80\x02ctorch.jit._pickle\nbuild_intlist\n.", "torch.jit._pickle"),
        "copyreg": (b"\x80\x02ccopyreg\n_reconstructor\n.", "copyreg._reconstructor"),
    }


def test_hostile_pickles_are_refused(tmp_path):
    canary = tmp_path / "canary"
    cases = hostile(canary)
    for name, (data, refused) in cases.items():
        with pytest.raises(UserError) as error:
            safe_pickle.loads(data)
        assert refused in str(error.value), name
        assert not canary.exists(), name
    pickle.loads(cases["os.system"][0])  # what it would have done
    assert canary.exists()


def test_small_pickles_take_no_large_memory():
    """Each would fill gigabytes, or show what memory holds."""
    text = b"\x80\x02"
    array = (
        text + b"cnumpy\nndarray\n)R(K\x01J\x00\xe1\xf5\x05\x85cnumpy\ndtype\n(U\x02f8tR\x89Ntb."
    )
    expanded = torch.zeros(1).expand(10**9)
    storage = (
        text
        + b"ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK"
        b"\x01tQ}U\x04dataNsbK\x00K\x05\x85K\x01\x85\x89NtR."
    )
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a/data.pkl", pickle.dumps(1))
    state = io.BytesIO()
    with zipfile.ZipFile(state, "w") as packed:
        packed.writestr("a/data.pkl", storage)
        packed.writestr("a/data/0", bytes(4))
    cases = {
        "numbers a value 4294967295": text + b"]r\xff\xff\xff\xff.",
        "numbers a value 99999999": text + b"]p99999999\n.",
        "values are a NoneType": array,
        "tensor of 1000000000 values": pickle.dumps(expanded),
        "compressed inside": archive.getvalue(),
        "no attribute '__dict__'": state.getvalue(),
    }
    for reason, data in cases.items():
        with pytest.raises(UserError, match=reason):
            safe_pickle.loads(data)
    assert safe_pickle.loads(text + b"]r\x05\x00\x00\x000h\x05.") == []  # what pickle allows


def test_hostile_records_cost_themselves(tmp_path):
    frames = slabs(3)
    values = [pickled(s2ef_fields(atoms), 2) for atoms in frames]
    values[1] = hostile(tmp_path / "canary")["as a field"][0]
    write_lmdb(tmp_path / "data.lmdb", values)
    reader = LegacyLmdb()
    (part,) = reader.parts([tmp_path])
    records = list(reader.read(part))
    assert [record.id for record in records] == ["100_0", None, "100_14"]
    with pytest.raises(UserError, match=r"asks for posix\.system"):
        records[1].build()
    assert len(records[2].build()) == len(frames[2])
    (tmp_path / "oc20_ref.pkl").write_bytes(values[1])
    with pytest.raises(UserError, match=r"asks for posix\.system"):
        next(LegacyLmdb(oc20_references=str(tmp_path / "oc20_ref.pkl")).read(part)).build()
    assert not (tmp_path / "canary").exists()


def test_tensors_equal_what_torch_reads():
    """Types, views of shared memory, offsets, strides, empty and scalar tensors; both layouts."""
    base = torch.arange(24, dtype=torch.float64).reshape(4, 6)
    tensors = {
        "strided": base[1:, ::2],
        "transposed": base.T,
        "expanded": torch.ones(1, 3).expand(2, 3),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
        "bool": torch.tensor([True, False]),
        "half": torch.tensor([1.5], dtype=torch.float16),
        "bytes": torch.tensor([1, 255], dtype=torch.uint8),
        "parameter": torch.nn.Parameter(torch.tensor([0.1])),
    }
    blobs = [pickle.dumps(tensors), *(torch_file(tensors, zipped=z) for z in (True, False))]
    for blob in blobs:
        for name, value in safe_pickle.loads(blob).items():
            expected = tensors[name].detach().numpy()
            assert value.dtype == expected.dtype, name
            np.testing.assert_array_equal(value, expected)
    arrays = {"a": np.arange(6.0).reshape(2, 3).T, "s": np.float32(0.1), "b": b"\xff\x00"}
    for protocol in (2, 4):
        got = safe_pickle.loads(pickle.dumps(arrays, protocol=protocol))
        np.testing.assert_array_equal(np.asarray(got["a"]), arrays["a"])
        assert (got["s"], got["b"]) == (float(np.float32(0.1)), b"\xff\x00")


def test_views_stay_inside_their_memory():
    """A pickle cannot read beyond the memory that it brings."""
    blob = torch_file(torch.zeros(4), zipped=True)
    source = zipfile.ZipFile(io.BytesIO(blob))
    for old, new in ((b"K\x04\x85", b"K\x08\x85"), (b"K\x00K\x04", b"K\x02K\x04")):
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w") as archive:
            for name in source.namelist():
                data = source.read(name)
                archive.writestr(name, data.replace(old, new) if "data.pkl" in name else data)
        assert target.getvalue().count(new) == 1
        with pytest.raises(UserError, match="damaged pickle"):
            safe_pickle.loads(target.getvalue())


def test_batches_of_old_torch_geometric():
    """Version 1 kept slices beside the fields."""
    batch = safe_pickle.Fields()
    batch.state = {
        "pos": np.arange(15.0).reshape(5, 3),
        "sid": np.array([4, 5]),
        "__slices__": {"pos": [0, 2, 5], "sid": [0, 1, 2]},
    }
    first, second = structures_of(batch)
    assert first["pos"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (second["sid"].item(), len(second["pos"])) == (5, 3)


# As a data set of fairchem


def test_dataset_gives_what_the_converted_one_gives(tmp_path, monkeypatch):
    """All fields of AtomicData, for the same structures as ASE-LMDB."""
    monkeypatch.setenv("ESCAIP_DATA", str(tmp_path))
    frames = slabs()
    values = [pickled(s2ef_fields(atoms), 1 + i % 2) for i, atoms in enumerate(frames)]
    write_lmdb(tmp_path / "legacy" / "data.0000.lmdb", values[:4])
    write_lmdb(tmp_path / "legacy" / "data.0001.lmdb", values[4:], length=False)
    writer = store.SplitWriter(tmp_path / "converted")
    for atoms in built(LegacyLmdb(), tmp_path / "legacy"):
        writer.add(atoms)
    writer.close()
    sets = [
        create_dataset("oc20", "train", src, no_shuffle=True, stress=False)
        for src in ("legacy", "converted")
    ]
    ours, expected = ([dataset[i] for i in range(6)] for dataset in sets)
    for a, b in zip(ours, expected, strict=True):
        assert a.keys() == b.keys()
        for key in sorted(a.keys()):
            if torch.is_tensor(b[key]):
                assert a[key].dtype == b[key].dtype, key
                torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)
            else:
                assert a[key] == b[key], key
    assert ours[1].sid == ["100-frame-7"]
    assert atomicdata_list_to_batch(ours).natoms.tolist() == [8] * 6
    counts = [list(dataset.get_metadata("natoms", [0, 3, 5])) for dataset in sets]
    assert counts[0] == counts[1] == [8, 8, 8]


def test_dataset_counts_atoms_once(tmp_path, monkeypatch):
    frames = slabs()
    path = tmp_path / "data.lmdb"
    write_lmdb(path, [pickled(s2ef_fields(atoms), 2) for atoms in _cut(frames)])
    first = LegacyLmdbDataset({"src": str(path)})
    assert list(first.get_metadata("natoms", list(range(6)))) == [4, 5, 6, 7, 8, 8]
    assert (tmp_path / "data.lmdb.natoms.npz").exists()
    monkeypatch.setattr(LegacyLmdbDataset, "_natoms", None)  # not called again
    again = pickle.loads(pickle.dumps(LegacyLmdbDataset({"src": str(path)})))
    assert list(again.get_metadata("natoms", [0, 5])) == [4, 8]
    assert len(again[3].pos) == 7
    np.savez(tmp_path / "metadata.npz", natoms=np.arange(6))
    assert list(LegacyLmdbDataset({"src": [str(tmp_path)]}).get_metadata("natoms", [3])) == [3]


def _cut(frames: list[Atoms]) -> list[Atoms]:
    """Frames whose labels are cut with their atoms."""
    cut = []
    for index, source in enumerate(frames):
        atoms = source[: 4 + index]
        labels = source.calc.results
        atoms.calc = SinglePointCalculator(
            atoms, energy=labels["energy"], forces=labels["forces"][: len(atoms)]
        )
        cut.append(atoms)
    return cut


@pytest.mark.full  # workers of trainings are in test_recovery
def test_dataset_in_spawned_workers(tmp_path):
    frames = slabs()
    write_lmdb(tmp_path / "data.lmdb", [pickled(s2ef_fields(a), 2) for a in frames])
    dataset = LegacyLmdbDataset({"src": str(tmp_path)})
    here = [dataset[i].energy.item() for i in range(6)]  # the files are open before workers start
    loader = torch.utils.data.DataLoader(
        dataset, num_workers=1, multiprocessing_context="spawn", collate_fn=only
    )
    assert [item.energy.item() for item in loader] == here
    assert here == pytest.approx([a.calc.results["energy"] for a in frames], rel=1e-6)


def only(items: list) -> object:
    """The one structure of a batch (a function that can be pickled)."""
    return items[0]


def test_dataset_names_what_is_wrong(tmp_path):
    frames = slabs(2)
    values = [pickled(s2ef_fields(frames[0]), 2), hostile(tmp_path / "canary")["eval"][0]]
    write_lmdb(tmp_path / "data.lmdb", values)
    dataset = LegacyLmdbDataset({"src": str(tmp_path)})
    with pytest.raises(UserError, match=r"data\.lmdb, key 1: .*builtins\.eval"):
        dataset[1]
    assert not (tmp_path / "canary").exists()
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "data.aselmdb").touch()
    with pytest.raises(UserError, match="is LMDB of fairchem 1, other paths are not"):
        create_dataset("oc20", "train", [str(tmp_path), str(tmp_path / "converted")])
