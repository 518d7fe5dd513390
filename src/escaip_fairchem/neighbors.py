"""Candidate neighbour pairs within a radius: fairchem's searches, or vesin's on a CPU.

All take unwrapped positions, each structure's own `pbc` per axis, and any cell; all
return the same pairs. Nothing here is differentiated: distances are recomputed from the
positions afterwards.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from ase.geometry import complete_cell
from fairchem.core.graph.compute import generate_graph
from torch import Tensor

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

#: Atoms closer than this cannot be meant, Angstrom.
MIN_DISTANCE = 0.1

#: Elements of the first tensor in a block of `in_blocks`.
BLOCK = 2**17

#: Wrapping starts at this fraction of a cell below 0, so that rounding does not send
#: atoms at 0 to the other side.
WRAP_MARGIN = 0.0123


@dataclass
class Structures:
    """A batch of structures: positions [N, 3], cell [B, 3, 3], pbc [B, 3], system_idx [N]."""

    positions: Tensor
    cell: Tensor
    pbc: Tensor
    natoms: Tensor
    system_idx: Tensor


@dataclass
class Pairs:
    """Directed pairs: neighbour `senders` of atom `receivers`, lattice `offsets` of it, [P]."""

    senders: Tensor
    receivers: Tensor
    offsets: Tensor

    def select(self, mask: Tensor) -> Pairs:
        """The pairs where `mask` is true."""
        # one nonzero and index_select: far faster on a CPU than three times x[mask]
        rows = mask.nonzero()[:, 0]
        fields = (self.senders, self.receivers, self.offsets)
        return Pairs(*(field.index_select(0, rows) for field in fields))

    def unordered(self) -> Pairs:
        """Each pair once, [P / 2]: of i -> j and j -> i the one with i < j; of images, one sign."""
        return self.select(_is_forward(self.senders, self.receivers, self.offsets))

    def turned(self) -> Pairs:
        """The ends of each pair as `unordered` would have them, exchanged where necessary."""
        senders = torch.minimum(self.senders, self.receivers)
        receivers = torch.maximum(self.senders, self.receivers)

        def turn(*pair: Tensor) -> Tensor:
            return torch.where(_is_forward(*pair)[:, None], pair[2], -pair[2])

        return Pairs(
            senders, receivers, in_blocks(turn, self.senders, self.receivers, self.offsets)
        )

    def vectors(self, structures: Structures) -> Tensor:
        """r_receiver - (r_sender + offset.cell), from neighbour to atom, Angstrom, [P, 3].

        Differentiable with respect to positions and cell.
        """
        positions = structures.positions

        def vectors(senders: Tensor, receivers: Tensor, offsets: Tensor) -> Tensor:
            cell = structures.cell
            if len(cell) > 1:
                cell = cell.index_select(0, structures.system_idx.index_select(0, receivers))
            images = positions.index_select(0, senders) + times_matrix(offsets, cell)
            return positions.index_select(0, receivers) - images

        return in_blocks(vectors, self.senders, self.receivers, self.offsets)


def _is_forward(senders: Tensor, receivers: Tensor, offsets: Tensor) -> Tensor:
    """Whether a pair is the one of the two that `Pairs.unordered` takes."""
    x, y, z = offsets.unbind(1)
    sign = x + 1e-4 * y + 1e-8 * z  # that of the first non-zero
    return (senders < receivers) | ((senders == receivers) & (sign > 0))


def in_blocks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function(*tensors)`` of what belongs together row by row; on a CPU, block by block.

    What it computes on the way then stays in cache, and needs no fresh pages of memory, which
    take longer than the arithmetic once an array has tens of megabytes.
    """
    rows = max(1, BLOCK // max(1, tensors[0][:1].numel()))
    if tensors[0].device.type != "cpu" or len(tensors[0]) <= rows:
        return function(*tensors)
    parts = zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    return torch.cat([function(*part) for part in parts])


def count_rows(index: Tensor, size: int, mask: Tensor | None = None) -> Tensor:
    """How often each of 0 .. size - 1 is in `index` [M] (where `mask` is true), [size].

    `torch.bincount` reads the largest and the smallest on the host, which waits for a GPU.
    """
    ones = torch.ones_like(index) if mask is None else mask.to(index.dtype)
    return torch.zeros(size, dtype=index.dtype, device=index.device).scatter_add_(0, index, ones)


def times_matrix(vectors: Tensor, matrices: Tensor) -> Tensor:
    """Row vectors times matrices (or one), [M, 3] x [M, 3, 3] -> [M, 3], in full precision.

    Written out, because matrix products may run in TF32 or be autocast during training.
    """
    (x, y, z), (a, b, c) = vectors[:, :, None].unbind(1), matrices.unbind(1)
    return x * a + y * b + z * c


def find_pairs(
    structures: Structures, radius: float, search: str = "auto", *, unordered: bool = False
) -> Pairs:
    """All pairs of atoms within a radius, periodic images included; see `PairSearch`."""
    return PairSearch(structures, search).within(radius, unordered=unordered)


class PairSearch:
    """Searches of one batch for pairs of atoms, periodic images included.

    Args:
        structures: The batch; atoms may lie outside of their cell.
        search: ``auto`` | ``fairchem`` (generate_graph version 2) | ``nvidia`` (version 3)
            | ``vesin``. ``auto`` is version 3 on a GPU with nvalchemiops (unless a structure is
            too dense for it), else version 2.

    Raises:
        UserError: The named search is not installed, or two atoms coincide.
    """

    @torch.no_grad()
    def __init__(self, structures: Structures, search: str = "auto") -> None:
        self._name = _resolve(search, structures.positions.device)
        self._required = search == self._name
        self._wrapped, self._shifts = _wrap(structures)
        _refuse_coincident(self._wrapped)

    @torch.no_grad()
    def within(self, radius: float, *, unordered: bool = False) -> Pairs:
        """The pairs, in no particular order; one exactly at the radius may be missing.

        Args:
            radius: Angstrom.
            unordered: Each pair once, as `Pairs.unordered` has it, instead of i -> j and j -> i.

        Raises:
            UserError: The named search is too small.
        """
        name, pairs = self._name, None
        if name == "vesin":
            pairs = _vesin(self._wrapped, radius, full=not unordered)
        if name == "nvidia":
            pairs = _nvidia(self._wrapped, radius, required=self._required)
        if pairs is None:
            pairs = _fairchem(self._wrapped, radius, version=2, max_neighbors=-1)
        if unordered:
            pairs = pairs.turned() if name == "vesin" else pairs.unordered()
        # the wrapped atom s is s - shift.cell; undo it in the offset of the pair
        offsets = pairs.offsets - self._shifts.index_select(0, pairs.senders)
        offsets += self._shifts.index_select(0, pairs.receivers)
        return Pairs(pairs.senders, pairs.receivers, offsets)


def _resolve(search: str, device: torch.device) -> str:
    needed = {"vesin": "vesin", "nvidia": "nvalchemiops"}
    if search == "auto":
        on_gpu = device.type == "cuda" and importlib.util.find_spec("nvalchemiops")
        return "nvidia" if on_gpu else "fairchem"
    if search in needed and importlib.util.find_spec(needed[search]) is None:
        raise UserError(f"neighbor_search: {search} needs the package {needed[search]}; install it")
    return search


def _wrap(structures: Structures) -> tuple[Structures, Tensor]:
    """Move atoms into their cell along periodic axes; also the lattice shifts taken, [N, 3]."""
    s = structures
    cell = _nonsingular_cell(s)
    inverse = torch.linalg.inv_ex(cell).inverse  # `inv` would wait for a GPU, to look for errors
    fractional = times_matrix(s.positions, inverse[s.system_idx])
    shifts = torch.where(s.pbc[s.system_idx], (fractional + WRAP_MARGIN).floor(), 0.0)
    wrapped = s.positions - times_matrix(shifts, cell[s.system_idx])
    # cell lists want molecules near the origin; a common translation changes no pair
    center = torch.zeros_like(cell[:, 0]).index_add_(0, s.system_idx, wrapped)
    center = center / s.natoms[:, None].to(center.dtype)
    center = torch.where(s.pbc.any(1, keepdim=True), 0.0, center)
    wrapped = wrapped - center[s.system_idx]
    return Structures(wrapped, cell, s.pbc, s.natoms, s.system_idx), shifts


def _nonsingular_cell(s: Structures) -> Tensor:
    """The cells, with rows of axes that are not periodic replaced where the cell is singular."""
    singular = (torch.linalg.det(s.cell).abs() < 1e-6).tolist()
    if not any(singular):
        return s.cell
    cell = s.cell.clone()
    for index in range(len(cell)):
        if not singular[index]:
            continue
        rows = torch.where(s.pbc[index][:, None], s.cell[index], 0.0).cpu().numpy()
        periodic = int(s.pbc[index].sum())
        cell[index] = torch.from_numpy(complete_cell(rows)).to(cell)
        if np.linalg.matrix_rank(rows) < periodic or torch.linalg.det(cell[index]).abs() < 1e-6:
            raise UserError(
                f"structure {index} of the batch is periodic along an axis whose cell vector "
                "is zero or parallel to another; set its cell, or pbc to False there"
            )
    return cell


def _fairchem(s: Structures, radius: float, version: int, max_neighbors: int) -> Pairs:
    graph = generate_graph(
        _GraphInput(s),
        cutoff=radius,
        max_neighbors=max_neighbors,
        enforce_max_neighbors_strictly=False,
        radius_pbc_version=version,
        pbc=s.pbc,
    )
    senders, receivers = graph["edge_index"].long()
    return Pairs(senders, receivers, graph["cell_offsets"].to(s.positions.dtype))


def _nvidia(s: Structures, radius: float, *, required: bool) -> Pairs | None:
    """Version 3, which fills a table and stops without a word when it is full: then None."""
    from nvalchemiops.torch.neighbors.neighbor_utils import estimate_max_neighbors

    width = estimate_max_neighbors(cutoff=radius, safety_factor=2.0)
    pairs = _fairchem(s, radius, version=3, max_neighbors=width)
    counts = count_rows(pairs.receivers, len(s.positions))
    if int(counts.max()) < width:
        return pairs
    if required:
        raise UserError(
            f"atom {int(counts.argmax())} of the batch has {width} or more neighbours within "
            f"{radius:.2f} A, more than neighbor_search: nvidia can hold; use fairchem"
        )
    return None


class _GraphInput(dict):
    """The few fields that fairchem's graph generation reads, by key and by attribute."""

    def __init__(self, s: Structures) -> None:
        super().__init__(
            pos=s.positions, cell=s.cell, pbc=s.pbc, natoms=s.natoms, batch=s.system_idx
        )
        self.__dict__ = self


def _vesin(s: Structures, radius: float, *, full: bool) -> Pairs:
    import vesin

    parts = []
    start = 0
    positions, cells = s.positions.double().cpu().numpy(), s.cell.double().cpu().numpy()
    pbc = s.pbc.cpu().numpy()
    for index, count in enumerate(s.natoms.tolist()):
        search = vesin.NeighborList(cutoff=radius, full_list=full, n_threads=1)
        i, j, shifts = search.compute(
            positions[start : start + count], cells[index], pbc[index], "ijS"
        )
        # unsigned -> signed without a copy
        parts.append((j.view(np.int64) + start, i.view(np.int64) + start, shifts))
        start += count
    fields = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
    senders, receivers, offsets = (torch.from_numpy(p).to(s.positions.device) for p in fields)
    return Pairs(senders, receivers, offsets.to(s.positions.dtype))


def refuse_overlap(shortest: float, lengths: Tensor, senders: Tensor, receivers: Tensor) -> None:
    """Raise a UserError if the `shortest` of `lengths` is less than `MIN_DISTANCE`."""
    if shortest < MIN_DISTANCE:
        worst = int(lengths.argmin())
        _coincide(int(receivers[worst]), int(senders[worst]), shortest)


def _refuse_coincident(wrapped: Structures) -> None:
    """Neighbour searches drop pairs at distance zero silently, so look for those first."""
    p = wrapped.positions
    # equal positions have equal projections on a direction of no symmetry
    order = torch.argsort(0.5257311 * p[:, 0] + 0.7236068 * p[:, 1] + 0.4472136 * p[:, 2])
    order = order[torch.argsort(wrapped.system_idx[order], stable=True)]
    same = wrapped.system_idx[order[1:]] == wrapped.system_idx[order[:-1]]
    gap = torch.linalg.vector_norm(p[order[1:]] - p[order[:-1]], dim=-1)
    hits = same & (gap < 0.01)
    if bool(hits.any()):
        first = int(hits.nonzero()[0])
        _coincide(int(order[first]), int(order[first + 1]), float(gap[first]))


def _coincide(i: int, j: int, distance: float) -> None:
    raise UserError(
        f"atoms {min(i, j)} and {max(i, j)} of the batch are {distance:.3g} A apart; "
        "remove one of them, or check that positions are in Angstrom"
    )
