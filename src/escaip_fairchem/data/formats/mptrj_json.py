"""MPtrj as published: relaxation frames of the Materials Project in one JSON file.

Published by Deng et al. with CHGNet (Nature Machine Intelligence 5, 1031, 2023;
figshare 23713842, ``MPtrj_2022.9_full.json``, 12.2 GB, 1,580,395 frames of 145,923 materials).
"""

from __future__ import annotations

import json
import re
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from escaip_fairchem.data.formats.base import Card, Format, Part, Record
from escaip_fairchem.data.formats.json_frames import open_binary, read_frames, split_materials
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ase import Atoms

PART_BYTES = 2**26  # small enough to share evenly, and to lose little to damage
HEAD_BYTES = 2**20
HEAD = re.compile(rb'\s*\{\s*"[^"]*"\s*:\s*\{\s*"[^"]*"\s*:\s*\{')
ENERGIES = {
    "uncorrected": "uncorrected_total_energy",
    "corrected": "corrected_total_energy",
}


class MPtrjJson(Format):
    """MPtrj's original JSON, plain or compressed by gzip.

    ``energy=uncorrected`` is what VASP gave, the potential whose derivatives the forces and the
    stress are; MACE-MP, SevenNet and the extended XYZ of Matbench Discovery use it, and the
    benchmark applies the corrections to predictions. ``energy=corrected`` has those of MP2020
    added, as CHGNet was trained.

    A record's index is the place of its text in the file, in bytes.
    """

    name = "mptrj"
    summary = "MPtrj's original JSON (MPtrj_2022.9_full.json, .json.gz)"
    OPTIONS: ClassVar[dict[str, Any]] = {"energy": "uncorrected"}

    def __init__(self, **options: Any) -> None:
        """Check the options.

        Raises:
            UserError: If ``energy`` is none that the file has.
        """
        super().__init__(**options)
        if self.options["energy"] not in ENERGIES:
            raise UserError(f"energy={self.options['energy']}: MPtrj has {' and '.join(ENERGIES)}")

    @classmethod
    def claims(cls, path: Path) -> bool:
        """A JSON file that begins with a frame of a material."""
        if not path.name.endswith((".json", ".json.gz")) or not path.is_file():
            return False
        try:
            with open_binary(path) as file:
                head = file.read(HEAD_BYTES)
        except (OSError, EOFError):
            return False
        return bool(HEAD.match(head)) and b'"structure"' in head and b'"lattice"' in head

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Byte ranges between materials; a compressed file is one part."""
        return [
            Part((path,), start, stop)
            for path in paths
            for start, stop in split_materials(path, PART_BYTES)
        ]

    def read(self, part: Part) -> Iterator[Record]:
        """Go through the frames of a range."""
        for frame in read_frames(part.paths[0], part.start, part.stop):
            yield Record(
                index=frame.offset,
                build=partial(_build, frame.text, frame.material, frame.name, self.options),
                name=f"{frame.material}/{frame.name}",
                id=frame.name,
            )

    def card(self, paths: Sequence[Path]) -> Card:
        """Say what the energy is and what was converted."""
        kind = self.options["energy"]
        energy = "total energy of VASP (energy(sigma->0), pseudopotentials), not corrected"
        if kind == "corrected":
            energy = "total energy of VASP with the MP2020 corrections of the Materials Project"
        return Card(
            data="MPtrj 2022.9",
            energy=energy,
            theory="VASP, PBE and PBE+U, settings of the Materials Project",
            units={
                "energy": "eV",
                "forces": "eV/A",
                "stress": "kBar in VASP's sign, times -0.1 GPa",
                "magmoms": "Bohr magneton",
            },
            notes=("Split by sid: frames of one material must not be in train and val.",),
        )


def _build(text: bytes, material: str, name: str, options: dict[str, Any]) -> Atoms:
    """Decode a frame."""
    import numpy as np
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.stress import full_3x3_to_voigt_6_stress
    from ase.units import GPa

    frame = _decode(text)
    atoms = _structure(frame.pop("structure"))
    labels = {
        "energy": _get(frame, ENERGIES[options["energy"]]),
        "forces": np.array(_get(frame, "force"), dtype=float),
    }
    if (stress := frame.get("stress")) is not None:
        # VASP counts compression as positive, ASE tension.
        stress = np.array(stress, dtype=float).reshape(3, 3)
        labels["stress"] = full_3x3_to_voigt_6_stress(stress) * (-0.1 * GPa)
    if (magmoms := frame.get("magmom")) is not None:
        labels["magmoms"] = np.array(magmoms, dtype=float)
    atoms.calc = SinglePointCalculator(atoms, **labels)
    atoms.info = {k: v for k, v in frame.items() if isinstance(v, str | int | float)}
    atoms.info.update(sid=material, fid=name)
    return atoms


def _decode(text: bytes) -> dict[str, Any]:
    """Decode JSON, which Python writes with NaN and the fast reader refuses."""
    import orjson

    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)


def _get(frame: dict[str, Any], key: str) -> Any:
    """A label that every frame must have."""
    if frame.get(key) is None:
        raise UserError(f"the frame has no {key}")
    return frame[key]


def _structure(structure: dict[str, Any]) -> Atoms:
    """Read pymatgen's description of an ordered crystal."""
    from ase import Atoms

    lattice, sites = structure["lattice"], structure["sites"]
    cell = lattice["matrix"]
    if all("xyz" in site for site in sites):
        where = {"positions": [site["xyz"] for site in sites]}
    else:
        where = {"scaled_positions": [site["abc"] for site in sites]}
    numbers = [_atomic_number(site) for site in sites]
    return Atoms(numbers=numbers, cell=cell, pbc=lattice.get("pbc", True), **where)


def _atomic_number(site: dict[str, Any]) -> int:
    """The element of a site, without an oxidation state."""
    from ase.data import atomic_numbers

    species, *others = site["species"]
    if others or species.get("occu", 1) != 1:
        raise UserError(
            f"site {site.get('label', site['species'])} is disordered; only ordered structures "
            "can be trained on"
        )
    element = species["element"]
    return atomic_numbers.get(element) or atomic_numbers[element.rstrip("0123456789.+-")]
