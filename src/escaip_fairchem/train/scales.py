"""Scales of what is learnt: the normalizers of fairchem's tasks, where they must agree."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from escaip_fairchem.errors import UserError
from escaip_fairchem.heads import ConservativeHead

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fairchem.core.units.mlip_unit.mlip_unit import Task
    from torch import nn


def require_one_scale(model: nn.Module, tasks: Iterable[Task]) -> None:
    """Refuse scales with which forces would not be derivatives of the energy.

    fairchem multiplies what the model gives by the ``rmsd`` of each task, derivatives too.

    Args:
        model: Whose output heads say whether forces are derivatives.
        tasks: What it learns.

    Raises:
        UserError: Energy, forces and stress of a `ConservativeHead` have different scales.
    """
    heads = getattr(model, "output_heads", {}).values()
    if not any(isinstance(head, ConservativeHead) for head in heads):
        return
    scales = {task.name: float(task.normalizer.rmsd) for task in tasks}
    smallest = min(scales.values(), default=1.0)
    if not all(math.isclose(scale, smallest, rel_tol=1e-6) for scale in scales.values()):
        raise UserError(
            "forces by differentiation have the scale of the energy, but normalizers have rmsd "
            + ", ".join(f"{scale:g} ({name})" for name, scale in scales.items())
            + "; give all of them the same, as training=conservative does"
        )


def require_scale_of_start(tasks: Iterable[Task], before: Sequence[Mapping[str, Any]]) -> None:
    """Refuse another scale of energies than that of the checkpoint whose weights a run begins with.

    Args:
        tasks: What is learnt.
        before: What the checkpoint was trained for, as `escaip_fairchem.describe.describe_task`
            says it.

    Raises:
        UserError: Means or scales differ.
    """
    scales = {(t["mean"], t["rmsd"]) for t in before if t["property"] == "energy"}
    for task in tasks:
        if task.property != "energy" or not scales:
            continue
        mean, rmsd = float(task.normalizer.mean), float(task.normalizer.rmsd)
        if not any(
            math.isclose(mean, m, rel_tol=1e-6) and math.isclose(rmsd, r, rel_tol=1e-6)
            for m, r in scales
        ):
            m, r = min(scales)
            raise UserError(
                f"energies of the checkpoint have mean {m:g} and rmsd {r:g}, here {mean:g} and "
                f"{rmsd:g}; set normalizer.mean={m!r} normalizer.rmsd={r!r}"
            )
