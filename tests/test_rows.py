"""Rows of ASE-LMDB: ASE and fairchem read back what was written, whatever was copied."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.db.row import AtomsRow
from ase.io import iread

from data_helpers import labelled_atoms, stored
from escaip_fairchem.data import store
from escaip_fairchem.data.rows import RowFile, encode_row, write_rows
from escaip_fairchem.errors import UserError


def magnetic():
    atoms = molecule("O2")
    atoms.set_initial_magnetic_moments([1.0, 1.5])
    atoms.info = {"sid": "a", "gap": float("nan"), "text": 'ü"\n', "fid": 3, "site": np.arange(2)}
    atoms.calc = SinglePointCalculator(
        atoms, energy=-1e-7, forces=np.full((2, 3), 1 / 3), magmoms=[0.1, 0.2], magmom=0.3
    )
    return atoms


def frames_of(test_data):
    sources = ("oc20_s2ef_adsorption_3frames", "mptrj_sample", "omol25_sample")
    real = [f for name in sources for f in islice(iread(test_data / f"{name}.extxyz.gz"), 4)]
    return [*real, *labelled_atoms(2), molecule("H2O"), magnetic()]


def assert_rows_equal(found: AtomsRow, expected: AtomsRow) -> None:
    volatile = {"unique_id", "mtime", "ctime", "user", "id", "_data", "_constraints", "_keys"}
    for key in set(expected.__dict__) - volatile:
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)
        assert np.asarray(found[key]).dtype == np.asarray(expected[key]).dtype, key
    assert [c.todict() for c in found.constraints] == [c.todict() for c in expected.constraints]
    assert set(found.data) == set(expected.data)
    for key, value in expected.data.items():
        np.testing.assert_array_equal(found.data[key], value, err_msg=key)


def test_rows_equal_those_of_the_writer_of_ase(test_data, tmp_path):
    frames = frames_of(test_data)
    with connect(tmp_path / "theirs.aselmdb") as database:
        for atoms in frames:
            database.write(AtomsRow(atoms), data=atoms.info)
    rows = [encode_row(atoms) for atoms in frames]
    assert rows == [encode_row(atoms) for atoms in frames]
    write_rows(tmp_path / "ours.aselmdb", rows, len(rows), sum(map(len, rows)))
    assert sorted(p.name for p in tmp_path.glob("*ours*")) == ["ours.aselmdb"]

    ours, theirs = (
        list(connect(tmp_path / f"{name}.aselmdb", readonly=True).select())
        for name in ("ours", "theirs")
    )
    assert len(ours) == len(theirs) == len(frames)
    for mine, other in zip(ours, theirs, strict=True):
        assert_rows_equal(mine, other)
    assert len({row.unique_id for row in ours}) == len(frames)


def test_ase_can_add_to_what_was_written_and_delete_from_it(tmp_path):
    path = tmp_path / "set.aselmdb"
    rows = [encode_row(atoms) for atoms in labelled_atoms(3)]
    write_rows(path, rows, 3, sum(map(len, rows)))
    with connect(path) as database:
        database.write(magnetic())
    connect(path).delete([2])
    assert list(RowFile(path).ids) == [1, 3, 4]
    assert [bytes(RowFile(path)[i]) for i in (0, 1)] == [rows[0], rows[2]]


def test_copied_frames_keep_their_bytes_and_metadata(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "FRAMES_PER_SHARD", 3)
    frames = labelled_atoms(11)
    for name, some in (("b", frames[:7]), ("a", frames[7:])):
        writer = store.SplitWriter(tmp_path / name)
        for atoms in some:
            writer.add(atoms)
        writer.close()
    chosen = np.array([10, 0, 8, 3, 2, 7])
    store.copy_rows([tmp_path / "b", tmp_path / "a"], tmp_path / "out", chosen)
    assert [atoms.info["index"] for atoms in stored(tmp_path / "out")] == chosen.tolist()
    metadata = np.load(tmp_path / "out/metadata.npz")
    assert metadata["natoms"].tolist() == [8] * 6
    expected = [np.linalg.norm(frames[i].calc.results["forces"][1:], axis=1).mean() for i in chosen]
    np.testing.assert_allclose(metadata["mean_force"], expected, rtol=1e-12)
    assert len(list((tmp_path / "out").iterdir())) == 3

    np.savez(tmp_path / "a/metadata.npz", natoms=np.ones(3, dtype=int))
    with pytest.raises(UserError, match="does not belong to the 11 frames"):
        store.copy_rows([tmp_path / "b", tmp_path / "a"], tmp_path / "two", chosen)


def test_a_file_that_is_damaged_is_named(tmp_path):
    path = tmp_path / "set.aselmdb"
    path.write_bytes(b"nothing of the kind" * 1000)
    with pytest.raises(UserError, match=r"set\.aselmdb is no ASE-LMDB file, or damaged"):
        RowFile(path)
