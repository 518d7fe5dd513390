"""Conversions as the command runs them, and what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

#: The command with small chunks, so that little data makes many of them.
DRIVER = """
import sys
from escaip_fairchem.data import work
from escaip_fairchem.cli import main
work.RECORDS_PER_CHUNK = 20
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def driver(folder: Path) -> list[str]:
    """The command line up to its arguments."""
    script = folder / "driver.py"
    script.write_text(DRIVER)
    return [sys.executable, str(script), "convert"]


def start(command: list, **options) -> subprocess.Popen:
    """Start a command in a session of its own, without output."""
    return subprocess.Popen(
        [str(argument) for argument in command],
        env=os.environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
