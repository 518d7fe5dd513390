"""Edges to atoms and back: sums by atom, and what the fused edge embedding reads of a batch.

Imports torch only.

Shapes: N atoms, E edges (packed), U distinct lengths, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

#: Lengths at a time without gradients, so that memory does not grow with them.
_PART = 2**16


@dataclass
class SortedLengths:
    """Sorted lengths in place of `RadialBasis`, whose Gaussians a kernel evaluates as it goes.

    Attributes:
        lengths: Distances in Angstrom, ascending, [U].
        rows: Row of each edge among the sorted lengths, [E].
        centers: Of the Gaussians, [size].
        runs: Lengths that tiles of Gaussians see, `triton_radial_ops.runs_of`.
        cutoff: Centre of the last Gaussian, Angstrom.
        sigma: Standard deviation, Angstrom.
    """

    lengths: Tensor
    rows: Tensor
    centers: Tensor
    runs: Tensor
    cutoff: float
    sigma: float

    @classmethod
    def build(
        cls, lengths: Tensor, rows: Tensor, cutoff: float, size: int, width: float
    ) -> SortedLengths:
        """As `RadialBasis.build`."""
        from escaip_fairchem.kernels.triton_radial_ops import reach_of, runs_of

        order = torch.sort(lengths.detach()).indices
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        # the same numbers as in `gaussian_basis`: a rounding of a centre is 1e-5 of a Gaussian
        like = {"dtype": lengths.dtype, "device": lengths.device}
        centers = torch.linspace(0.0, cutoff, size, **like)
        lengths, sigma = lengths.index_select(0, order), width * cutoff / (size - 1)
        runs = runs_of(lengths.detach(), centers, reach_of(sigma, lengths.dtype))
        return cls(lengths, place.index_select(0, rows), centers, runs, cutoff, sigma)

    def linear(self, weight: Tensor, bias: Tensor) -> Iterator[Tensor]:
        """Parts [U_i, out] of a linear map of the basis; one if gradients are recorded."""
        from escaip_fairchem.kernels.triton_radial_ops import expand_op

        rest = self.centers, self.runs, self.cutoff, self.sigma, 0
        recorded = torch.is_grad_enabled()
        for lengths in [self.lengths] if recorded else self.lengths.split(_PART):
            yield expand_op(weight, bias, lengths, *rest)


def order_by(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Edges sorted by their rows of a table, [E], and where each of `count` rows begins and ends.

    Sums of gradients take this order, which is always the same.
    """
    ordered, order = torch.sort(rows, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(count + 1, device=rows.device))


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, in float32 if it is in half precision: for sums of many terms, as residuals are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sum_edges(edge: Tensor, receivers: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    """Sums of edges by atom.

    Args:
        edge: Features of edges, [E, H].
        receivers: Atom of each edge, ascending from 0, [E].
        starts: First edge of each atom, [N].
        counts: Edges of each atom, [N].

    Returns:
        [N, H], in float32 at least.
    """
    edge = at_least_float32(edge)
    return edge.new_zeros(len(counts), edge.shape[1]).index_add(0, receivers, edge)


def gather_gelu(
    distance: Tensor | None,
    source: Tensor,
    target: Tensor,
    index: list[Tensor],
    norm: Tensor | None = None,
) -> Tensor:
    """GELU of a sum of terms gathered to edges, and its RMS norm if asked, in one pass.

    Args:
        distance: Terms of lengths, [U, H], or None.
        source: Terms of neighbours, [N, H].
        target: Terms of atoms, [N, H].
        index: Row of `distance`, neighbour and atom of each edge, [E] each; first edge and
            number of edges of each atom, [N] each; for gradients also `order_by` of the rows and
            of the neighbours.
        norm: Weight of the norm, [H], or None.

    Returns:
        [E, H] in the type of `source`; computed in float32, or float64 for float64.
    """
    from escaip_fairchem.kernels.triton_gather_ops import gather_op

    return gather_op(distance, source, target, norm, index)
