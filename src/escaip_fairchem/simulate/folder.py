"""The folder of a simulation: what it is of, one process at a time, files that are whole."""

from __future__ import annotations

import io
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ase.io

from escaip_fairchem.errors import UserError
from escaip_fairchem.files import write_whole
from escaip_fairchem.train.lock import RunLock

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ase import Atoms

SETTINGS_NAME = "settings.json"
_REMEDY = "wait for it or stop it, or choose another folder (--out)"


@contextmanager
def claimed(folder: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Use a folder for one simulation, or go on with it there.

    Args:
        folder: Made if it is absent.
        settings: Plain values that its results depend on.

    Raises:
        UserError: Another process works there, or it holds another simulation.
    """
    with RunLock(folder, remedy=_REMEDY):
        path = folder / SETTINGS_NAME
        if path.is_file():
            there = json.loads(path.read_text())
            wanted = json.loads(json.dumps(settings))
            other = [
                f"{name}={there.get(name)}, now {wanted.get(name)}"
                for name in dict.fromkeys([*there, *wanted])
                if there.get(name) != wanted.get(name) and name != "checkpoint"
            ]
            if other:
                raise UserError(
                    f"{folder} holds another simulation ({'; '.join(other)}); choose another "
                    "folder (--out) or remove this one"
                )
        else:
            write_json(path, settings)
        yield


def write_json(path: Path, content: Any) -> None:
    """Write plain values to a file that is whole or absent."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def write_frames(path: Path, frames: Sequence[Atoms]) -> None:
    """Write structures to an ASE trajectory that is whole or absent."""
    content = io.BytesIO()
    ase.io.write(content, list(frames), format="traj")
    write_whole(path, content.getvalue())
