"""The benchmark's published files, as its own code downloads them; nothing is downloaded here."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from escaip_fairchem.data.store import data_root
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Computed structure entries of WBM's DFT relaxations, one in a line.
ENTRIES = "2022-10-19-wbm-computed-structure-entries.jsonl.gz"
#: The entry of lowest energy for each element, which formation energies are relative to.
REFERENCES = "2023-02-07-mp-elemental-reference-entries.json.gz"
#: DFT's formation energies and distances to the hull.
SUMMARY = "2023-12-13-wbm-summary.csv.gz"

DAMAGED = (OSError, EOFError, zlib.error, UnicodeDecodeError)


class Summary(NamedTuple):
    """What the metrics take of WBM's summary, for n materials.

    Attributes:
        ids: ``material_id``.
        formulas: As written there, of the whole cell.
        e_form: Formation energy by DFT, MP2020-corrected, eV/atom, (n,).
        e_hull: Distance to the convex hull of the Materials Project, eV/atom, (n,).
        unique: Whether no other material shares its prototype, (n,) bool.
    """

    ids: list[str]
    formulas: list[str]
    e_form: np.ndarray
    e_hull: np.ndarray
    unique: np.ndarray


def find_file(path: str | Path, published: str) -> Path:
    """A file of the benchmark, in the data root or where the path leads.

    Args:
        path: The file; relative to the data root (``$ESCAIP_DATA``) or the working directory.
        published: Its name in the benchmark.

    Raises:
        UserError: It is not there.
    """
    for candidate in (data_root() / path, Path(path)):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"no file {data_root() / path}; it is the benchmark's {published}, and docs/matbench.md "
        "says how to download it"
    )


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a text file, compressed if its name says so.

    Raises:
        UserError: It is damaged.
    """
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            yield from file
    except DAMAGED as error:
        raise UserError(f"{path} is damaged ({error}); make or download it again") from None


def read_references(path: Path) -> dict[str, float]:
    """Energy of each element's reference, eV/atom.

    Raises:
        UserError: It is not that file.
    """
    from pymatgen.entries.computed_entries import ComputedEntry

    try:
        entries = json.loads("".join(read_lines(path)))
        return {symbol: _entry(ComputedEntry, each) for symbol, each in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not {REFERENCES} ({error})") from None


def _entry(kind: type, stored: dict[str, Any]) -> float:
    return float(kind.from_dict(stored).energy_per_atom)


def read_entries(path: Path) -> dict[str, bytes]:
    """What corrections need of each entry, as JSON: all but the structure that DFT relaxed.

    Raises:
        UserError: It is not that file.
    """
    import orjson

    found = {}
    for number, line in enumerate(read_lines(path), 1):
        try:
            row = orjson.loads(line)
            entry = row["computed_structure_entry"]
            kept = {name: entry.get(name) for name in ("parameters", "data", "composition")}
            found[row["material_id"]] = orjson.dumps(kept)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is not {ENTRIES} (line {number}: {error})") from None
    return found


def read_summary(path: Path) -> Summary:
    """Read WBM's summary.

    Raises:
        UserError: A column is missing, or a value is none.
    """
    columns = (
        "material_id",
        "formula",
        "e_form_per_atom_mp2020_corrected",
        "e_above_hull_mp2020_corrected_ppd_mp",
        "unique_prototype",
    )
    rows = csv.DictReader(read_lines(path))
    absent = set(columns) - set(rows.fieldnames or ())
    if absent:
        raise UserError(f"{path} is not {SUMMARY}: it has no column {', '.join(sorted(absent))}")
    values = [[row[name] for name in columns] for row in rows]
    try:
        ids, formulas, e_form, e_hull, unique = zip(*values, strict=True)
        return Summary(
            list(ids), list(formulas), np.array(e_form, float), np.array(e_hull, float),
            np.array([{"True": True, "False": False}[value] for value in unique]),
        )  # fmt: skip
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is not {SUMMARY} ({error})") from None


def require_pymatgen() -> None:
    """Say what to install, before long work."""
    try:
        import pymatgen.core  # noqa: F401
    except ImportError:
        raise UserError(
            "Matbench Discovery needs pymatgen; pip install 'escaip-fairchem[matbench]'"
        ) from None
