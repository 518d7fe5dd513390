"""The formats, in the order in which they are tried."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import TYPE_CHECKING, Any

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from escaip_fairchem.data.formats.base import Format

#: Module and class; what ASE reads comes last, because it takes any file.
FORMATS = (
    "oc20_text.OC20Text",
    "legacy_lmdb.LegacyLmdb",
    "mptrj_json.MPtrjJson",
    "spice_hdf5.SpiceHdf5",
    "npz.Npz",
    "vasp.VaspFolders",
    "extxyz_zip.ExtxyzZip",
    "ase_files.AseFiles",
)
PACKAGE = __name__.rpartition(".")[0]


def formats() -> Iterator[type[Format]]:
    """Import the formats one after the other."""
    for dotted in FORMATS:
        module, name = dotted.split(".")
        yield getattr(import_module(f"{PACKAGE}.{module}"), name)


def find_format(paths: Sequence[Path], name: str | None = None) -> type[Format]:
    """Find the format of the inputs.

    Args:
        paths: Files and folders that exist.
        name: Name of the format, if the user gave one.

    Raises:
        UserError: If there is no such format, nothing claims a path, or two formats are mixed.
    """
    if name is not None:
        known = {kind.name: kind for kind in formats()}
        if name not in known:
            raise UserError(f"--format {name!r} is unknown; {_nearest(name, list(known))}")
        return known[name]
    found: dict[type[Format], Path] = {}
    for path in paths:
        kind = next((kind for kind in formats() if kind.claims(path)), None)
        if kind is None:
            raise UserError(
                f"input {path} holds no .aselmdb file, nor files of another known layout; name the "
                "files in it, or the layout with --format"
            )
        found.setdefault(kind, path)
    if len(found) > 1:
        listed = ", ".join(f"{path} ({kind.name})" for kind, path in found.items())
        raise UserError(f"inputs of several formats: {listed}; convert them one by one")
    return next(iter(found))


def check_options(kind: type[Format], options: dict[str, Any]) -> None:
    """Refuse options that the format does not have.

    Raises:
        UserError: Naming the nearest one.
    """
    for key in options:
        if key not in kind.OPTIONS:
            raise UserError(
                f"format {kind.name} has no option {key!r}; {_nearest(key, list(kind.OPTIONS))}"
            )


def _nearest(word: str, known: list[str]) -> str:
    """Name the nearest of the known words, or all of them."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known) or 'none'}"
