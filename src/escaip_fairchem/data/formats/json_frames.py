"""Frames of a huge JSON file ``{material: {frame: {...}}}``, found without decoding them.

A frame is decoded by whoever needs it: passing over frames is fast, and a defect inside a frame
costs that frame only. A file can also be entered at any material, so that workers share it. A JSON
parser that streams offers neither.
"""

from __future__ import annotations

import gzip
import json
import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

CHUNK = 2**22  # bytes read at a time
MAX_FRAME = 2**27  # bytes; a frame of 444 atoms has 1e5
QUOTE, OPEN, CLOSE = b'"{}'
ESCAPED_QUOTE = re.compile(rb'(?<!\\)(?:\\\\)*\\"')
# The end of a material's last frame, then the keys of the next material and its first frame.
MATERIAL = re.compile(rb'\}\s*\}\s*,\s*(?="[^"]*"\s*:\s*\{\s*"[^"]*"\s*:\s*\{)')


class Frame(NamedTuple):
    """A frame that is not decoded.

    Attributes:
        offset: Place of its text in the (unpacked) file, in bytes.
        material: Outer key.
        name: Inner key.
        text: The JSON object.
    """

    offset: int
    material: str
    name: str
    text: bytes


def open_binary(path: Path) -> BinaryIO:
    """Open a file that may be compressed by gzip."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def split_materials(path: Path, size: int) -> list[tuple[int, int | None]]:
    """Cut a file between materials into byte ranges of ``size`` or a little more.

    A compressed file is one range, because it cannot be entered in the middle.
    """
    starts = [0]
    if path.suffix != ".gz":
        with path.open("rb") as file:
            while (start := _next_material(file, starts[-1] + size)) is not None:
                starts.append(start)
    return list(zip(starts, [*starts[1:], None], strict=True))


def _next_material(file: BinaryIO, offset: int) -> int | None:
    """Place of the first material's key behind ``offset``."""
    text = b""
    file.seek(offset)
    while chunk := file.read(CHUNK):
        text += chunk
        if found := MATERIAL.search(text):
            return offset + found.end()
    return None


def read_frames(path: Path, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
    """Go through the frames of a range that `split_materials` gave.

    Raises:
        UserError: If the file ends too early or is damaged outside of frames.
    """
    text, material = b"", ""
    offset, depth = start, (1 if start else 0)  # of the beginning of `text`, in open braces
    for chunk in _chunks(path, start, stop):
        text += chunk
        begin = done = 0
        for position, now in _outer_braces(text, depth):
            if text[position] == OPEN:
                if now == 3:
                    begin = position
                    continue
                if now == 2:
                    material = _key(text, position, path, offset)
            elif now == 2:
                name = _key(text, begin, path, offset)
                yield Frame(offset + begin, material, name, text[begin : position + 1])
            done, depth = position + 1, now
        text, offset = text[done:], offset + done
        if len(text) > MAX_FRAME:
            break
    if depth != (0 if stop is None else 1) or QUOTE in text:
        raise UserError(f"{path} is cut off or damaged behind byte {offset}; download it again")


def _chunks(path: Path, start: int, stop: int | None) -> Iterator[bytes]:
    """Read a byte range piece by piece."""
    with open_binary(path) as file:
        file.seek(start)
        left = CHUNK if stop is None else stop - start
        while chunk := file.read(min(CHUNK, left)):
            yield chunk
            if stop is not None:
                left -= len(chunk)


def _outer_braces(text: bytes, depth: int) -> Iterator[tuple[int, int]]:
    """Find the braces of the root, of materials and of frames, not those inside of frames.

    Args:
        text: Begins outside of strings and frames.
        depth: Open braces before it.

    Returns:
        Position and number of open braces behind it, of each.
    """
    codes = np.frombuffer(text, dtype=np.uint8)
    special = (codes == QUOTE) | (codes == OPEN) | (codes == CLOSE)
    if b"\\" in text:
        special[[found.end() - 1 for found in ESCAPED_QUOTE.finditer(text)]] = False
    positions = np.flatnonzero(special)
    kinds = codes[positions]
    is_quote = kinds == QUOTE
    outside = ~is_quote & (np.cumsum(is_quote) % 2 == 0)
    positions, opens = positions[outside], kinds[outside] == OPEN
    depths = depth + np.cumsum(np.where(opens, 1, -1))
    outer = (depths <= 2) | (opens & (depths == 3))
    return zip(positions[outer].tolist(), depths[outer].tolist(), strict=True)


def _key(text: bytes, position: int, path: Path, offset: int) -> str:
    """The key of the object that opens at ``position``."""
    end = text.rfind(b'"', 0, position)
    begin = text.rfind(b'"', 0, max(end, 0))
    if begin < 0 or text[end + 1 : position].strip() != b":":
        place = offset + position
        raise UserError(f"{path} is damaged before byte {place}; download it again")
    return json.loads(text[begin : end + 1])
