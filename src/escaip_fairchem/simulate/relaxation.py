"""Relaxations side by side: ASE's optimizers, with one evaluation for a step of many structures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ase.optimize
import numpy as np
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.filters import FrechetCellFilter

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from ase import Atoms
    from ase.calculators.calculator import Calculator

    #: ASE's results of one structure: energy (eV), forces (N, 3) (eV/A), perhaps stress (6,).
    Results = Mapping[str, Any]
    #: From structures to the results of each.
    Evaluate = Callable[[Sequence[Atoms]], list[Results]]

#: Those that need one evaluation a step, of forces only.
OPTIMIZERS = ("LBFGS", "BFGS", "FIRE")
#: Cells that a relaxation may come to. Outside of this there are no crystals, and neighbours within
#: a cutoff may be too many for any memory. A^3 for each atom, and A between opposite faces.
VOLUMES, LEAST_HEIGHT = (1.0, 1e6), 0.1


class Relaxation:
    """One structure on its way, evaluated from outside.

    Args:
        atoms: Moved in place; its constraints are respected.
        optimizer: ``LBFGS``, ``BFGS`` or ``FIRE``, of ASE.
        maxstep: Longest move of an atom in a step (of all atoms together with FIRE), A; ASE's
            default if None.
        cell: Relax the cell, too (ASE's `FrechetCellFilter`).

    Attributes:
        atoms: Where it is now.
        results: ASE's results where they were last finite.
        positions: Where that was, (N, 3), A.
        cell: The cell there.
        steps: Done so far.
        fmax: Largest force on a free atom then, eV/A; with a cell, of its filter.
        converged: Whether that is small enough.
        error: Why it could not be evaluated, or not any more, if it could not.
    """

    def __init__(
        self, atoms: Atoms, optimizer: str, maxstep: float | None = None, *, cell: bool = False
    ) -> None:
        self.atoms = atoms
        self.results: Results = {}
        self.positions, self.cell = atoms.positions.copy(), atoms.cell.copy()
        self.steps = 0
        self.fmax = np.nan
        self.converged = False
        self.error: str | None = None
        self._needed = ("energy", "forces", "stress") if cell else ("energy", "forces")
        self._moving = FrechetCellFilter(atoms) if cell else atoms
        self._optimizer = getattr(ase.optimize, optimizer)(
            self._moving, logfile=None, maxstep=maxstep
        )

    def go_on(self, results: Results, fmax: float, steps: int) -> bool:
        """Take a step, unless this is the end; says whether it took one.

        Args:
            results: Of where the structure is now.
            fmax: Forces of a relaxed structure are not larger, eV/A.
            steps: Most steps.
        """
        finite = all(np.isfinite(results[name]).all() for name in self._needed)
        if self.results and not finite:
            return self._stay()
        self.results = results
        self.positions, self.cell = self.atoms.positions.copy(), self.atoms.cell.copy()
        if not finite:
            return False
        self.atoms.calc = SinglePointCalculator(
            self.atoms, **{name: results[name] for name in self._needed}
        )
        # of the free atoms, as ASE leaves out the others
        self.fmax = float(np.linalg.norm(self._moving.get_forces(), axis=1).max())
        self.converged = self.fmax <= fmax
        if self.converged or self.steps >= steps:
            return False
        self._optimizer.step()
        self._optimizer.nsteps += 1
        self.steps += 1
        if self._is_lost():
            self.error = "cell or positions have left all bounds"
            return self._stay()
        return True

    def _is_lost(self) -> bool:
        """Whether it cannot sensibly be evaluated where it is now."""
        cell = self.atoms.cell.array
        if not np.isfinite([*self.atoms.positions, *cell]).all():
            return True
        if isinstance(self._moving, FrechetCellFilter):
            volume = abs(np.linalg.det(cell))
            faces = np.linalg.norm(np.cross(cell[[1, 2, 0]], cell[[2, 0, 1]]), axis=1)
            least, most = VOLUMES
            inside = least <= volume / len(self.atoms) <= most
            return not (inside and volume >= LEAST_HEIGHT * faces.max())
        return False

    def _stay(self) -> bool:
        """Go back to where results were last finite, which is the end."""
        self.atoms.set_cell(self.cell)
        self.atoms.set_positions(self.positions, apply_constraint=False)
        return False


def evaluator(calculator: Calculator) -> Evaluate:
    """Evaluate structures by a calculator: in one batch if it can, else one after the other."""
    if hasattr(calculator, "calculate_many"):
        return calculator.calculate_many

    def evaluate(structures: Sequence[Atoms]) -> list[Results]:
        many = []
        for atoms in structures:
            bare = atoms.copy()
            bare.set_constraint()
            bare.calc = calculator
            results = {"energy": bare.get_potential_energy(), "forces": bare.get_forces()}
            if "stress" in calculator.implemented_properties and bare.cell.rank == 3:
                results["stress"] = bare.get_stress()
            many.append(results)
        return many

    return evaluate


def relax_all(
    relaxations: Iterable[Relaxation],
    evaluate: Callable[[Sequence[Relaxation]], Sequence[Results]],
    *,
    fmax: float,
    steps: int,
    max_atoms: int,
    after_step: Callable[[list[Relaxation]], None] | None = None,
) -> Iterator[Relaxation]:
    """Relax structures side by side; a new one takes the place of each that has arrived.

    Args:
        relaxations: Those to do, taken as there is room.
        evaluate: From relaxations to the results of each where it is now.
        fmax: Largest force of a relaxed structure, eV/A.
        steps: Most steps of a structure.
        max_atoms: Atoms of a batch; a larger structure is alone.
        after_step: Called after each step with those that go on.

    Yields:
        Each relaxation when it ends.
    """
    waiting = iter(relaxations)
    following = next(waiting, None)
    moving: list[Relaxation] = []
    while True:
        atoms = sum(len(each.atoms) for each in moving)
        while following and (not moving or atoms + len(following.atoms) <= max_atoms):
            moving.append(following)
            atoms += len(following.atoms)
            following = next(waiting, None)
        if not moving:
            return
        going = []
        for each, results in zip(moving, _evaluate_each(evaluate, moving), strict=True):
            if isinstance(results, str):
                each.error = results
                yield each
            elif each.go_on(results, fmax, steps):
                going.append(each)
            else:
                yield each
        if after_step is not None:
            after_step(going)
        moving = going


def _evaluate_each(
    evaluate: Callable[[Sequence[Relaxation]], Sequence[Results]], moving: Sequence[Relaxation]
) -> list[Results | str]:
    """The results of each, or why there are none: one bad structure must not stop the others."""
    try:
        return list(evaluate(moving))
    except (UserError, torch.OutOfMemoryError) as error:
        if len(moving) == 1:
            return [str(error).partition("\n")[0]]
    # outside of the handler, which keeps what the failed evaluation has allocated
    half = len(moving) // 2
    return [*_evaluate_each(evaluate, moving[:half]), *_evaluate_each(evaluate, moving[half:])]
