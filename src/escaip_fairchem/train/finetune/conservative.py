"""From a direct model to a conservative one with the same backbone and energy head."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from escaip_fairchem.errors import UserError
from escaip_fairchem.model import EScAIP

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

CONSERVATIVE = "escaip_fairchem.ConservativeHead"


def conservative_head(heads: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Name of the head whose forces are derivatives of the energy, if there is one."""
    return next((name for name, head in heads.items() if is_conservative(head)), None)


def is_conservative(head: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a `ConservativeHead`."""
    return str(head["module"]).endswith("ConservativeHead")


def as_conservative(
    weights: Mapping[str, Tensor], model: Mapping[str, Any], head: str
) -> dict[str, Tensor]:
    """Weights of a direct model for a conservative one; the energy stays what it was.

    What stays behind is what made direct forces and stress: their heads, and the states of edges
    behind the last attention. The log says how much that is.

    Args:
        weights: Of the direct model, by its own names.
        model: Arguments of its `EScAIP`.
        head: Name of the `ConservativeHead` of the other.

    Returns:
        Weights by the names of the conservative model.

    Raises:
        UserError: The direct model has no energy head, or several.
    """
    energy = [n for n, h in model["heads"].items() if str(h["module"]).endswith(".EnergyHead")]
    if len(energy) != 1:
        raise UserError(
            f"the checkpoint has the heads {', '.join(model['heads'])}: a conservative model needs "
            "one EnergyHead to begin with"
        )
    backbone = {**model["backbone"], "direct_forces": False, "direct_stress": False}
    with torch.device("meta"):
        kept = EScAIP(backbone=backbone, heads={head: {"module": CONSERVATIVE}}).state_dict()
    before, after = f"output_heads.{energy[0]}.", f"output_heads.{head}."
    renamed = {
        after + name.removeprefix(before) if name.startswith(before) else name: value
        for name, value in weights.items()
    }
    left = {name: value.numel() for name, value in renamed.items() if name not in kept}
    logging.info(
        f"of {sum(value.numel() for value in renamed.values()):,} parameters "
        f"{sum(left.values()):,} stay behind, which made direct forces and stress: "
        + ", ".join(sorted({_part(name) for name in left}))
    )
    return {name: value for name, value in renamed.items() if name in kept}


def _part(name: str) -> str:
    """First parts of a parameter's name, as far as they say which module it is of."""
    parts = name.split(".")
    return ".".join(parts[: 4 if parts[1] == "blocks" else 2])
