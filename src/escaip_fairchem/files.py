"""Files that appear under their names when they are complete."""

from __future__ import annotations

import csv
import io
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from matplotlib.figure import Figure


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


def write_csv(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table by `whole_file`.

    Args:
        path: The file.
        rows: Columns and values; a column may be missing from some, and has no value there.
    """
    rows = list(rows)
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure of matplotlib as PNG by `whole_file`."""
    with whole_file(path, sync=False) as partial:
        figure.savefig(partial, dpi=150, format="png")
