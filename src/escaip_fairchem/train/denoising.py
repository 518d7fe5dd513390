"""Denoising of non-equilibrium structures (DeNS) beside the training for direct forces."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.modules.loss import L2NormLoss
from fairchem.core.modules.normalization.normalizer import Normalizer

from escaip_fairchem.data.corruption import LABELLED, NOISE, corrupt_all
from escaip_fairchem.errors import UserError
from escaip_fairchem.train.counting import SummedLoss

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fairchem.core.datasets.atomic_data import AtomicData
    from fairchem.core.units.mlip_unit.mlip_unit import Task
    from torch import Tensor, nn


class SharedLoss(SummedLoss):
    """A loss of forces or of noise: the mean over a structure counts the atoms of both.

    Those of the other kind have an infinite target, see `corrupt`.
    """

    def forward(self, pred: Tensor, target: Tensor, mult_mask: Tensor, natoms: Tensor) -> Tensor:
        """As of `DDPMTLoss`."""
        self._counted = mult_mask | target.isinf().all(1)
        return super().forward(pred, target, mult_mask, natoms)

    def per_structure(self, pred: Tensor, _: Tensor, *others: Any) -> Tensor:
        """As of `DDPMTLoss`."""
        return super().per_structure(pred, self._counted, *others)


@dataclass(frozen=True)
class Denoising:
    """What is corrupted, and how much it weighs; see `escaip_fairchem.data.corruption`.

    The loss is the length of the error of the noise in units of its standard deviation, reduced as
    that of the forces. A mean, over all atoms or over those of a structure, is over all labelled
    ones, as in the authors' code: each counts once, by its force or by its noise.

    Attributes:
        prob: Part of the training structures that are corrupted.
        std: Standard deviation of each component of the noise, A.
        corrupt_ratio: Part of the free atoms of such a structure that move.
        weight: Of the loss, in units of the weight of the force loss.
        max_force_norm: A structure with a larger force, eV/A, stays as it is; None: none does.

    Raises:
        UserError: A value is out of range.
    """

    prob: float
    std: float
    corrupt_ratio: float
    weight: float
    max_force_norm: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name == "max_force_norm" and value is None:
                continue
            part = name in ("prob", "corrupt_ratio")
            words = "a number above 0 and at most 1" if part else "a positive number"
            if not isinstance(value, (int, float)) or not 0 < value <= (1 if part else math.inf):
                raise UserError(f"denoising.{name} must be {words}, got {value}")

    def with_noise(self, tasks: Sequence[Task]) -> list[Task]:
        """Tasks with summed losses, and the noise as one more.

        Args:
            tasks: From `escaip_fairchem.train.counting.summed`.

        Raises:
            UserError: Not one of them is that of forces.
        """
        forces = _forces(tasks)
        loss = forces.loss_fn
        shared = replace(forces, loss_fn=SharedLoss(loss.loss_fn, loss.reduction, loss.coefficient))
        noise = replace(
            forces,
            name=NOISE,
            property="noise",
            normalizer=Normalizer(mean=0.0, rmsd=self.std),
            loss_fn=SharedLoss(L2NormLoss(), loss.reduction, self.weight * loss.coefficient),
            metrics=[],
        )
        return [*(shared if task is forces else task for task in tasks), noise]

    @staticmethod
    def counted(tasks: Sequence[Task]) -> list[Task]:
        """The tasks of `with_noise` with the labels that their losses are divided by the number of.

        Args:
            tasks: From `with_noise`.
        """
        names = {NOISE, _forces(tasks).name}
        return [replace(task, name=LABELLED) if task.name in names else task for task in tasks]

    def corrupt(self, batches: Sequence[AtomicData], tasks: Sequence[Task], *place: int) -> None:
        """Corrupt some structures.

        Args:
            batches: On the CPU; their tensors are replaced, not changed.
            tasks: What is learnt.
            place: See `corrupt_all`.
        """
        forces = _forces(tasks)
        corrupt_all(
            batches,
            *place,
            prob=self.prob,
            std=self.std,
            corrupt_ratio=self.corrupt_ratio,
            max_force_norm=self.max_force_norm,
            scale=float(forces.normalizer.rmsd),
            forces=forces.name,
            free_only=forces.train_on_free_atoms,
        )

    def error(self, predictions: Mapping[str, Mapping[str, Tensor]], batch: AtomicData) -> Tensor:
        """Sum of the lengths of the errors of the noise, A, and number of atoms that moved, [2].

        Predicting none has a mean length of sqrt(8 / pi) = 1.6 standard deviations.
        """
        moved = batch[NOISE].isfinite().all(1)
        predicted = self.std * predictions[NOISE]["noise"].detach().double()
        lengths = torch.linalg.vector_norm(predicted - batch[NOISE].nan_to_num(posinf=0.0), dim=1)
        return torch.stack([(lengths * moved).sum(), moved.sum()])


def require_parts(model: nn.Module, denoising: Denoising | None) -> None:
    """Refuse a model with parts for denoising where nothing is denoised, and the reverse.

    Their parameters would have no gradient, at which several ranks stop.

    Args:
        model: What is trained.
        denoising: How, or None.

    Raises:
        UserError: The one without the other.
    """
    found = {
        "backbone.force_encoding: true": getattr(
            getattr(getattr(model, "backbone", None), "config", None), "force_encoding", False
        ),
        f"a head {NOISE}": NOISE in getattr(model, "output_heads", {}),
    }
    for what, there in found.items():
        if there and denoising is None:
            raise UserError(f"the model has {what}, but nothing is denoised; add +denoising=dens")
        if denoising is not None and not there:
            raise UserError(f"denoising needs {what}; +denoising=dens brings it")


def belongs_to_denoising(name: str) -> bool:
    """Whether a parameter is of the force encoding or of the noise head."""
    return ".attributes.forces." in name or f"output_heads.{NOISE}." in name


def fit_denoising(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of one model for another that denoises where it did not, or the reverse.

    Neither changes energies and forces. The log says what stays behind, or begins anew.

    Args:
        weights: By the names of `model`.
        model: Where they go to.
    """
    own = {name: value for name, value in model.state_dict().items() if belongs_to_denoising(name)}
    there = [name for name in weights if belongs_to_denoising(name)]
    fitting = dict(weights)
    if there and not own:
        count = sum(fitting.pop(name).numel() for name in there)
        logging.info(f"{count:,} parameters stay behind, which served denoising")
    elif own and not there:
        count = sum(value.numel() for value in own.values())
        logging.info(f"{count:,} parameters begin with random weights: they serve denoising")
        fitting |= own
    return fitting


def _forces(tasks: Sequence[Task]) -> Task:
    found = [task for task in tasks if task.property == "forces"]
    if len(found) != 1:
        raise UserError(f"denoising needs one task of forces, got {len(found)}")
    return found[0]
