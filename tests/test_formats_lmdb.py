"""LMDB files of fairchem 1, in which OC20 and OC22 were published."""

from __future__ import annotations

import pickle
import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator

from escaip_fairchem import LegacyLmdbDataset
from escaip_fairchem.data.formats.legacy_lmdb import LegacyLmdb
from escaip_fairchem.data.formats.lmdb_pages import NumberedEntries
from escaip_fairchem.errors import UserError
from oc_files import (
    assert_equal,
    built,
    legacy_fields,
    pickled,
    s2ef_fields,
    slabs,
    write_lmdb,
)

if TYPE_CHECKING:
    from pathlib import Path


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
