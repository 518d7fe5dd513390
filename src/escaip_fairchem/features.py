"""Geometric features: radial basis, solid harmonics, bond-orientational order, Legendre.

Shapes: N atoms, E edges (packed neighbour slots), L = (lmax + 1)^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def gaussian_basis(
    lengths: Tensor, cutoff: float, size: int, width: float, columns: slice = slice(None)
) -> Tensor:
    """Gaussians of a distance, evenly spaced on [0, cutoff].

    Args:
        lengths: Distances in Angstrom, [E].
        cutoff: Centre of the last Gaussian, Angstrom.
        size: Number of Gaussians.
        width: Standard deviation in units of the spacing (2.0 as published).
        columns: Which of the Gaussians.

    Returns:
        [E, size] (its `columns`).
    """
    centers = torch.linspace(0.0, cutoff, size, dtype=lengths.dtype, device=lengths.device)
    centers = centers[columns]
    sigma = width * cutoff / (size - 1)
    return torch.exp((lengths[:, None] - centers).square() * (-0.5 / sigma**2))


@dataclass
class RadialBasis:
    """`gaussian_basis` of sorted lengths, in blocks of rows without the columns that vanish.

    A Gaussian is nothing a few widths away, so that of 600 columns some 30 matter to a length.
    A block of similar lengths and its columns is a small dense matrix.

    Attributes:
        blocks: Basis of consecutive groups of sorted lengths, [U_b, R_b] each.
        starts: First column of each block.
        rows: Row of each edge among the sorted lengths, [E].
    """

    blocks: list[Tensor]
    starts: list[int]
    rows: Tensor

    @classmethod
    def build(
        cls, lengths: Tensor, rows: Tensor, cutoff: float, size: int, width: float
    ) -> RadialBasis:
        """Sort lengths and evaluate their Gaussians.

        Args:
            lengths: Distances in Angstrom, [U]; far beyond the cutoff for a row of zeros.
            rows: The length of each edge, [E].
            cutoff: See `gaussian_basis`.
            size: See `gaussian_basis`.
            width: See `gaussian_basis`.
        """
        if torch.compiler.is_compiling():  # bands would be constants of the compiled code
            return cls([gaussian_basis(lengths, cutoff, size, width)], [0], rows)
        order = torch.sort(lengths.detach()).indices
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        # a block's band is read on the host: free on a CPU, a synchronisation elsewhere
        count = min(16, size // 32, len(lengths) // 64) if lengths.device.type == "cpu" else 1
        spacing, blocks, starts = cutoff / (size - 1), [], []
        # what is left out is lost in rounding
        reach = width * math.sqrt(-2 * math.log(1e-2 * torch.finfo(lengths.dtype).eps))
        for part in lengths.index_select(0, order).tensor_split(max(count, 1)):
            first, end = 0, size
            if count > 1:
                low, high = (part[[0, -1]].detach() / spacing).tolist()
                first = min(max(math.floor(low - reach), 0), size - 1)
                end = max(min(math.ceil(high + reach) + 1, size), first + 1)
            blocks.append(gaussian_basis(part, cutoff, size, width, slice(first, end)))
            starts.append(first)
        return cls(blocks, starts, place.index_select(0, rows))


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
        # made on the device: a copy from the host would wait for a GPU
        q = q * torch.arange(1, 2 * lmax + 2, 2, dtype=q.dtype, device=q.device).sqrt()
    return q


def force_projections(
    forces: Tensor, directions: Tensor, receivers: Tensor, senders: Tensor
) -> Tensor:
    """Numbers of each edge that say what forces act on its ends, unchanged by rotations.

    The projections on the directions to all neighbours fix a force. Zero forces give zeros.

    Args:
        forces: Of the atoms, [N, 3].
        directions: Unit vectors of the edges, zero for a self edge, [E, 3].
        receivers: Atom that each edge belongs to, [E].
        senders: Its neighbour, [E].

    Returns:
        Projections of the forces on atom and neighbour, and lengths of both forces, [E, 4].
    """
    lengths = torch.linalg.vector_norm(forces, dim=1)
    ends = receivers, senders
    projections = [(forces.index_select(0, end) * directions).sum(1) for end in ends]
    return torch.stack([*projections, *(lengths.index_select(0, end) for end in ends)], dim=1)


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
