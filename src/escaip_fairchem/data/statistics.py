"""Element references and scales of a whole data set, file by file, on several cores."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escaip_fairchem.data.frames import (
    LabelKeys,
    expand_inputs,
    free_atoms,
    labelled,
    read_frames,
)
from escaip_fairchem.data.references import NUM_REFERENCES, ReferenceFit, RunningRms
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ase import Atoms


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
    inputs: Sequence[str | Path], keys: LabelKeys | None = None, workers: int = 1
) -> LabelStatistics:
    """Go through all structures of a set.

    Args:
        inputs: Folders of ASE-LMDB files, or files and patterns that ASE reads.
        keys: Where labels are when there is no calculator.
        workers: Processes; each takes a file at a time.

    Raises:
        UserError: If a label is missing, naming file and frame, or there are no structures.
    """
    total = LabelStatistics()
    task = partial(_of_file, keys or LabelKeys())
    for part in over_files(task, expand_inputs(inputs), workers, "files"):
        total.merge(part)
    if not total.frames:
        raise UserError(f"{', '.join(map(str, inputs))}: no structures")
    return total


def over_files(
    task: Callable[[Path], Any], paths: Sequence[Path], workers: int, what: str
) -> Iterator[Any]:
    """Results of a task for each file, in order, with a progress bar.

    Args:
        task: Function of a path that can be pickled.
        paths: The files.
        workers: Processes; 1 works in this one.
        what: Word for the bar.
    """
    from tqdm import tqdm

    with _mapper(min(workers, len(paths))) as mapped:
        yield from tqdm(mapped(task, paths), total=len(paths), unit=f" {what}", disable=None)


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    if workers <= 1:
        yield map
        return
    # spawned, because a fork would copy the threads of numpy and torch in an unknown state
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield pool.map


def _of_file(keys: LabelKeys, path: Path) -> LabelStatistics:
    found = LabelStatistics()
    for frame in read_frames([path]):
        try:
            found.add(labelled(frame, keys))
        except UserError as error:
            raise UserError(f"{frame.place}: {error}") from error
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
