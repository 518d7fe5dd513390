"""Pickles in LMDB files of fairchem 1 may come from anybody."""

from __future__ import annotations

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch

from escaip_fairchem.data.formats import safe_pickle
from escaip_fairchem.data.formats.legacy_lmdb import LegacyLmdb
from escaip_fairchem.data.formats.legacy_record import structures_of
from escaip_fairchem.errors import UserError
from oc_files import (
    hostile,
    pickled,
    s2ef_fields,
    slabs,
    torch_file,
    write_lmdb,
)


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
