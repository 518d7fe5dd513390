"""Rows of ASE-LMDB as bytes: encoded once, then only copied.

The layout is that of the package ``ase-db-backends``: keys ``1``, ``2`` ... and ``nextid``, values
JSON packed by zlib. Its own writer asks for the time, the user and a random id, so that no two
conversions are alike, and is several times slower.
"""

from __future__ import annotations

import os
import zlib
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.errors import UserError
from escaip_fairchem.files import whole_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from ase import Atoms

#: Labels of a structure that are stored, by ASE's names.
LABELS = ("energy", "forces", "stress", "magmom", "magmoms", "charges", "dipole")
LEVEL = 3  # of zlib: 5% larger than the default level in under half the time
PAGE = 4096  # bytes; a value takes whole pages
TRANSACTION = 2_000  # rows; what LMDB holds in memory


def encode_row(atoms: Atoms) -> bytes:
    """Encode a structure with its labels, always to the same bytes.

    Args:
        atoms: Labels in ``calc.results``; ``info`` becomes the row's data, which fairchem puts back
            into ``info``.

    Returns:
        The value of an ASE-LMDB row.
    """
    import orjson

    row: dict[str, Any] = {
        "numbers": _array(atoms.numbers),
        "positions": _array(atoms.positions),
        "cell": _array(atoms.cell.array),
        "pbc": _array(atoms.pbc),
        "ctime": 0.0,
        "mtime": 0.0,
        "user": "",
    }
    if atoms.has("tags"):
        row["tags"] = _array(atoms.get_tags())
    if atoms.has("initial_magmoms"):
        row["initial_magmoms"] = _array(atoms.get_initial_magnetic_moments())
    if atoms.constraints:
        row["constraints"] = [_plain(constraint.todict()) for constraint in atoms.constraints]
    if atoms.calc is not None:
        row |= {"calculator": "unknown", "calculator_parameters": {}}
        results = atoms.calc.results
        row |= {key: _plain(results[key]) for key in LABELS if results.get(key) is not None}
    row["data"] = orjson.Fragment(_json(atoms.info))
    text = orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)
    identity = b',"unique_id":"%s"}' % blake2b(text, digest_size=16).hexdigest().encode()
    return zlib.compress(text[:-1] + identity, LEVEL)


def write_rows(path: Path, rows: Iterable[bytes], n_rows: int, n_bytes: int) -> None:
    """Write an ASE-LMDB file, which appears under its name when it is complete.

    Args:
        path: The ``.aselmdb`` file.
        rows: Encoded rows.
        n_rows: Their number.
        n_bytes: Their size in all.
    """
    import lmdb

    # An upper limit of the file, which is written into it: so it depends on the content alone.
    limit = 2 * n_bytes + (2 * n_rows + 4096) * PAGE
    with whole_file(path) as partial:
        database = lmdb.open(str(partial), subdir=False, lock=False, map_size=limit)
        try:
            transaction = database.begin(write=True)
            index = 0
            for index, row in enumerate(rows, 1):
                transaction.put(b"%d" % index, row)
                if index % TRANSACTION == 0:
                    transaction.commit()
                    transaction = database.begin(write=True)
            if index != n_rows:
                raise ValueError(f"{path}: {index} rows given, {n_rows} announced")
            transaction.put(b"nextid", zlib.compress(b"%d" % (n_rows + 1)))
            transaction.commit()
        except lmdb.Error as error:
            raise _system_error(error, partial) from error
        finally:
            database.close()


class RowFile:
    """Encoded rows of an ASE-LMDB file, by position; deleted rows are passed over.

    Raises:
        UserError: If it is none, or damaged.
    """

    def __init__(self, path: Path) -> None:
        """Open the file."""
        import lmdb

        self._path = path
        with self._named_errors():
            self._database = lmdb.open(
                str(path), subdir=False, lock=False, readonly=True, readahead=False
            )
            self._transaction = self._database.begin()
        n_ids = (self._number(b"nextid") or 1) - 1
        deleted = self._number(b"deleted_ids") or []
        ids: Sequence[int] = range(1, n_ids + 1)
        self.ids = sorted(set(ids) - set(deleted)) if deleted else ids

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.ids)

    def __getitem__(self, position: int) -> bytes:
        """The bytes of a row."""
        with self._named_errors():
            row = self._transaction.get(b"%d" % self.ids[position])
        if row is None:
            raise UserError(f"{self._path}: row {self.ids[position]} is missing; it is damaged")
        return row

    def close(self) -> None:
        """Close the file."""
        self._transaction.abort()
        self._database.close()

    def _number(self, key: bytes) -> Any:
        """One of the values that are no rows."""
        import orjson

        with self._named_errors():
            packed = self._transaction.get(key)
        return None if packed is None else orjson.loads(zlib.decompress(packed))

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Say which file LMDB complains of."""
        import lmdb

        try:
            yield
        except lmdb.Error as error:
            raise UserError(f"{self._path} is no ASE-LMDB file, or damaged ({error})") from error


def _system_error(error: Exception, path: Path) -> OSError:
    """Turn LMDB's error of a write into the system's, of which the text is all that is left."""
    import errno

    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        if os.strerror(number) in str(error):
            return OSError(number, os.strerror(number), str(path))
    return OSError(errno.EIO, str(error), str(path))


def _array(values: np.ndarray) -> dict[str, Any]:
    """An array as ASE's JSON has it."""
    values = np.asarray(values)
    flat = np.ascontiguousarray(values).ravel()
    return {"__ndarray__": (values.shape, str(values.dtype), flat)}


def _plain(value: Any) -> Any:
    """A label or a constraint for JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _array(value)
    return value.item() if isinstance(value, np.generic) else value


def _json(info: dict[str, Any]) -> bytes:
    """Encode ``info`` by ASE, which knows NaN and arrays of any type."""
    from ase.io.jsonio import encode

    return encode(info).encode()
