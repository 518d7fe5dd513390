"""What `safe_pickle` makes in the place of the classes and functions that pickles name."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from escaip_fairchem.errors import UserError

#: Values of a tensor that repeats those in memory, as ``torch.Tensor.expand`` makes it.
MAX_EXPANDED = 1_000_000


class Fields:
    """What a pickle stores of an object of torch_geometric."""

    def __init__(self, *_: Any) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Keep what is stored."""
        if not isinstance(state, dict):
            raise UserError(f"damaged pickle: an object's state is a {type(state).__name__}")
        self.state = state


class BatchGetter(Fields):
    """Stand-in of torch_geometric's maker of batch classes."""

    def __call__(self, *_: Any) -> Fields:
        """Make a batch of the class that would be made."""
        return Fields()


class Storage(NamedTuple):
    """Memory of a tensor; a tuple, whose fields no pickle can set anew."""

    dtype: np.dtype
    data: bytes


class Dtype:
    """Stand-in of ``numpy.dtype``: kind and size, then the byte order as state."""

    def __init__(self, text: str, *_: Any) -> None:
        self.dtype = np.dtype(text)
        if self.dtype.kind not in "biufSU":
            raise UserError(f"the pickle holds numpy values of type {text}, which was refused")

    def __setstate__(self, state: tuple) -> None:
        """Set the byte order."""
        self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """Stand-in of ``numpy.ndarray``, which `numpy.asarray` turns into one."""

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        """Take shape, type and values."""
        _, shape, kind, in_columns, data = state
        if not isinstance(data, bytes):  # without any, numpy would take what memory holds
            raise UserError(f"damaged pickle: an array's values are a {type(data).__name__}")
        order = "F" if in_columns else "C"
        self.array = np.ndarray(shape, kind.dtype, data, order=order)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Give the array."""
        return self.array.astype(dtype or self.array.dtype)


def scalar(kind: Dtype, data: bytes) -> Any:
    """Stand-in of numpy's rebuilding of a scalar."""
    return np.frombuffer(data, kind.dtype)[0].item()


def encode(text: str, encoding: str) -> bytes:
    """Stand-in of ``codecs.encode``, by which old pickles hold bytes."""
    if encoding != "latin1":
        raise UserError(f"the pickle asks for the codec {encoding}, which was refused")
    return text.encode("latin1")


def tensor(
    storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> np.ndarray:
    """Stand-in of torch's rebuilding of a tensor; numpy checks the bounds."""
    width = storage.dtype.itemsize
    strides = tuple(width * step for step in stride)
    if 0 in size:
        return np.empty(size, storage.dtype)
    if math.prod(size) > max(MAX_EXPANDED, len(storage.data)):
        raise UserError(
            f"damaged pickle: a tensor of {math.prod(size)} values has {len(storage.data)} bytes"
        )
    return np.ndarray(size, storage.dtype, storage.data, width * offset, strides)


def parameter(tensor: np.ndarray, *_: Any) -> np.ndarray:
    """Stand-in of torch's rebuilding of a parameter."""
    return tensor
