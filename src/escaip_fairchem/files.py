"""Files that appear under their names when they are complete."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def whole_file(path: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """A file to write, which takes the place of another at the end, unless something fails.

    A reader, and whoever comes after a kill, finds the old file or the new one, and no half of one.

    Args:
        path: The file; its folder is made.
        sync: Whether it must also survive a power cut; costs milliseconds.

    Yields:
        A hidden file beside it, ``.NAME.partial-*``, which is not there yet.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # processes of several machines may write beside each other
    writer = f"{os.uname().nodename}-{os.getpid()}"
    partial = path.with_name(f".{path.name}.partial-{writer}")
    try:
        yield partial
        if sync:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: str | Path, content: str | bytes, *, sync: bool = True) -> None:
    """Write a file by `whole_file`."""
    with whole_file(path, sync=sync) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
