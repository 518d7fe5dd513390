"""Muon: momentum made orthogonal, for the weight matrices; AdamW for all the rest."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

#: Matrices with a side up to this are vectors in disguise (a head's last layer).
_VECTOR_SIDE = 3


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Replace the singular values of each matrix by numbers near 1 (0.7 to 1.2).

    Newton-Schulz iteration with the quintic of Jordan, https://kellerjordan.github.io/posts/muon,
    whose slope at 0 is steep rather than its limit exact.

    Args:
        matrices: [batch, rows, columns], in the precision to compute in.
        steps: Iterations.

    Returns:
        [batch, rows, columns]; a zero matrix stays zero.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(
            x, torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315), x, beta=3.4445
        )
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """Muon for weights of linear layers, AdamW for embeddings, norms, biases and last layers.

    A matrix moves along its orthogonalised Nesterov momentum, scaled to the length of AdamW's
    steps (0.2 sqrt(largest side); Liu et al., arXiv 2502.16982). `torch.optim.Muon` does the
    same one matrix at a time in bfloat16, which is many times slower on a CPU, and takes no
    other parameters; here matrices of one shape go together, in their own precision.

    Args:
        params: Parameter groups as fairchem makes them: ``weight_decay: 0`` marks what is not
            the weight of a linear layer.
        lr: Step of the matrices.
        adam_lr: Step of all the rest.
        weight_decay: Decoupled decay, of groups that do not set it.
        momentum: Of the matrices.
        betas: Of AdamW.

    Raises:
        UserError: A setting is out of range, or nothing is marked as a weight.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 2e-3,
        *,
        adam_lr: float = 5e-4,
        weight_decay: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        for name, value in (("lr", lr), ("adam_lr", adam_lr)):
            if not value > 0:
                raise UserError(f"{name} must be positive, got {value}")
        if not 0 <= momentum < 1:
            raise UserError(f"momentum must be at least 0 and below 1, got {momentum}")
        groups = list(params)
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        split = []
        for group in groups:
            decay = group.get("weight_decay", weight_decay)
            matrices = [p for p in group["params"] if decay and _is_matrix(p)]
            rest = [p for p in group["params"] if not (decay and _is_matrix(p))]
            if matrices:
                split.append({**group, "params": matrices, "lr": lr, "momentum": momentum})
            if rest:
                split.append({**group, "params": rest, "lr": adam_lr, "momentum": None})
        if all(group["momentum"] is None for group in split):
            raise UserError(
                "Muon needs a weight_decay above 0: fairchem sets the weights of linear layers "
                "apart by it (1e-6 is next to none)"
            )
        super().__init__(split, lr=lr, betas=tuple(betas), weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = []
        for group in self.param_groups:
            if group["momentum"] is not None:
                moved += self._move_matrices(group)
        # AdamW passes over parameters without a gradient
        gradients = [p.grad for p in moved]
        for p in moved:
            p.grad = None
        super().step()
        for p, gradient in zip(moved, gradients, strict=True):
            p.grad = gradient
        return loss

    def _move_matrices(self, group: dict[str, Any]) -> list[Tensor]:
        by_shape = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                by_shape[p.shape, p.dtype, p.device].append(p)
        for (shape, _, _), matrices in by_shape.items():
            gradients = [p.grad for p in matrices]
            momenta = [self._state(p)["exp_avg"] for p in matrices]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
            directions = orthogonalize(torch.stack(ahead)).unbind()
            length = group["lr"] * 0.2 * max(shape) ** 0.5
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, directions, alpha=-length)
        return [p for matrices in by_shape.values() for p in matrices]

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        """Named as AdamW names them, which reads every state when one is loaded."""
        state = self.state[p]
        if not state:
            state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p))
        return state


def _is_matrix(p: Tensor) -> bool:
    return p.ndim == 2 and min(p.shape) > _VECTOR_SIDE
