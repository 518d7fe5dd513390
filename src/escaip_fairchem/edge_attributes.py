"""Edge attributes: distances, species and bond orientations, as every block embeds them anew.

Shapes: N atoms, E edges (packed), U distinct lengths, H hidden. All of it imports torch only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from escaip_fairchem.kernels import banded_linear, fused_edges, gather_gelu, linear, linear_backend
from escaip_fairchem.layers import ACTIVATIONS, ConcatLinear, Prologue, RMSNorm, prologue_linear

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from escaip_fairchem.block_inputs import BlockInputs
    from escaip_fairchem.config import EScAIPConfig
    from escaip_fairchem.features import RadialBasis
    from escaip_fairchem.kernels import SortedLengths


class EdgeAttributes(nn.Module):
    """Edge attributes from distance, and species and BOO of both ends (paper, Figure 3).

    None of it depends on the hidden state; species and BOO parts are computed per atom. For
    denoising (`force_encoding`) forces on both ends are added where they are an input.
    """

    def __init__(self, config: EScAIPConfig) -> None:
        super().__init__()
        elements, boo_size = config.max_num_elements, config.boo_lmax + 1
        self.source_species = nn.Embedding(elements, config.species_dim)
        self.target_species = nn.Embedding(elements, config.species_dim)
        self.source_boo = nn.Linear(boo_size, config.boo_dim)
        self.target_boo = nn.Linear(boo_size, config.boo_dim)
        self.distance = nn.Linear(config.rbf_size, config.rbf_dim)
        sizes = (config.rbf_dim, *(config.boo_dim, config.species_dim) * 2)
        self.output = ConcatLinear(sizes, config.hidden_size)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.mlp_dropout)
        self.linear = linear_backend(prologue_linear)
        self.recompute = config.recompute
        self.fused = fused_edges(config.activation)
        # without a bias, so that no forces are no input
        self.forces = (
            nn.Linear(4, config.hidden_size, bias=False) if config.force_encoding else None
        )
        nn.init.uniform_(self.source_species.weight, -0.001, 0.001)
        nn.init.uniform_(self.target_species.weight, -0.001, 0.001)

    @torch.no_grad()
    def resolve(self) -> None:
        """Widen the initial weights until distances and species tell edges apart (`init`).

        With the published ones an attribute is mostly a constant (from l = 0 of the BOO) and
        hardly knows its species. Forces near equilibrium hang on hundredths of an Angstrom for
        each pair of species, which training must else find first.
        """
        self.distance.weight.mul_(30.0)
        self.output.weight.mul_(3.0)
        nn.init.uniform_(self.source_species.weight, -1.0, 1.0)
        nn.init.uniform_(self.target_species.weight, -1.0, 1.0)

    def terms(self, x: BlockInputs) -> tuple[Tensor, Tensor, Tensor]:
        """What `gather` adds up: terms of lengths [U, H], neighbours [N, H] and atoms [N, H]."""
        act, drop = self.activation, self.dropout
        recompute = self.recompute and not (self.training and drop.p > 0)
        weights = self.output.weights()
        affine = weights[0], self.output.bias, Prologue(act, drop)
        parts = [
            self.linear(*affine, hidden, recompute=recompute) for hidden in self._distances(x.rbf)
        ]
        distance = torch.cat(parts) if len(parts) > 1 else parts[0]
        source = linear(drop(act(self.source_boo(x.boo))), weights[1])
        target = linear(drop(act(self.target_boo(x.boo))), weights[3])
        source = source + linear(self.source_species(x.species), weights[2])
        return distance, source, target + linear(self.target_species(x.species), weights[4])

    def _distances(self, rbf: RadialBasis | SortedLengths) -> Iterator[Tensor]:
        """The linear map of the radial basis, in parts of rows."""
        weight, bias = self.distance.weight, self.distance.bias
        if self.fused:
            yield from rbf.linear(weight, bias)
            return
        # without gradients block by block, which stays in cache and needs no memory
        groups = [(rbf.blocks, rbf.starts)]
        if not torch.is_grad_enabled():
            groups = [([block], [start]) for block, start in zip(*groups[0], strict=True)]
        for blocks, starts in groups:
            yield banded_linear(blocks, starts, weight, bias)

    def encoder(self, x: BlockInputs) -> tuple[Tensor, ...]:
        """The weight of the force encoding, if forces are an input."""
        return () if self.forces is None or x.forces is None else (self.forces.weight,)

    def gather(
        self,
        x: BlockInputs,
        distance: Tensor,
        source: Tensor,
        target: Tensor,
        *encoder: Tensor,
        norm: nn.Module | None = None,
        parameters: Sequence[Tensor] = (),
    ) -> Tensor:
        """Attributes of each edge, [E, H], from `terms` and `encoder`.

        Normed by `norm`, if there is one, with `parameters` in place of its own.
        """
        if self.fused and not encoder and not (self.training and self.dropout.p > 0):
            weight = None
            if isinstance(norm, RMSNorm):
                (weight,), norm = parameters or (norm.weight,), None
            total = gather_gelu(distance, source, target, x.index, weight)
        else:
            total = self._gather(x, distance, source, target, *encoder)
        return total if norm is None else norm(total, *parameters)

    def _gather(
        self, x: BlockInputs, distance: Tensor, source: Tensor, target: Tensor, *encoder: Tensor
    ) -> Tensor:
        total = distance.index_select(0, x.rbf.rows).add_(source.index_select(0, x.senders))
        total.add_(target.index_select(0, x.receivers))
        for weight in encoder:
            total = total + linear(x.forces, weight)
        return self.dropout(self.activation(total))
