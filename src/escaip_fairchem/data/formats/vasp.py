"""Folders of VASP calculations: ``vasprun.xml`` or ``OUTCAR``, which ASE reads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from escaip_fairchem.data.formats.base import Card, Format, Part, Record
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ase import Atoms

#: Output files that are read, the best first: ``vasprun.xml`` has more digits.
OUTPUTS = {
    "vasprun.xml": "vasp-xml",
    "vasprun.xml.gz": "vasp-xml",
    "OUTCAR": "vasp-out",
    "OUTCAR.gz": "vasp-out",
}
ENERGIES = {"e_0_energy": "energy", "e_fr_energy": "free_energy"}
LABELS = ("forces", "stress", "magmoms")


@dataclass(frozen=True)
class Calculation(Part):
    """The output files of a calculation, the one to read first.

    Attributes:
        root: The input that they were found in.
    """

    root: Path = Path()


class VaspFolders(Format):
    """A folder tree with VASP's output, every calculation with all its ionic steps.

    An unfinished calculation gives the steps that are whole. ``energy=e_0_energy`` is VASP's
    ``energy(sigma->0)``, as ASE and the Materials Project take it; ``e_fr_energy`` is the free
    energy, whose derivatives the forces are where electrons are smeared.

    ``sid`` is the calculation's folder below the input, ``fid`` the ionic step from 0.
    """

    name = "vasp"
    summary = "a folder tree with vasprun.xml or OUTCAR files, .gz too"
    OPTIONS: ClassVar[dict[str, Any]] = {"energy": "e_0_energy"}

    def __init__(self, **options: Any) -> None:
        """Check the options.

        Raises:
            UserError: If ``energy`` is none that VASP writes.
        """
        super().__init__(**options)
        if self.options["energy"] not in ENERGIES:
            raise UserError(f"energy={self.options['energy']}: choose of {', '.join(ENERGIES)}")

    @classmethod
    def claims(cls, path: Path) -> bool:
        """A folder with one of the files anywhere below."""
        return path.is_dir() and next(_calculations(path), None) is not None

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """One part per calculation."""
        return [Calculation(files, root=root) for root in paths for files in _calculations(root)]

    def read(self, part: Calculation) -> Iterator[Record]:
        """Go through the ionic steps of a calculation.

        Raises:
            UserError: If none is whole.
        """
        folder = part.paths[0].parent
        sid = folder.relative_to(part.root).as_posix()
        sid = folder.resolve().name if sid == "." else sid
        for step, atoms in enumerate(_steps(part.paths)):
            build = partial(_reduced, atoms, sid, step, ENERGIES[self.options["energy"]])
            yield Record(index=step, build=build, name=sid, id=f"{sid}/{step}")

    def card(self, paths: Sequence[Path]) -> Card:
        """Say what the energy is."""
        kind = "energy(sigma->0)" if self.options["energy"] == "e_0_energy" else "free energy"
        return Card(
            energy=f"VASP's {kind}, relative to the pseudopotentials' atoms",
            theory="VASP; functional and settings are in the files",
            units={"stress": "kBar in VASP's sign, times -0.1 GPa"},
            notes=(
                "Steps whose electrons did not converge are kept.",
                "Split by sid: steps of one calculation must not be in train and val.",
            ),
        )


def _calculations(root: Path) -> Iterator[tuple[Path, ...]]:
    """The output files of each calculation below a folder, in order of the folders."""
    for folder, subfolders, names in os.walk(root):
        subfolders.sort()
        if found := [Path(folder, name) for name in OUTPUTS if name in names]:
            yield tuple(found)


def _steps(paths: Sequence[Path]) -> list[Atoms]:
    """The labelled ionic steps of the first file that has any."""
    from ase.io import read

    reasons = []
    for path in paths:
        try:
            steps = read(path, index=":", format=OUTPUTS[path.name])
        except Exception as error:  # ASE's readers raise of every type
            lines = str(error).strip().splitlines() or [""]
            reasons.append(f"{path.name}: {type(error).__name__} {lines[0]}".strip())
            continue
        if steps := [atoms for atoms in steps if atoms.calc is not None]:
            return steps
        reasons.append(f"{path.name}: no whole ionic step")
    raise UserError(f"{paths[0].parent} cannot be read ({'; '.join(reasons)})")


def _reduced(source: Atoms, sid: str, step: int, energy: str) -> Atoms:
    """Keep what models are trained on."""
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.constraints import FixAtoms

    results = source.calc.results
    atoms = Atoms(
        numbers=source.numbers,
        positions=source.positions,
        cell=source.cell,
        pbc=source.pbc,
        constraint=[c for c in source.constraints if isinstance(c, FixAtoms)],
        info={"sid": sid, "fid": step},
    )
    labels = {key: results[key] for key in LABELS if results.get(key) is not None}
    if "forces" not in labels or results.get(energy) is None:
        raise UserError("the ionic step has no forces or no energy")
    atoms.calc = SinglePointCalculator(atoms, energy=results[energy], **labels)
    return atoms
