"""The model that fairchem trains and loads: a backbone and its heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fairchem.core.models.base import HydraModel

if TYPE_CHECKING:
    from fairchem.core.datasets.atomic_data import AtomicData
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
            outputs.update(result if nested else {name: result})
        return outputs

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
