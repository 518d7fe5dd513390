"""Relax whole data sets by the ``fairchem`` command: in batches, by ASE's optimizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch

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
    ``positions`` (N, 3) float64 at the end, in A and not wrapped, ``steps`` (n,) int32 and
    ``converged`` (n,) bool. A structure whose energy or forces are no longer finite stays where
    they last were.

    Args:
        checkpoint: As of `PredictRunner`.
        splits: As of `PredictRunner`.
        optimizer: ``LBFGS``, ``BFGS`` or ``FIRE``, of ASE.
        fmax: A structure is relaxed when no free atom has a larger force, eV/A.
        steps: Most steps of a structure.
        maxstep: Longest move of an atom in a step (of all atoms together with FIRE), A.
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
        maxstep: float = 0.04,
        **options: Any,
    ) -> None:
        super().__init__(checkpoint, splits, **options)
        if optimizer not in OPTIMIZERS:
            raise UserError(f"relax_optimizer={optimizer}; choose one of {', '.join(OPTIMIZERS)}")
        for name, value in (("fmax", fmax), ("relax_steps", steps), ("maxstep", maxstep)):
            if value <= 0:
                raise UserError(f"{name}={value}; give a positive number")
        self.relaxation = {"fmax": fmax, "steps": steps, "maxstep": maxstep, "optimizer": optimizer}
        self.settings |= self.relaxation

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

    def __init__(self, data: AtomicData, optimizer: str, maxstep: float) -> None:
        super().__init__(data.to_ase_single(), optimizer, maxstep)
        self.data = data
        self.predicted: dict[str, Tensor] = {}

    def predicted_here(self, predicted: dict[str, Tensor], fmax: float, steps: int) -> bool:
        """Take a step, unless this is the end; says whether it took one."""
        results = {
            "energy": float(predicted["energy"]),
            "forces": predicted["forces"].double().cpu().numpy(),
        }
        going = self.go_on(results, fmax, steps)
        if self.results is results:
            self.predicted = predicted
        self.data.pos = torch.as_tensor(self.atoms.positions, dtype=self.data.pos.dtype)
        return going


def relax(
    predict: Predict,
    data: AtomicData,
    *,
    optimizer: str,
    fmax: float,
    steps: int,
    maxstep: float,
) -> tuple[dict[str, Tensor], Arrays]:
    """Relax the structures of a batch side by side; cells and fixed atoms stay.

    Args:
        predict: From a batch to energy (B,), forces (N, 3) and what else the model has.
        data: The batch, on the CPU.
        optimizer: Class of ``ase.optimize`` whose steps use forces only.
        fmax: Largest force of a relaxed structure, eV/A.
        steps: Most steps of a structure.
        maxstep: As of the optimizer, A.

    Returns:
        Predictions at the end of each relaxation, and ``positions``, ``steps``, ``converged``.
    """
    structures = [_OfData(one, optimizer, maxstep) for one in data.batch_to_atomicdata_list()]
    moving = structures
    while moving:
        predicted = predict(atomicdata_list_to_batch([each.data for each in moving]))
        natoms = [len(each.atoms) for each in moving]
        of_each = zip(
            *(value.split(natoms if name == "forces" else 1) for name, value in predicted.items()),
            strict=True,
        )
        moving = [
            each
            for each, values in zip(moving, of_each, strict=True)
            if each.predicted_here(dict(zip(predicted, values, strict=True)), fmax, steps)
        ]
    ends = [each.predicted for each in structures]
    return {name: torch.cat([end[name] for end in ends]) for name in ends[0]}, {
        "positions": np.concatenate([each.positions for each in structures]),
        "steps": np.array([each.steps for each in structures], np.int32),
        "converged": np.array([each.converged for each in structures]),
    }
