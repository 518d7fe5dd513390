"""Structures from files, as a simulation starts from them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import ase.io
import numpy as np
from ase.io.jsonio import encode

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ase import Atoms


def read_structures(sources: Iterable[str | Path]) -> list[tuple[str, Atoms]]:
    """All structures of some files, with constraints, tags and momenta, without labels.

    Args:
        sources: Files of any format of ASE; ``FILE@INDEX`` takes a part, as ASE reads it.

    Returns:
        Names and structures: the name of the file, and of its frame if there are several.

    Raises:
        UserError: A file that is missing, cannot be read, or holds no atoms.
    """
    found = []
    for source in map(str, sources):
        path, at, _ = source.rpartition("@")
        file = Path(path if at and not Path(source).exists() else source)
        if not file.is_file():
            raise UserError(f"no structure at {file}; give a file of any format that ASE reads")
        try:
            frames = ase.io.read(source, None if file != Path(source) else ":")
        except Exception as error:  # readers of many formats, which raise whatever they meet
            why = f"{type(error).__name__} {error}".rstrip()
            raise UserError(f"{source} cannot be read by ASE: {why}") from error
        frames = frames if isinstance(frames, list) else [frames]
        if not frames:
            raise UserError(f"{source} holds no structure")
        for index, atoms in enumerate(frames):
            if len(atoms) == 0:
                raise UserError(f"{source}: frame {index} has no atoms; remove it")
            atoms.calc = None
            found.append((file.stem if len(frames) == 1 else f"{file.stem}:{index}", atoms))
    return found


def read_one(source: str | Path) -> tuple[str, Atoms]:
    """One structure; the last of a file with several.

    Args:
        source: As of `read_structures`.

    Raises:
        UserError: As there.
    """
    name, atoms = read_structures([source])[-1]
    return name, atoms


def fingerprint(structures: Sequence[Atoms]) -> str:
    """Hash of all that a simulation starts from: atoms, cells, momenta, constraints."""
    digest = hashlib.sha256()
    for atoms in structures:
        for array in (
            atoms.numbers,
            atoms.positions,
            atoms.cell.array,
            atoms.pbc,
            atoms.get_momenta(),
            atoms.get_masses(),
            atoms.get_tags(),
        ):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(encode([each.todict() for each in atoms.constraints]).encode())
        charge = {key: atoms.info.get(key) for key in ("charge", "spin")}
        digest.update(json.dumps(charge, default=str).encode())
    return digest.hexdigest()
