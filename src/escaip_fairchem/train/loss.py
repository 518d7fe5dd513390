"""A force loss that fairchem lacks; it goes into fairchem's `DDPMTLoss`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from escaip_fairchem.errors import UserError


class HuberNormLoss(nn.Module):
    """Huber's loss of the length r of the error: r^2 / 2 up to delta, then delta (r - delta / 2).

    Small forces weigh little, so that the few large ones of a relaxation are learnt first, and
    outliers weigh as under the published loss of lengths. Unchanged by rotations.

    Args:
        delta: Where it turns linear, in units of the normalizer's rmsd.

    Raises:
        UserError: `delta` is not positive.
    """

    def __init__(self, delta: float = 1.0) -> None:
        super().__init__()
        if not delta > 0:
            raise UserError(f"delta of the Huber loss must be positive, got {delta}")
        self.delta = delta

    def forward(self, pred: Tensor, target: Tensor, natoms: Tensor) -> Tensor:
        """[N, 3], [N, 3] -> [N]; `natoms` is not read."""
        error = torch.linalg.vector_norm(pred - target, dim=-1)
        return F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=self.delta)
