"""Reads pickles of structures without trusting them.

A pickle names the functions and classes that rebuild it, and may name any. Here each name is looked
up in a table of stand-ins: tensors become numpy arrays, torch_geometric's classes plain `Fields`,
and any other name is refused. Neither torch nor torch_geometric is imported.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.data.formats import stand_ins
from escaip_fairchem.data.formats.stand_ins import Fields, Storage
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # first object of a torch file before torch 1.6
STORAGES = {
    "BoolStorage": "?",
    "ByteStorage": "<u1",
    "CharStorage": "<i1",
    "ShortStorage": "<i2",
    "IntStorage": "<i4",
    "LongStorage": "<i8",
    "HalfStorage": "<f2",
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
}


def _storage_of_bytes(data: bytes) -> Any:
    """Stand-in of torch's reading of a storage inside a pickle: a torch file in itself."""
    if data[:2] == b"PK":
        return _load_zip(data)
    file = io.BytesIO(data)
    file.seek(_after_header(data))
    dtype = _Unpickler(file, lambda pid: pid[1], _STORAGES).load()
    _Unpickler(file, _no_storage, {}).load()  # the keys: one
    return Storage(dtype, _stored_bytes(file, dtype))


_known_headers: list[bytes] = []  # the few that the versions of torch write


def _after_header(data: bytes) -> int:
    """Position after the three pickles with which a torch file before torch 1.6 begins."""
    for header in _known_headers:
        if data.startswith(header):
            return len(header)
    file = io.BytesIO(data)
    if _Unpickler(file, _no_storage, {}).load() != TORCH_MAGIC:
        raise UserError("damaged pickle: a tensor's memory is no file of torch")
    for _ in range(2):
        _Unpickler(file, _no_storage, {}).load()
    if len(_known_headers) < 8:
        _known_headers.append(data[: file.tell()])
    return file.tell()


def _stored_bytes(file: io.BytesIO, dtype: np.dtype) -> bytes:
    """Read the next storage: its number of values, then the values."""
    size = struct.unpack("<q", file.read(8))[0] * dtype.itemsize
    data = file.read(size)
    if len(data) != size:
        raise UserError("damaged pickle: a tensor's memory is cut short")
    return data


def _no_storage(pid: Any) -> Any:
    raise UserError("damaged pickle: it refers to memory that is not in it")


_STORAGES = {("torch", name): np.dtype(kind) for name, kind in STORAGES.items()}
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): stand_ins.encode,
    ("torch._utils", "_rebuild_tensor"): stand_ins.tensor,
    ("torch._utils", "_rebuild_tensor_v2"): stand_ins.tensor,
    ("torch._utils", "_rebuild_parameter"): stand_ins.parameter,
    ("torch.storage", "_load_from_bytes"): _storage_of_bytes,
    ("torch", "Size"): tuple,
    ("numpy", "dtype"): stand_ins.Dtype,
    ("numpy", "ndarray"): stand_ins.Array,
    ("torch_geometric.data.batch", "DynamicInheritanceGetter"): stand_ins.BatchGetter,
    **_STORAGES,
}
for _core in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _ALLOWED[_core, "scalar"] = stand_ins.scalar
    _ALLOWED[_core, "_reconstruct"] = stand_ins.Array
for _module, _name in (
    ("data.data", "Data"),
    ("data.data", "DataEdgeAttr"),
    ("data.data", "DataTensorAttr"),
    ("data.batch", "Batch"),
    ("data.batch", "DataBatch"),
    ("data.storage", "GlobalStorage"),
):
    _ALLOWED[f"torch_geometric.{_module}", _name] = Fields


_ARGUMENTS = {ord(op.code): op.arg.n if op.arg else 0 for op in pickletools.opcodes}
_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
# Bytes after the opcodes that are followed by so many and number nothing: nearly all there are.
_PLAIN = [-1 if code == pickle.LONG_BINPUT[0] else _ARGUMENTS.get(code, -1) for code in range(256)]
_TWO_LINES = pickle.GLOBAL + pickle.INST


