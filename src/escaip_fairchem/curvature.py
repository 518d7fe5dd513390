"""Second derivatives of a conservative model's energy: Hessians and their products.

Shapes: N atoms. Values are in the model's normalised units over Angstrom^2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from fairchem.core.datasets.atomic_data import AtomicData

    from escaip_fairchem.model import EScAIP


def hessian(gradient: Tensor, positions: Tensor) -> Tensor:
    """Second derivatives of an energy, a row for each backward pass.

    One pass for all rows (`torch.vmap`) is not possible: the attention has its own derivatives,
    which write into given memory.

    Args:
        gradient: First derivatives with their graph, [N, 3].
        positions: What they were taken by, [N, 3].

    Returns:
        [3 N, 3 N], coordinates x, y, z of the first atom, of the second ...; without a graph.
    """
    rows = [_product(component, positions, None) for component in gradient.flatten()]
    return torch.stack(rows).flatten(1)


def hessian_vector_product(model: EScAIP, data: AtomicData, vectors: Tensor) -> Tensor:
    """Hessian of the energy times a vector, at the price of a few energies.

    The structures of a batch do not touch each other: one call gives a product for each.

    Args:
        model: With a `ConservativeHead`.
        data: fairchem's batch.
        vectors: A displacement of each atom, [N, 3].

    Returns:
        d^2 E / dR^2 times `vectors`, in the model's units, [N, 3].

    Raises:
        UserError: The model has no conservative head.
    """
    heads = [head for head in model.output_heads.values() if hasattr(head, "prefixes")]
    regress = model.backbone.regress_config
    if not heads or not regress.forces:
        raise UserError("a Hessian needs a ConservativeHead and a backbone with forces")
    with torch.enable_grad():
        emb = model.backbone(data)
        positions = emb["positions"]
        energy = heads[0].total_energy(emb).sum()
        (gradient,) = torch.autograd.grad(energy, positions, create_graph=True)
        return _product(gradient, positions, vectors.to(gradient))


def _product(gradient: Tensor, positions: Tensor, vectors: Tensor | None) -> Tensor:
    if not gradient.requires_grad:  # a lone atom: nothing moves its energy
        return torch.zeros_like(positions)
    (product,) = torch.autograd.grad(
        gradient, positions, vectors, retain_graph=vectors is None, allow_unused=True
    )
    return torch.zeros_like(positions) if product is None else product
