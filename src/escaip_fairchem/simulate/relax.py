"""Relax the structures of some files side by side, resumably; see `relax_structures`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import ase.io
import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator

from escaip_fairchem.display import open_display
from escaip_fairchem.errors import UserError
from escaip_fairchem.files import write_csv
from escaip_fairchem.simulate.folder import claimed, write_frames, write_json
from escaip_fairchem.simulate.relaxation import Relaxation, evaluator, relax_all
from escaip_fairchem.simulate.structures import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ase import Atoms

    from escaip_fairchem.simulate.model import Model
    from escaip_fairchem.simulate.relaxation import Results

#: A kill loses this much of a relaxation at most.
SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class RelaxOptions:
    """How structures are relaxed.

    Attributes:
        fmax: Largest force of a relaxed structure, eV/A.
        steps: Most steps of a structure; 0 evaluates it only.
        optimizer: ``LBFGS``, ``BFGS`` or ``FIRE``, of ASE.
        maxstep: Longest move of an atom in a step, A; ASE's default if None.
        max_atoms: Atoms of a batch.
        cell: Relax the cells, too.
    """

    fmax: float = 0.05
    steps: int = 500
    optimizer: str = "LBFGS"
    maxstep: float | None = None
    max_atoms: int = 2000
    cell: bool = False


@dataclass(frozen=True)
class Relaxed:
    """How a relaxation ended.

    Attributes:
        name: Of the structure.
        formula: Its chemical formula.
        atoms: Number of atoms.
        steps: Taken.
        converged: Whether forces are small enough.
        fmax: Largest force on a free atom (with a cell, of ASE's filter), eV/A.
        energy: At the end, eV.
        energy_start: At the start, eV.
        error: Why it ended early, else empty.
    """

    name: str
    formula: str
    atoms: int
    steps: int
    converged: bool
    fmax: float
    energy: float
    energy_start: float
    error: str


def relax_structures(
    model: Model, structures: Sequence[tuple[str, Atoms]], out: Path, options: RelaxOptions
) -> tuple[list[Relaxed], list[Atoms]]:
    """Relax structures, or go on with that.

    Into the folder: ``trajectories/00000.traj`` of each with energies and forces, ``relaxed.traj``
    with all ends, ``table.csv``. Constraints, tags and order of atoms are kept. One that is stopped
    in between, or has not arrived after fewer steps than now, goes on from its last saved step, its
    optimizer without memory.

    Args:
        model: What evaluates them.
        structures: Names and structures; not changed.
        out: Folder of the results.
        options: How.

    Returns:
        How each ended, and the structures there.

    Raises:
        UserError: Numbers that make no sense, a cell to relax without stress, or the folder holds
            another simulation.
    """
    _refuse(model, structures, options)
    settings = {
        **model.settings,
        **asdict(options),
        "structures_sha256": fingerprint([atoms for _, atoms in structures]),
    }
    del settings["steps"]  # with more of them it goes on
    with claimed(out, settings):
        _relax_missing(model, structures, out, options)
        records = [
            Relaxed(**json.loads(_record(out, i).read_text())) for i in range(len(structures))
        ]
        ends = [ase.io.read(_trajectory(out, i), -1) for i in range(len(structures))]
        write_frames(out / "relaxed.traj", ends)
        write_csv(out / "table.csv", map(asdict, records))
    return records, ends


def table(records: Sequence[Relaxed], limit: int = 50) -> str:
    """The first of them as lines, and how many are relaxed."""
    width = max(9, *(len(record.name) + 2 for record in records[:limit]))
    lines = [f"{'structure':<{width}}{'atoms':>7}{'steps':>7}{'energy, eV':>15}{'fmax, eV/A':>12}"]
    for record in records[:limit]:
        end = record.error or ("" if record.converged else "not converged")
        lines.append(
            f"{record.name:<{width}}{record.atoms:>7}{record.steps:>7}{record.energy:>15.4f}"
            f"{record.fmax:>12.4f}  {end}".rstrip()
        )
    if len(records) > limit:
        lines.append(f"... and {len(records) - limit} more in table.csv")
    done = sum(record.converged for record in records)
    lines.append(f"{done} of {len(records)} relaxed, {sum(bool(r.error) for r in records)} failed")
    return "\n".join(lines)


class _Recorded(Relaxation):
    """A relaxation that keeps its frames, and may begin with those of an earlier start."""

    def __init__(self, index: int, name: str, frames: list[Atoms], options: RelaxOptions) -> None:
        self.index, self.name = index, name
        # the last frame is evaluated again
        self.frames = frames[:-1]
        atoms = frames[-1].copy()
        super().__init__(atoms, options.optimizer, options.maxstep, cell=options.cell)
        self.steps = len(self.frames)

    def go_on(self, results: Results, fmax: float, steps: int) -> bool:
        """As of the class above, with a frame more."""
        frame = self.atoms.copy()
        going = super().go_on(results, fmax, steps)
        if self.results is results:
            frame.calc = SinglePointCalculator(
                frame, **{k: v for k, v in results.items() if np.isfinite(v).all()}
            )
            self.frames.append(frame)
        if not going and self.results is not results:
            self.error = "energy or forces are not finite any more"
        elif not going and not np.isfinite(self.fmax):
            self.error = "energy or forces are not finite"
        return going

    @property
    def record(self) -> Relaxed:
        """How it ended."""
        energies = [each.calc.results.get("energy", np.nan) for each in self.frames if each.calc]
        return Relaxed(
            name=self.name,
            formula=self.atoms.get_chemical_formula(),
            atoms=len(self.atoms),
            steps=self.steps,
            converged=self.converged,
            fmax=self.fmax,
            energy=float(energies[-1]) if energies else np.nan,
            energy_start=float(energies[0]) if energies else np.nan,
            error=self.error or "",
        )


def _relax_missing(
    model: Model, structures: Sequence[tuple[str, Atoms]], out: Path, options: RelaxOptions
) -> None:
    missing = [i for i in range(len(structures)) if not _ended(out, i, options)]
    done = len(structures) - len(missing)
    display = open_display("relaxed", len(structures), done)
    saved, steps, start = time.monotonic(), 0, time.monotonic()
    evaluate = evaluator(model.calculator)

    def begin() -> Iterator[_Recorded]:
        for index in missing:
            name, atoms = structures[index]
            path = _trajectory(out, index)
            frames = ase.io.read(path, ":") if path.is_file() else [atoms]
            yield _Recorded(index, name, frames, options)

    def after_step(moving: list[_Recorded]) -> None:
        nonlocal saved, steps
        steps += len(moving)
        if display.due():
            rate = steps / (time.monotonic() - start)
            largest = max((each.fmax for each in moving), default=0.0)
            display.show(done, f"{rate:.3g} steps/s, largest force {largest:.3g} eV/A")
        if time.monotonic() - saved > SAVE_SECONDS:
            for each in moving:
                write_frames(_trajectory(out, each.index), each.frames)
            saved = time.monotonic()

    for each in relax_all(
        begin(),
        lambda moving: evaluate([each.atoms for each in moving]),
        fmax=options.fmax,
        steps=options.steps,
        max_atoms=options.max_atoms,
        after_step=after_step,
    ):
        write_frames(_trajectory(out, each.index), each.frames or [each.atoms])
        write_json(_record(out, each.index), asdict(each.record))
        done += 1
    display.close()


def _trajectory(out: Path, index: int) -> Path:
    return out / "trajectories" / f"{index:05d}.traj"


def _record(out: Path, index: int) -> Path:
    return out / "records" / f"{index:05d}.json"


def _ended(out: Path, index: int, options: RelaxOptions) -> bool:
    if not (path := _record(out, index)).is_file():
        return False
    record = Relaxed(**json.loads(path.read_text()))
    return record.converged or bool(record.error) or record.steps >= options.steps


def _refuse(model: Model, structures: Sequence[tuple[str, Atoms]], options: RelaxOptions) -> None:
    if options.fmax <= 0 or options.steps < 0 or options.max_atoms < 1:
        raise UserError("--fmax and --max-atoms must be positive, --steps not negative")
    if not structures:
        raise UserError("no structure to relax")
    if not options.cell:
        return
    if not model.has_stress:
        raise UserError(f"--cell needs stress, and {model.name} predicts none; leave --cell out")
    for name, atoms in structures:
        if not atoms.pbc.all():
            raise UserError(
                f"--cell: {name} is not periodic along all axes, so its cell means nothing; "
                "relax it without --cell"
            )
