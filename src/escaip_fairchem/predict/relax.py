"""Relax whole data sets by the ``fairchem`` command: in batches, by ASE's optimizers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch

from escaip_fairchem.describe import describe
from escaip_fairchem.errors import UserError
from escaip_fairchem.predict.data import join
from escaip_fairchem.predict.runner import PredictRunner
from escaip_fairchem.simulate.relaxation import OPTIMIZERS, Relaxation, relax_all

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from fairchem.core.datasets.atomic_data import AtomicData
    from torch import Tensor

    from escaip_fairchem.predict.data import Arrays
    from escaip_fairchem.predict.runner import Predict
    from escaip_fairchem.simulate.relaxation import Results


class RelaxRunner(PredictRunner):
    """Relaxes every structure of some data sets once, and predicts where it ends.

    As `PredictRunner`, in parts that the plan alone decides: each structure has an optimizer of its
    own, one batch is predicted for a step of all in it, and a structure that has arrived makes room
    for the next one of the part. Parts also hold
    ``positions`` (N, 3) float64 at the end, in A and not wrapped, ``cell`` (n, 3, 3) float64,
    ``steps`` (n,) int32 and ``converged`` (n,) bool. A structure whose energy, forces or stress
    are no longer finite, or that cannot be evaluated any more, stays where it last could; one that
    never could has NaN.

    Args:
        checkpoint: As of `PredictRunner`.
        splits: As of `PredictRunner`.
        optimizer: ``LBFGS``, ``BFGS`` or ``FIRE``, of ASE.
        fmax: A structure is relaxed when no free atom has a larger force, eV/A.
        steps: Most steps of a structure.
        maxstep: Longest move of an atom in a step (of all atoms together with FIRE), A; ASE's
            default if None.
        cell: Relax the cells, too (ASE's `FrechetCellFilter`), which takes stress.
        **options: Further ones of `PredictRunner`.

    Raises:
        UserError: An optimizer that is not among these, or a number that is not positive.
    """

    def __init__(
        self,
        checkpoint: str | None,
        splits: dict[str, Any],
        *,
        optimizer: str = "LBFGS",
        fmax: float = 0.02,
        steps: int = 300,
        maxstep: float | None = 0.04,
        cell: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(checkpoint, splits, **options)
        if optimizer not in OPTIMIZERS:
            raise UserError(f"relax_optimizer={optimizer}; choose one of {', '.join(OPTIMIZERS)}")
        for name, value in (("fmax", fmax), ("relax_steps", steps), ("maxstep", maxstep)):
            if value is not None and value <= 0:
                raise UserError(f"{name}={value}; give a positive number")
        self.relaxation = {"fmax": fmax, "steps": steps, "maxstep": maxstep, "optimizer": optimizer}
        # a plan without cells is as it was before there were any
        self.relaxation |= {"cell": True} if cell else {}
        self.settings |= self.relaxation

    def run(self) -> None:
        """As of `PredictRunner`; a model whose stress or forces do not suit is told before.

        Raises:
            UserError: As there, or a model without stress is to relax cells.
        """
        if self.relaxation.get("cell") and self.checkpoint is not None:
            self._look_at(describe(Path(self.checkpoint)))
        super().run()

    def _look_at(self, model: dict[str, Any]) -> None:
        if "stress" not in {task["property"] for task in model["tasks"]}:
            raise UserError(
                f"{model['checkpoint']} predicts no stress, which cells are relaxed by; train one "
                "that does (training=conservative_stress)"
            )
        if model["forces"] != "conservative":
            logging.warning(
                f"{model['checkpoint']} has {model['forces']} forces, not the gradient of its "
                "energy: relaxations may end where the energy is not lowest, or not at all"
            )

    def outcomes(
        self, predict: Predict, batches: Iterable[tuple[AtomicData, Arrays]]
    ) -> Iterator[tuple[dict[str, Tensor], Arrays]]:
        """Relax the structures of all batches; a new one takes the place of each that arrives."""
        arrays: list[Arrays] = []

        def structures() -> Iterator[AtomicData]:
            for data, of_batch in batches:
                arrays.append(of_batch)
                for one in data.batch_to_atomicdata_list():
                    # else the last structure on its way would hold all of its batch, and with it
                    # open files of the process that loaded it
                    yield one.clone()

        ends = relax(predict, structures(), max_atoms=self.settings["max_atoms"], **self.relaxation)
        yield {}, {**join(arrays), **ends}


class _OfData(Relaxation):
    """One structure, as the model takes it; `number` is its place among all."""

    def __init__(
        self, number: int, data: AtomicData, optimizer: str, maxstep: float | None, cell: bool
    ) -> None:
        super().__init__(data.to_ase_single(), optimizer, maxstep, cell=cell)
        self.number = number
        self._data = data

    def data(self) -> AtomicData:
        """Where it is now."""
        self._data.pos = torch.as_tensor(self.atoms.positions, dtype=self._data.pos.dtype)
        cell = self.atoms.cell.array[None]
        self._data.cell = torch.as_tensor(cell, dtype=self._data.cell.dtype)
        return self._data

    def end(self) -> Arrays:
        """Its arrays of a part; NaN where there never were any results."""
        nothing = {
            "energy": np.nan,
            "forces": np.full((len(self.atoms), 3), np.nan),
            "stress": np.full(6, np.nan),
        }
        results = self.results or nothing
        arrays = {
            "energy": np.array([results["energy"]]),
            "forces": results["forces"].astype(np.float32),
            "positions": self.positions,
            "cell": self.cell.array[None],
            "steps": np.array([self.steps], np.int32),
            "converged": np.array([self.converged]),
        }
        if "stress" in results:
            stress = voigt_6_to_full_3x3_stress(results["stress"])
            arrays["stress"] = stress.reshape(1, 9).astype(np.float32)
        return arrays


def relax(
    predict: Predict,
    structures: Iterable[AtomicData],
    *,
    max_atoms: int,
    optimizer: str,
    fmax: float,
    steps: int,
    maxstep: float | None,
    cell: bool = False,
) -> Arrays:
    """Relax structures side by side; fixed atoms stay.

    Args:
        predict: From a batch to energy (B,), forces (N, 3) and what else the model has.
        structures: On the CPU, taken as there is room.
        max_atoms: Atoms that are predicted at once; a larger structure is alone.
        optimizer: Class of ``ase.optimize`` with one evaluation a step.
        fmax: Largest force of a relaxed structure, eV/A.
        steps: Most steps of a structure.
        maxstep: As of the optimizer, A.
        cell: Relax the cells, too.

    Returns:
        Predictions at the end of each relaxation, in the order of the structures, and
        ``positions``, ``cell``, ``steps``, ``converged``.
    """
    relaxations = (
        _OfData(number, data, optimizer, maxstep, cell) for number, data in enumerate(structures)
    )

    def evaluate(moving: Sequence[_OfData]) -> list[Results]:
        predicted = predict(atomicdata_list_to_batch([each.data() for each in moving]))
        return _results(predicted, [len(each.atoms) for each in moving])

    ends: dict[int, Arrays] = {}  # and not the relaxations, whose optimizers remember all steps
    for each in relax_all(relaxations, evaluate, fmax=fmax, steps=steps, max_atoms=max_atoms):
        if each.error:
            logging.warning(f"a structure stops after {each.steps} steps: {each.error}")
        ends[each.number] = each.end()
    return join([ends[number] for number in sorted(ends)])


def _results(predicted: dict[str, Tensor], natoms: list[int]) -> list[Results]:
    """ASE's results of each structure of a batch."""
    columns = {
        "energy": predicted["energy"].double().cpu().numpy().ravel(),
        "forces": [each.numpy() for each in predicted["forces"].double().cpu().split(natoms)],
    }
    if "stress" in predicted:
        stress = predicted["stress"].double().cpu().numpy().reshape(-1, 3, 3)
        columns["stress"] = full_3x3_to_voigt_6_stress(stress)
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
