"""Element references and scales of a whole data set, part by part, on several cores."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escaip_fairchem.data.frames import free_atoms
from escaip_fairchem.data.plan import make_plan
from escaip_fairchem.data.references import NUM_REFERENCES, ReferenceFit, RunningRms
from escaip_fairchem.data.sources import frames_of, over_parts, place_of
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ase import Atoms

    from escaip_fairchem.data.formats.base import Part
    from escaip_fairchem.data.plan import Reading


@dataclass
class LabelStatistics:
    """What the labels of a set say about its references and scales, in constant memory.

    Attributes:
        energies: Energies against compositions.
        per_atom: The same, each structure divided by its atoms.
        forces: Force components of free atoms, eV/A.
        stress: Stress components (nine), eV/A^3.
        frames: Structures.
        with_stress: Structures with stress.
    """

    energies: ReferenceFit = field(default_factory=ReferenceFit)
    per_atom: ReferenceFit = field(default_factory=ReferenceFit)
    forces: RunningRms = field(default_factory=RunningRms)
    stress: RunningRms = field(default_factory=RunningRms)
    frames: int = 0
    with_stress: int = 0

    def add(self, atoms: Atoms) -> None:
        """Add a labelled structure."""
        results = atoms.calc.results
        self.energies.add(atoms.numbers, results["energy"])
        self.per_atom.add(atoms.numbers, results["energy"], 1 / len(atoms))
        self.forces.add(results["forces"][free_atoms(atoms)])
        self.frames += 1
        if "stress" in results:
            self.stress.add(atoms.get_stress(voigt=False))
            self.with_stress += 1

    def merge(self, other: LabelStatistics) -> None:
        """Add the structures of another one."""
        self.energies.merge(other.energies)
        self.per_atom.merge(other.per_atom)
        self.forces.merge(other.forces)
        self.stress.merge(other.stress)
        self.frames += other.frames
        self.with_stress += other.with_stress


def collect(
    inputs: Sequence[str | Path],
    format_name: str | None = None,
    options: dict[str, Any] | None = None,
    workers: int = 1,
) -> LabelStatistics:
    """Go through all structures of a set.

    Args:
        inputs: Whatever `escaip convert` reads, folders of ASE-LMDB files included.
        format_name: Name of the format; found by a look at the inputs by default.
        options: Options of the format, such as where labels are.
        workers: Processes.

    Raises:
        UserError: If a label is missing, naming file and frame, or there are no structures.
    """
    total = LabelStatistics()
    plan = make_plan(inputs, format_name=format_name, options=options)
    for part in over_parts(_of_part, [(plan.reading, part) for part in plan.parts], workers):
        total.merge(part)
    if not total.frames:
        raise UserError(f"{', '.join(map(str, inputs))}: no structures")
    return total


def _of_part(reading: Reading, part: Part) -> LabelStatistics:
    found = LabelStatistics()
    for frame in frames_of(reading, part):
        if "forces" not in (frame.atoms.calc.results if frame.atoms.calc else {}):
            raise UserError(f"{place_of(frame)}: no energy and forces; give labelled structures")
        found.add(frame.atoms)
    return found


def read_given(text: str) -> dict[int, float]:
    """Energies of single elements as the user gives them.

    Args:
        text: ``H=-13.587,C=-1029.49``, or a YAML file of symbols and energies, eV.

    Returns:
        eV by atomic number.

    Raises:
        UserError: An unknown element or something that is no number.
    """
    import yaml
    from ase.data import atomic_numbers

    if Path(text).is_file():
        pairs = yaml.safe_load(Path(text).read_text())
        if not isinstance(pairs, dict):
            raise UserError(f"{text}: write a line like `H: -13.587` for each element")
    else:
        pairs = dict(pair.partition("=")[::2] for pair in text.split(","))
    given = {}
    for symbol, value in pairs.items():
        number = atomic_numbers.get(str(symbol).strip())
        if not number or number >= NUM_REFERENCES:
            raise UserError(f"--isolated: {symbol!r} is no element; write H=-13.587,C=-1029.49")
        try:
            given[number] = float(value)
        except (TypeError, ValueError):
            raise UserError(
                f"--isolated: {symbol}={value!r} is no energy in eV; write H=-13.587,C=-1029.49 or "
                "name a YAML file"
            ) from None
    return given
