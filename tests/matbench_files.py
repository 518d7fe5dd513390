"""A few materials in the layouts that Matbench Discovery publishes, with made-up energies."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from typing import TYPE_CHECKING

import numpy as np
from ase.build import bulk
from ase.io import write
from pymatgen.core import Composition
from pymatgen.entries.computed_entries import ComputedEntry, ComputedStructureEntry
from pymatgen.io.ase import AseAtomsAdaptor

if TYPE_CHECKING:
    from pathlib import Path

    from ase import Atoms

#: Pseudopotentials of the Materials Project, which its corrections ask for, and its +U on iron.
POTCARS = {
    "Mg": "Mg_pv", "O": "O", "Fe": "Fe_pv", "Na": "Na_pv", "Cl": "Cl", "Zn": "Zn", "S": "S",
    "Cu": "Cu_pv", "Au": "Au",
}  # fmt: skip
#: What each crystal is for: an oxide, one with +U, a halide, a sulfide, no anion, two cells.
CRYSTALS = (
    ("MgO", "rocksalt", 4.2), ("FeO", "rocksalt", 4.3), ("NaCl", "rocksalt", 5.6),
    ("ZnS", "zincblende", 5.4), ("CuAu", "cesiumchloride", 3.0), ("MgO", "cesiumchloride", 2.6),
)  # fmt: skip
ENTRIES = "wbm/2022-10-19-wbm-computed-structure-entries.jsonl.gz"
REFERENCES = "mp/2023-02-07-mp-elemental-reference-entries.json.gz"
SUMMARY = "wbm/2023-12-13-wbm-summary.csv.gz"
INITIAL = "wbm/2024-08-04-wbm-initial-atoms.extxyz.zip"


def materials() -> dict[str, Atoms]:
    """Initial structures by id; sizes differ."""
    rng = np.random.default_rng(0)
    found = {}
    for number, (formula, kind, a) in enumerate(CRYSTALS):
        atoms = bulk(formula, kind, a=a) * (1 + number % 2, 1, 1)
        atoms.set_cell(atoms.cell * rng.uniform(0.97, 1.03, 3), scale_atoms=True)
        atoms.rattle(0.03, rng=rng)
        found[f"wbm-{1 + number // 3}-{number + 1}"] = atoms
    return found


def entry_of(atoms: Atoms, energy: float) -> ComputedStructureEntry:
    structure = AseAtomsAdaptor.get_structure(atoms)
    symbols = [element.symbol for element in structure.composition]
    plus_u = {"Fe": 5.3, "O": 0.0} if {"Fe", "O"} <= {*symbols} else {}
    parameters = {
        "run_type": "GGA+U" if plus_u else "GGA",
        "is_hubbard": bool(plus_u),
        "hubbards": plus_u,
        "potcar_symbols": [f"PBE {POTCARS[symbol]}" for symbol in symbols],
    }
    return ComputedStructureEntry(structure, energy, parameters=parameters, data={})


def reference(symbol: str) -> float:
    """Made up, eV/atom."""
    return -0.1 * len(symbol) - 0.01 * ord(symbol[0])


def make(root: Path) -> dict[str, Atoms]:
    """Write the four files below a data root."""
    for folder in ("wbm", "mp"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    found = materials()
    with zipfile.ZipFile(root / INITIAL, "w", zipfile.ZIP_DEFLATED) as archive:
        for material, atoms in found.items():
            named = atoms.copy()
            named.info["material_id"] = material
            text = io.StringIO()
            write(text, named, format="extxyz")
            archive.writestr(f"{material}.extxyz", text.getvalue())
    with gzip.open(root / ENTRIES, "wt") as file:
        for material, atoms in found.items():
            entry = entry_of(atoms, -3.0 * len(atoms)).as_dict()
            row = {"material_id": material, "computed_structure_entry": entry}
            file.write(json.dumps(row) + "\n")
    entries = {el: ComputedEntry(Composition(f"{el}4"), 4 * reference(el)) for el in POTCARS}
    with gzip.open(root / REFERENCES, "wt") as file:
        json.dump({el: entry.as_dict() for el, entry in entries.items()}, file)
    with gzip.open(root / SUMMARY, "wt") as file:
        table = csv.writer(file)
        table.writerow(
            ["material_id", "formula", "n_sites", "e_form_per_atom_mp2020_corrected",
             "e_above_hull_mp2020_corrected_ppd_mp", "unique_prototype"]
        )  # fmt: skip
        for number, (material, atoms) in enumerate(found.items()):
            formula = Composition(atoms.get_chemical_formula()).formula
            values = [-1.0 + 0.3 * number, 0.1 * number - 0.2, number != 3]
            table.writerow([material, formula, len(atoms), *values])
    return found
