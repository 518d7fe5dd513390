"""What the blocks read of a batch, whole or in chunks.

Shapes: N atoms, E edges (packed). All of it imports torch only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from escaip_fairchem.features import RadialBasis
    from escaip_fairchem.kernels import AttentionGeometry, SortedLengths


@dataclass
class BlockInputs:
    """What every block reads of a batch besides its hidden state.

    Attributes:
        species: Atomic numbers, [N].
        boo: Bond-orientational order, [N, lmax + 1].
        rbf: Radial basis of the distinct lengths.
        senders: Neighbour of each edge, [E].
        receivers: Atom of each edge, ascending, [E].
        starts: First edge of each atom, [N].
        counts: Edges of each atom, [N].
        system_idx: Structure of each atom, [N].
        attention: Geometry of the attention.
        forces: `force_projections` of the forces that are an input, [E, 4]; None without.
        first: Atom that `starts`, `counts` and `system_idx` begin with; not 0 in a chunk.
        orders: `order_by` of the radial basis' rows and of the neighbours, for gradients of
            fused edges; empty without.
    """

    species: Tensor
    boo: Tensor
    rbf: RadialBasis | SortedLengths
    senders: Tensor
    receivers: Tensor
    starts: Tensor
    counts: Tensor
    system_idx: Tensor
    attention: AttentionGeometry
    forces: Tensor | None = None
    first: int = 0
    orders: tuple[Tensor, ...] = ()

    @property
    def index(self) -> list[Tensor]:
        """What `gather_gelu` reads of a batch."""
        edges = self.rbf.rows, self.senders, self.receivers
        return [x.contiguous() for x in (*edges, self.starts, self.counts, *self.orders)]

    def chunks(self, size: int) -> list[BlockInputs]:
        """Consecutive groups of `size` atoms with their edges.

        What belongs to all atoms (species, BOO, radial basis) and the numbers of atoms in
        `senders` and `receivers` stay as they are.
        """
        total, chunks = len(self.counts), []
        bounds = [*self.starts[::size].tolist(), len(self.receivers)]
        for index, first in enumerate(range(0, total, size)):
            atoms = slice(first, min(first + size, total))
            edges = slice(bounds[index], bounds[index + 1])
            part = replace(
                self,
                rbf=replace(self.rbf, rows=self.rbf.rows[edges]),
                senders=self.senders[edges],
                receivers=self.receivers[edges],
                starts=self.starts[atoms] - edges.start,
                counts=self.counts[atoms],
                system_idx=self.system_idx[atoms],
                attention=self.attention.chunk(atoms, edges),
                forces=None if self.forces is None else self.forces[edges],
                first=first,
            )
            chunks.append(part)
        return chunks
