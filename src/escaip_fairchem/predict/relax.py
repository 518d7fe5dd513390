"""Relax whole data sets by the ``fairchem`` command: in batches, by ASE's optimizers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase.stress import full_3x3_to_voigt_6_stress
from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch

from escaip_fairchem.describe import describe
from escaip_fairchem.errors import UserError
from escaip_fairchem.predict.runner import PredictRunner
from escaip_fairchem.simulate.relaxation import OPTIMIZERS, Relaxation

if TYPE_CHECKING:
    from fairchem.core.datasets.atomic_data import AtomicData
    from torch import Tensor

    from escaip_fairchem.predict.data import Arrays
    from escaip_fairchem.predict.runner import Predict


class RelaxRunner(PredictRunner):
    """Relaxes every structure of some data sets once, and predicts where it ends.

    As `PredictRunner`, in parts and batches that the plan alone decides: each structure has an
    optimizer of its own, and one batch is predicted for a step of all. Parts also hold
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

    def outcome(
        self, predict: Predict, data: AtomicData, arrays: Arrays
    ) -> tuple[dict[str, Tensor], Arrays]:
        """Relax a batch; its predictions are those of the last step."""
        predicted, path = relax(predict, data, **self.relaxation)
        return predicted, {**arrays, **path}


class _OfData(Relaxation):
    """One structure of a batch.

    Attributes:
        data: As the model takes it, where it is now.
        predicted: Properties where they were last finite.
    """

    def __init__(self, data: AtomicData, optimizer: str, maxstep: float | None, cell: bool) -> None:
        super().__init__(data.to_ase_single(), optimizer, maxstep, cell=cell)
        self.data = data
        self.predicted: dict[str, Tensor] = {}

    def predicted_here(self, predicted: dict[str, Tensor], fmax: float, steps: int) -> bool:
        """Take a step, unless this is the end; says whether it took one."""
        results = {
            "energy": float(predicted["energy"]),
            "forces": predicted["forces"].double().cpu().numpy(),
        }
        if "stress" in predicted:
            stress = predicted["stress"].double().cpu().numpy().reshape(3, 3)
            results["stress"] = full_3x3_to_voigt_6_stress(stress)
        going = self.go_on(results, fmax, steps)
        if self.results is results:
            self.predicted = predicted
        if self.error:
            logging.warning(f"a structure stops after {self.steps} steps: {self.error}")
        self.data.pos = torch.as_tensor(self.atoms.positions, dtype=self.data.pos.dtype)
        self.data.cell = torch.as_tensor(self.atoms.cell.array[None], dtype=self.data.cell.dtype)
        return going

    @property
    def end(self) -> dict[str, Tensor]:
        """Predictions at the end; NaN if there never were any."""
        if self.predicted:
            return self.predicted
        nothing = self.data.pos.new_full
        return {
            "energy": nothing((1,), np.nan, dtype=torch.float64),
            "forces": nothing((len(self.atoms), 3), np.nan),
            "stress": nothing((1, 9), np.nan),
        }


def relax(
    predict: Predict,
    data: AtomicData,
    *,
    optimizer: str,
    fmax: float,
    steps: int,
    maxstep: float | None,
    cell: bool = False,
) -> tuple[dict[str, Tensor], Arrays]:
    """Relax the structures of a batch side by side; fixed atoms stay.

    Args:
        predict: From a batch to energy (B,), forces (N, 3) and what else the model has.
        data: The batch, on the CPU.
        optimizer: Class of ``ase.optimize`` with one evaluation a step.
        fmax: Largest force of a relaxed structure, eV/A.
        steps: Most steps of a structure.
        maxstep: As of the optimizer, A.
        cell: Relax the cells, too.

    Returns:
        Predictions at the end of each relaxation, and ``positions``, ``cell``, ``steps``,
        ``converged``.
    """
    structures = [_OfData(one, optimizer, maxstep, cell) for one in data.batch_to_atomicdata_list()]
    moving = structures
    while moving:
        found = _predict_each(predict, moving)
        moving = [
            each
            for each, predicted in zip(moving, found, strict=True)
            if predicted is not None and each.predicted_here(predicted, fmax, steps)
        ]
    ends = [each.end for each in structures]
    names = [name for name in ends[0] if all(name in end for end in ends)]
    return {name: torch.cat([end[name].cpu() for end in ends]) for name in names}, {
        "positions": np.concatenate([each.positions for each in structures]),
        "cell": np.array([each.cell.array for each in structures]),
        "steps": np.array([each.steps for each in structures], np.int32),
        "converged": np.array([each.converged for each in structures]),
    }


def _predict_each(predict: Predict, moving: list[_OfData]) -> list[dict[str, Tensor] | None]:
    """Predictions of each by one batch; None where one cannot be evaluated, even alone."""
    try:
        predicted = predict(atomicdata_list_to_batch([each.data for each in moving]))
    except (UserError, torch.OutOfMemoryError) as error:
        reason = str(error).splitlines()[0]
    else:
        return _taken_apart(predicted, moving)
    # outside of the handler, which keeps what the failed prediction has allocated
    if len(moving) > 1:
        return [_predict_each(predict, [each])[0] for each in moving]
    logging.warning(f"a structure stops after {moving[0].steps} steps: {reason}")
    return [None]


def _taken_apart(predicted: dict[str, Tensor], moving: list[_OfData]) -> list[dict[str, Tensor]]:
    natoms = [len(each.atoms) for each in moving]
    of_each = zip(
        *(value.split(natoms if name == "forces" else 1) for name, value in predicted.items()),
        strict=True,
    )
    return [dict(zip(predicted, values, strict=True)) for values in of_each]
