"""The entries of an LMDB file, found without trusting it.

The library follows the numbers in a file wherever they lead: a damaged page ends the process. Here
every page is checked before it is used, and a damaged one costs its own entries.

Layout: ``lmdb.h`` and ``mdb.c`` of LMDB 0.9, 64-bit, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAGIC = 0xBEEFC0DE
BRANCH, LEAF, OVERFLOW = 1, 2, 4  # flags of pages
BIG = 1  # flag of a node whose value has pages of its own
NO_PAGE = 2**64 - 1
DAMAGE = (ValueError, OverflowError, struct.error)  # what wrong numbers lead to
PAGE_HEADER, NODE_HEADER = struct.Struct("<QHHHH"), struct.Struct("<HHHH")
ROOT = struct.Struct("<HHQQQQQ")  # flags, depth, numbers of pages and entries, first page


class NumberedEntries:
    """Values of the keys ``b"0"``, ``b"1"`` ... of an LMDB file; other keys are passed over.

    Attributes:
        path: The file.
        keys: Numbers of the entries that can be read, in order, (N,) int64.
        damaged: What cannot be read: ``page 17`` with all of its entries, or ``key 3``.

    Raises:
        UserError: If it is no LMDB file, or not all of one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged: list[str] = []
        self._seen: set[int] = set()
        with path.open("rb") as file:
            size = file.seek(0, 2)
            try:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._page_size, depth, root = self._read_meta(size)
            except UserError:
                raise
            except DAMAGE:  # empty, or too short
                raise UserError(f"{path} is no LMDB file; download it again") from None
        found = list(self._walk(root, depth)) if root != NO_PAGE else []
        del self._seen
        table = np.array(found, dtype=np.int64).reshape(-1, 3)
        self.keys, self._starts, self._sizes = table[np.argsort(table[:, 0])].T

    def __getitem__(self, key: int) -> bytes:
        """The value of a key."""
        place = int(np.searchsorted(self.keys, key))
        if place == len(self.keys) or self.keys[place] != key:
            raise UserError(f"{self.path} has no key {key}, or it is damaged")
        start = int(self._starts[place])
        return self._map[start : start + int(self._sizes[place])]

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs, which maps the file itself."""
        return {name: value for name, value in vars(self).items() if name != "_map"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the file."""
        vars(self).update(state)
        with self.path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _read_meta(self, size: int) -> tuple[int, int, int]:
        """Size of pages, depth of the tree and its first page, by the newer of the two metas."""
        metas, offset = [], 0
        for _ in range(2):
            magic, version, page_size = struct.unpack_from("<II16xI", self._map, offset + 16)
            if magic == MAGIC and version == 1 and 512 <= page_size <= 65536:
                flags, depth, *_, root = ROOT.unpack_from(self._map, offset + 92)
                last, transaction = struct.unpack_from("<QQ", self._map, offset + 136)
                needed = (max(last, 1) + 1) * page_size
                metas.append((transaction, page_size, flags, depth, root, needed))
            elif not metas:
                raise UserError(f"{self.path} is no LMDB file; download it again")
            offset = metas[0][1]
            if size < offset + 160:
                break
        _, page_size, flags, depth, root, needed = max(metas)
        if size < needed:
            raise UserError(
                f"{self.path} is cut short ({size} of {needed} bytes); download it again"
            )
        if flags or depth > 32:
            raise UserError(f"{self.path} is damaged, or no file of structures; download it again")
        return page_size, depth, root

    def _walk(self, number: int, depth: int) -> Iterator[tuple[int, int, int]]:
        """Key, place and size of the entries below a page."""
        try:
            if number in self._seen:
                raise ValueError("a page in two places")
            self._seen.add(number)
            nodes = list(self._nodes(number, BRANCH if depth > 1 else LEAF))
        except DAMAGE:
            self.damaged.append(f"page {number}")
            return
        for low, high, flags, key, start in nodes:
            if depth > 1:
                yield from self._walk(low | high << 16 | flags << 32, depth - 1)
            elif key.isdigit() and len(key) < 19:
                size = low | high << 16
                try:
                    yield int(key), self._place(start, size, flags, number), size
                except DAMAGE:
                    self.damaged.append(f"key {int(key)}")

    def _nodes(self, number: int, kind: int) -> Iterator[tuple[int, int, int, bytes, int]]:
        """The nodes of a page: three numbers, the key, and where the value begins."""
        begin = number * self._page_size
        own_number, _, flags, lower, upper = PAGE_HEADER.unpack_from(self._map, begin)
        if own_number != number or flags & 7 != kind or not 16 <= lower <= upper <= self._page_size:
            raise ValueError("no such page")
        for (offset,) in struct.iter_unpack("<H", self._map[begin + 16 : begin + (lower & ~1)]):
            low, high, flags, key_size = NODE_HEADER.unpack_from(self._map, begin + offset)
            start = begin + offset + 8 + key_size
            if offset < upper or start > begin + self._page_size:
                raise ValueError("a node outside of the page")
            yield low, high, flags, self._map[start - key_size : start], start

    def _place(self, start: int, size: int, flags: int, page: int) -> int:
        """Where a value begins, whole in its page or in pages of its own."""
        end = (page + 1) * self._page_size
        if flags & BIG:
            (number,) = struct.unpack_from("<Q", self._map, start)
            start = number * self._page_size
            own_number, _, kind, n_pages = struct.unpack_from("<QHHI", self._map, start)
            if own_number != number or kind & 7 != OVERFLOW:
                raise ValueError("no such page")
            start, end = start + 16, min(start + n_pages * self._page_size, len(self._map))
        if start + size > end:
            raise ValueError("a value beyond its pages")
        return start
