"""LMDB files of fairchem 1 as a data set of fairchem 2."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch

from escaip_fairchem import LegacyLmdbDataset
from escaip_fairchem.data import store
from escaip_fairchem.data.datasets import create_dataset
from escaip_fairchem.data.formats.legacy_lmdb import LegacyLmdb
from escaip_fairchem.errors import UserError
from oc_files import (
    built,
    hostile,
    pickled,
    s2ef_fields,
    slabs,
    write_lmdb,
)

if TYPE_CHECKING:
    from ase import Atoms


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