def _check_memo(data: bytes, start: int) -> None:
    """Refuse a pickle that numbers a value beyond its own size.

    Python keeps a table as long as the largest number, so ten bytes could fill the memory. A number
    must be found as such, not among values, hence the walk over the opcodes.
    """
    position, end, plain, stop = start, len(data), _PLAIN, pickle.STOP[0]
    while position < end and (code := data[position]) != stop:
        position += 1
        if (size := plain[code]) >= 0:
            position += size
            continue
        size = _ARGUMENTS.get(code)
        if size is None:
            return  # the unpickler says what is wrong
        begin = position
        if size >= 0:
            position += size
        elif size == pickletools.UP_TO_NEWLINE:
            for _ in range(2 if code in _TWO_LINES else 1):
                position = data.find(b"\n", position) + 1 or end
        else:
            width = _LENGTHS[size]
            position += width + int.from_bytes(data[position : position + width], "little")
        if code == pickle.LONG_BINPUT[0]:
            number = int.from_bytes(data[begin:position], "little")
        elif code == pickle.PUT[0]:
            number = int(data[begin:position])
        else:
            continue
        if number > end:
            raise UserError(f"damaged pickle: it numbers a value {number}, and is {end} bytes long")


class _Unpickler(pickle.Unpickler):
    """Resolves names by a table only."""

    def __init__(
        self,
        file: io.BytesIO,
        storage: Callable[[tuple], Any],
        allowed: dict[tuple[str, str], Any],
    ) -> None:
        _check_memo(file.getvalue(), file.tell())
        super().__init__(file)
        self._storage = storage
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        """Give the stand-in of a name, or refuse it."""
        try:
            return self._allowed[module, name]
        except KeyError:
            raise UserError(
                f"the pickle asks for {module}.{name}, which no structure needs: refused, and "
                "nothing of it was run; take the file from its publisher"
            ) from None

    def persistent_load(self, pid: tuple) -> Any:
        """Give the memory that a pickle refers to."""
        return self._storage(pid)


def loads(data: bytes) -> Any:
    """Read a pickle, or a file that ``torch.save`` wrote.

    Args:
        data: The whole of it.

    Returns:
        What it holds: tensors as numpy arrays, objects of torch_geometric as `Fields`, plain
        values as they are.

    Raises:
        UserError: If it is damaged, or asks for a name that no structure needs, naming it.
    """
    try:
        if data[:2] == b"PK":
            return _load_zip(data)
        file = io.BytesIO(data)
        first = _Unpickler(file, _no_storage, _ALLOWED).load()
        if isinstance(first, int) and first == TORCH_MAGIC:
            return _load_before_zip(file)
        return first
    except UserError:
        raise
    except Exception as error:  # a damaged pickle fails in any way
        raise UserError(f"damaged pickle ({type(error).__name__}: {error})") from None


def _load_zip(data: bytes) -> Any:
    """Read a torch file since torch 1.6: a zip archive with a file for each storage."""
    archive = zipfile.ZipFile(io.BytesIO(data))

    @cache
    def content(name: str) -> bytes:
        if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:  # a kilobyte of it fills GiB
            raise UserError(f"{name} is compressed inside, as torch writes none, and was refused")
        return archive.read(name)

    (index,) = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
    root = index.rpartition("/")[0]
    order = f"{root}/byteorder"
    if order in archive.namelist() and content(order) != b"little":
        raise UserError("the file was written on a machine of other byte order; write it again")

    def storage(pid: tuple) -> Storage:
        return Storage(pid[1], content(f"{root}/data/{pid[2]}"))

    return _Unpickler(io.BytesIO(content(index)), storage, _ALLOWED).load()


def _load_before_zip(file: io.BytesIO) -> Any:
    """Read the rest of a torch file before torch 1.6: the object, then its storages.

    The object is read twice, first to learn where the storages begin.
    """
    for _ in range(2):
        _Unpickler(file, _no_storage, {}).load()
    start = file.tell()
    kinds: dict[str, np.dtype] = {}

    def empty(pid: tuple) -> Storage:
        kinds[pid[2]] = pid[1]
        return Storage(pid[1], bytes(pid[1].itemsize * pid[4]))

    _Unpickler(file, empty, _ALLOWED).load()
    keys = _Unpickler(file, _no_storage, {}).load()
    storages = {key: Storage(kinds[key], _stored_bytes(file, kinds[key])) for key in keys}
    file.seek(start)
    return _Unpickler(file, lambda pid: storages[pid[2]], _ALLOWED).load()
