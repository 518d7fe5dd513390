"""The model that fairchem trains and loads: a backbone and its heads."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

from fairchem.core.models.base import HydraModel
from fairchem.core.modules.normalization.normalizer import Normalizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fairchem.core.datasets.atomic_data import AtomicData
    from fairchem.core.units.mlip_unit.mlip_unit import Task
    from torch import Tensor


class EScAIP(HydraModel):
    """fairchem's `HydraModel` with EScAIP's weight-decay groups and single atoms.

    A head that returns {property: tensor} answers the task of its own name; a head that
    returns {task: {property: tensor}} (`ConservativeHead`) answers those tasks.

    Args:
        supports_single_atoms: An atom without neighbours is a valid structure here.
        **kwargs: See `HydraModel`: backbone and heads as configurations.
    """

    def __init__(self, *, supports_single_atoms: bool = True, **kwargs: Any) -> None:
        super().__init__(supports_single_atoms=supports_single_atoms, **kwargs)

    def forward(self, data: AtomicData) -> dict[str, dict[str, Tensor]]:
        """{task name: {property: tensor}}; energy [B], forces [N, 3], stress [B, 9]."""
        outputs = {}
        for name, result in super().forward(data).items():
            nested = any(isinstance(value, dict) for value in result.values())
            if result:  # a head that serves training alone has nothing to say outside of it
                outputs.update(result if nested else {name: result})
        return outputs

    def add_tasks(self, tasks: Sequence[Task]) -> None:
        """Add tasks that were not trained, such as stress or Hessian, scaled as derivatives.

        fairchem gives them the normaliser of the energy whole; its mean is a constant, which
        belongs to no derivative.
        """
        own = [copy(task) for task in tasks]
        for task in own:
            if task.inference_only and task.property in ("forces", "stress", "hessian"):
                task.normalizer = Normalizer(mean=0.0, rmsd=task.normalizer.rmsd.clone())
        super().add_tasks(own)

    def no_weight_decay(self) -> set[str]:
        """Full names of parameters that fairchem's optimizer groups must not decay."""
        parts = {"backbone": self.backbone}
        parts |= {f"output_heads.{name}": head for name, head in self.output_heads.items()}
        return {
            f"{prefix}.{name}"
            for prefix, part in parts.items()
            if hasattr(part, "no_weight_decay")
            for name in part.no_weight_decay()
        }
