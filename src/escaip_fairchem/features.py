"""Geometric features: radial basis, solid harmonics, bond-orientational order, Legendre.

Shapes: N atoms, E edges (packed neighbour slots), L = (lmax + 1)^2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gaussian_basis(lengths: Tensor, cutoff: float, size: int, width: float) -> Tensor:
    """Gaussians of a distance, evenly spaced on [0, cutoff].

    Args:
        lengths: Distances in Angstrom, [E].
        cutoff: Centre of the last Gaussian, Angstrom.
        size: Number of Gaussians.
        width: Standard deviation in units of the spacing (2.0 as published).

    Returns:
        [E, size].
    """
    centers = torch.linspace(0.0, cutoff, size, dtype=lengths.dtype, device=lengths.device)
    sigma = width * cutoff / (size - 1)
    return torch.exp((lengths[:, None] - centers).square() * (-0.5 / sigma**2))


def solid_harmonics(vectors: Tensor, lmax: int) -> Tensor:
    r"""Real regular solid harmonics in Racah (Schmidt) normalisation.

    On unit vectors the components of one l have squares that sum to 1, so that
    sum_m R_lm(a) R_lm(b) = P_l(a.b). They are homogeneous polynomials: the zero vector
    gives 1 for l = 0 and 0 for every other l. Recurrences: Helgaker, Jorgensen, Olsen,
    Molecular Electronic-Structure Theory (2000), section 6.4.

    Args:
        vectors: [E, 3].
        lmax: Highest degree.

    Returns:
        [E, (lmax + 1)^2], ordered by l, then m = 0, (cos 1, sin 1), (cos 2, sin 2) ...
    """
    x, y, z = vectors.unbind(-1)
    r2 = vectors.square().sum(-1)
    one = torch.ones_like(x)
    diagonal = (one, torch.zeros_like(x))  # cosine and sine part at m = l
    previous: dict[int, tuple[Tensor, Tensor]] = {}
    current = {0: diagonal}
    rows = [one]
    for l in range(1, lmax + 1):
        following = {}
        for m in range(l):
            up = 1.0 / math.sqrt((l + m) * (l - m))
            parts = []
            for part in (0, 1):
                term = (2 * l - 1) * up * z * current[m][part]
                if m in previous:
                    down = math.sqrt((l - 1 + m) * (l - 1 - m)) * up
                    term = term - down * r2 * previous[m][part]
                parts.append(term)
            following[m] = tuple(parts)
        cosine, sine = diagonal
        scale = math.sqrt((2 * l - 1) / (2 * l) * (2 if l == 1 else 1))
        diagonal = (scale * (x * cosine - y * sine), scale * (y * cosine + x * sine))
        following[l] = diagonal
        rows.append(following[0][0])
        for m in range(1, l + 1):
            rows.extend(following[m])
        previous, current = current, following
    return torch.stack(rows, dim=-1)


def bond_orientational_order(
    directions: Tensor,
    receivers: Tensor,
    weights: Tensor,
    num_atoms: int,
    *,
    lmax: int,
    scale: str,
    smooth: bool = False,
) -> Tensor:
    r"""Steinhardt's Q_l of each atom's neighbourhood, l = 0..lmax.

    Q_l = |mean_j R_l(d_ij)|, Steinhardt, Nelson, Ronchetti, Phys. Rev. B 28, 784 (1983);
    as EScAIP's code has it (the paper prints the root inside the sum over m).

    Args:
        directions: Unit vectors of the edges, zero for a self edge, [E, 3].
        receivers: Atom that each edge belongs to, [E].
        weights: Weight of each edge in the mean, [E].
        num_atoms: N.
        lmax: Highest l.
        scale: ``component``: sqrt(2 l + 1) Q_l without a floor (preset ``paper``);
            ``unit``: Q_l with a floor of 1e-3 (preset ``v2``).
        smooth: Replace the floor by the differentiable sqrt(Q_l^2 + 1e-6).

    Returns:
        [N, lmax + 1]; zeros (or the floor) where all weights are zero.
    """
    harmonics = solid_harmonics(directions, lmax) * weights[:, None]
    sizes = [2 * l + 1 for l in range(lmax + 1)]
    total = harmonics.new_zeros(num_atoms, sum(sizes)).index_add(0, receivers, harmonics)
    count = weights.new_zeros(num_atoms).index_add(0, receivers, weights)
    mean = total / torch.where(count > 0, count, 1.0)[:, None]
    q2 = torch.stack([part.square().sum(-1) for part in mean.split(sizes, dim=-1)], dim=-1)
    if smooth:
        q = (q2 + 1e-6).sqrt()
    elif scale == "unit":
        q = q2.clamp(min=1e-6).sqrt()
    else:
        # Q_l = 0 is a cusp (odd l of a site with inversion symmetry): gradient 0 there, and
        # not the arbitrary one that rounding would choose
        cusp = q2 < 1e-10
        q = torch.where(cusp, q2.detach().sqrt(), torch.where(cusp, 1.0, q2).sqrt())
    if scale == "component":
        q = q * q.new_tensor(sizes).sqrt()
    return q


def legendre(cosines: Tensor, lmax: int) -> list[Tensor]:
    """Legendre polynomials P_0..P_lmax by Bonnet's recurrence.

    Args:
        cosines: Any shape.
        lmax: Highest degree.

    Returns:
        lmax + 1 tensors of the shape of `cosines`.
    """
    polynomials = [torch.ones_like(cosines), cosines]
    for l in range(2, lmax + 1):
        polynomials.append(
            ((2 * l - 1) * cosines * polynomials[-1] - (l - 1) * polynomials[-2]) / l
        )
    return polynomials[: lmax + 1]
