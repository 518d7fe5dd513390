"""From relaxations to the benchmark's two files."""

from __future__ import annotations

import gzip
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.display import open_display
from escaip_fairchem.errors import UserError
from escaip_fairchem.files import whole_file
from escaip_fairchem.matbench.energies import FormationEnergies, to_pymatgen
from escaip_fairchem.predict.parts import PLAN_NAME, Plan, missing, read_split

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from typing import BinaryIO


@dataclass(frozen=True)
class Written:
    """The files, and what is in them.

    Attributes:
        discovery: ``<date>-discovery.csv.gz``.
        geo_opt: ``<date>-geo-opt.jsonl.gz``.
        materials: Number of materials.
        failed: Ids without a prediction.
        converged: How many relaxations converged.
    """

    discovery: Path
    geo_opt: Path
    materials: int
    failed: list[str]
    converged: int


def write_files(folder: Path, out: Path, formation: FormationEnergies) -> Written:
    """Write both files from a folder of relaxations, in the order of the data.

    Discovery: ``material_id,e_form_per_atom`` (eV/atom, four decimals), empty for a material
    without a finite energy. Geo-opt: a JSON object in a line for each other one, with
    ``material_id``, ``structure`` (pymatgen's), ``energy`` (eV, as predicted), ``converged`` and
    ``n_steps``. Predictions are not filtered: the benchmark masks outliers itself. Equal
    relaxations give equal bytes; the date is that of the run's start (UTC).

    Args:
        folder: Parts of `escaip_fairchem.predict.relax.RelaxRunner`, all there.
        out: Folder of the files.
        formation: Computes formation energies.

    Raises:
        UserError: Parts are missing, were not relaxed, or name a material twice.
    """
    plan = Plan.read(folder)
    todo = missing(folder)
    if todo:
        raise UserError(
            f"{folder} lacks {len(todo)} of {len(plan.parts())} parts; the same command again "
            "goes on"
        )
    started = datetime.fromtimestamp((folder / PLAN_NAME).stat().st_mtime, UTC)
    paths = [
        out / f"{started:%Y-%m-%d}-{name}" for name in ("discovery.csv.gz", "geo-opt.jsonl.gz")
    ]
    display = open_display("corrected", sum(split.rows for split in plan.splits.values()), 0)
    seen: set[str] = set()
    failed: list[str] = []
    converged = 0
    with ExitStack() as stack:
        table, ends = (stack.enter_context(_zipped(path)) for path in paths)
        table.write(b"material_id,e_form_per_atom\n")
        for part in (part for split in plan.splits for part in read_split(folder, split)):
            found = []
            for end, e_form in _ends(part, formation):
                material = end["material_id"]
                if material in seen:
                    raise UserError(f"{material} is there twice; each material is relaxed once")
                seen.add(material)
                value = "" if e_form is None else repr(round(e_form, 4))
                table.write(f"{material},{value}\n".encode())
                failed += [material] if e_form is None else []
                found += [] if e_form is None else [end]
                converged += bool(end["converged"] and e_form is not None)
            _write_lines(ends, found)
            if display.due():
                display.show(len(seen), f"{len(failed)} without a prediction")
    display.close()
    return Written(*paths, len(seen), failed, converged)


def _ends(
    part: Mapping[str, np.ndarray], formation: FormationEnergies
) -> Iterator[tuple[dict[str, Any], float | None]]:
    """The end of each relaxation as a row, and its formation energy, eV/atom, if it has one."""
    from ase import Atoms

    if "cell" not in part:
        raise UserError("the predictions hold no relaxed cells; predict with the recipe's runner")
    cuts = np.cumsum(part["natoms"])[:-1]
    of_atoms = zip(*(np.split(part[name], cuts) for name in ("numbers", "positions")), strict=True)
    for i, (numbers, positions) in enumerate(of_atoms):
        material, energy = str(part["sid"][i]), float(part["energy"][i])
        end = {"material_id": material, "converged": bool(part["converged"][i])}
        if not np.isfinite(energy):
            yield end, None
            continue
        atoms = Atoms(numbers, positions, cell=part["cell"][i], pbc=True)
        structure = to_pymatgen(atoms)
        end |= {"structure": structure.as_dict(), "energy": energy}
        end["n_steps"] = int(part["steps"][i])
        yield end, formation(material, structure, energy)


def _write_lines(file: BinaryIO, rows: list[dict[str, Any]]) -> None:
    """Rows as the benchmark writes them: by pandas, with ten decimals."""
    import pandas as pd

    if rows:
        columns = ["material_id", "structure", "energy", "converged", "n_steps"]
        text = pd.DataFrame(rows, columns=columns).to_json(orient="records", lines=True)
        file.write(text.encode())


@contextmanager
def _zipped(path: Path) -> Iterator[BinaryIO]:
    """A compressed file whose bytes follow from its content alone."""
    with (
        whole_file(path) as partial,
        partial.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file,
    ):
        yield file
