"""Output heads: energy, direct forces, direct stress, and forces by differentiation.

Shapes: B structures, N atoms, E edges, H hidden. Values are in the model's normalised
units; fairchem's tasks scale them and add element references.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.common.utils import conditional_grad
from fairchem.core.models.base import HeadInterface
from torch import Tensor, nn

from escaip_fairchem.curvature import hessian
from escaip_fairchem.errors import UserError
from escaip_fairchem.layers import FeedForward, names_without_decay, norm_factory
from escaip_fairchem.neighbors import count_rows

if TYPE_CHECKING:
    from fairchem.core.datasets.atomic_data import AtomicData

    from escaip_fairchem.backbone import EScAIPBackbone
    from escaip_fairchem.config import EScAIPConfig


class OutputLayer(nn.Module):
    """Feed-forward and a linear map without bias, [..., H] -> [..., outputs]."""

    def __init__(self, config: EScAIPConfig, outputs: int, *, dropout: float) -> None:
        super().__init__()
        self.ffn = FeedForward(
            config.hidden_size,
            config.output_multiplier,
            activation=config.activation,
            dropout=dropout,
            recompute=config.recompute,
        )
        self.final = nn.Linear(config.hidden_size, outputs, bias=False)
        self.residual = config.layout == "paper"

    @torch.no_grad()
    def start_at_one(self) -> None:
        """Set the hidden bias so that a single output starts around 1.

        A product of two factors around 0 hardly has a gradient where both are small.
        """
        weight = self.final.weight[0]
        self.ffn.down.bias.copy_(weight / weight.square().sum())

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """See the class; of ``norm(x)`` if a norm is given."""
        if self.residual and norm is not None:
            x, norm = norm(x), None
        return self.final(self.ffn(x, norm, residual=x if self.residual else None))


class _Head(nn.Module, HeadInterface):
    """What the heads share: the configuration, norms, initialisation."""

    def __init__(self, backbone: EScAIPBackbone) -> None:
        super().__init__()
        self.config = backbone.config
        self.regress_config = backbone.regress_config  # shared: fairchem changes it
        self._norm = norm_factory(self.config.norm, self.config.hidden_size)

    def _scalar(self) -> OutputLayer:
        return OutputLayer(self.config, 1, dropout=self.config.scalar_output_dropout)

    def _head_norm(self) -> nn.Module:
        """The norm that preset ``v2`` puts before its heads; ``paper`` has none here."""
        return self._norm() if self.config.layout == "v2" else nn.Identity()

    def _initialize(self, gain: float = 1.0) -> None:
        """Xavier-uniform weights, zero biases, as in both reference codes."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=gain)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Parameters that the optimizer must not decay."""
        return names_without_decay(self)


class EnergyHead(_Head):
    """Energy as a sum (or mean) of atomic energies.

    Args:
        backbone: The `EScAIPBackbone` whose node features are read.
    """

    def __init__(self, backbone: EScAIPBackbone) -> None:
        super().__init__(backbone)
        self.node_norm = self._head_norm() if self.config.energy_head_norm else nn.Identity()
        self.energy = self._scalar()
        self._initialize(self.config.energy_head_gain)

    def forward(self, data: AtomicData, emb: dict[str, Any]) -> dict[str, Tensor]:
        """{"energy": [B]}; in evaluation float64 whatever the model's precision."""
        return {"energy": self.total_energy(emb)}

    def total_energy(self, emb: dict[str, Any]) -> Tensor:
        """Energy of each structure from the backbone's output, differentiable, [B]."""
        per_atom = self.atomic_energies(emb["node_features"])
        return _reduce(per_atom, emb, self.config.energy_reduce)

    def atomic_energies(self, node_features: Tensor) -> Tensor:
        """[N, H] -> [N]; in evaluation float64."""
        per_atom = self.energy(self.node_norm(node_features))[:, 0]
        # a sum over thousands of atoms in float32 rounds away what one of them changes
        return per_atom if self.training else per_atom.double()


class DirectForceHead(_Head):
    """Forces without differentiation: F_i = m_i sum_j w_ij * d_ij.

    m_i is a number per atom, w_ij three numbers per edge (one with ``force_weights:
    scalar``, which makes the forces exactly equivariant), d_ij the unit vector from the
    neighbour to the atom. With ``smooth`` the sum is weighted by the envelope.

    Args:
        backbone: The `EScAIPBackbone`, with ``direct_forces: true``.

    Raises:
        UserError: The backbone has no edge features.
    """

    def __init__(self, backbone: EScAIPBackbone) -> None:
        super().__init__(backbone)
        _need_edges(self)
        outputs = 3 if self.config.force_weights == "vector" else 1
        self.node_norm, self.edge_norm = self._head_norm(), self._head_norm()
        self.magnitude = self._scalar()
        self.direction = OutputLayer(
            self.config, outputs, dropout=self.config.vector_output_dropout
        )
        self._initialize()
        if self.config.init == "resolved":
            self.magnitude.start_at_one()

    def forward(self, data: AtomicData, emb: dict[str, Any]) -> dict[str, Tensor]:
        """{"forces": [N, 3]}."""
        graph, node = emb["graph"], emb["node_features"]
        edge = emb["edge_features"]
        rows = self.config.inference_chunk * graph.num_slots
        parts = edge.split(rows) if rows and not torch.is_grad_enabled() else [edge]
        weights = torch.cat([self.direction(part, self.edge_norm) for part in parts])
        terms = weights * graph.directions
        if self.config.smooth:
            terms = terms * graph.envelope[:, None]
        total = terms.new_zeros(len(node), 3).index_add(0, graph.receivers, terms)
        return {"forces": total * self.magnitude(self.node_norm(node))}


class DenoisingHead(DirectForceHead):
    """The noise on each atom, predicted like direct forces; for training only.

    In evaluation it computes nothing, unless the model is given forces to denoise with.

    Args:
        backbone: The `EScAIPBackbone`, with ``direct_forces`` and ``force_encoding: true``.

    Raises:
        UserError: The backbone has no edge features, or no force encoding.
    """

    def __init__(self, backbone: EScAIPBackbone) -> None:
        super().__init__(backbone)
        if not self.config.force_encoding:
            raise UserError("DenoisingHead needs a backbone with force_encoding: true")

    def forward(self, data: AtomicData, emb: dict[str, Any]) -> dict[str, Tensor]:
        """{"noise": [N, 3]}, in units of its standard deviation."""
        if not self.training and "encoded_forces" not in data:
            return {}
        return {"noise": super().forward(data, emb)["forces"]}


class DirectStressHead(_Head):
    """Stress without differentiation, from the rank-2 head of the authors' MPtrj model.

    The mean over neighbours of edge features times the five l = 2 components of the edge
    direction gives the anisotropic part, node features the isotropic one; both are means
    over atoms (ASK-Berkeley/EScAIP at cea229e, `EScAIPRank2Head`).

    Args:
        backbone: The `EScAIPBackbone`, with ``direct_stress: true``.

    Raises:
        UserError: The backbone has no edge features.
    """

    def __init__(self, backbone: EScAIPBackbone) -> None:
        super().__init__(backbone)
        _need_edges(self)
        self.node_norm, self.edge_norm = self._head_norm(), self._head_norm()
        self.isotropic, self.anisotropic = self._scalar(), self._scalar()
        self._initialize()

    def forward(self, data: AtomicData, emb: dict[str, Any]) -> dict[str, Tensor]:
        """{"stress": [B, 9]}, row-major symmetric 3 x 3."""
        graph, node = emb["graph"], emb["node_features"]
        basis = _traceless_basis(node)
        direction = graph.directions
        # component normalisation: the five numbers of a unit vector have squares summing to 5
        square = direction[:, None, :, None] * direction[:, None, None, :]
        second = 7.5**0.5 * (square * basis).sum((2, 3))
        edge = self.edge_norm(emb["edge_features"]) * graph.envelope[:, None]
        terms = second[:, :, None] * edge[:, None, :]
        total = terms.new_zeros(len(node), *terms.shape[1:]).index_add(0, graph.receivers, terms)
        weight = graph.envelope.new_zeros(len(node)).index_add(0, graph.receivers, graph.envelope)
        anisotropic = self.anisotropic(total / weight[:, None, None])[..., 0]
        isotropic = self.isotropic(self.node_norm(node))
        identity = torch.eye(3, dtype=node.dtype, device=node.device) / 3**0.5
        per_atom = torch.einsum("nm,mab->nab", anisotropic, basis) + isotropic[..., None] * identity
        return {"stress": _reduce(per_atom.flatten(1), emb, "mean")}


class ConservativeHead(EnergyHead):
    """Energy, and forces and stress as its derivatives.

    Args:
        backbone: The `EScAIPBackbone`, with ``direct_forces: false``.
        prefix: Put before the task names, as ``{prefix}_energy``; None for plain names.
            Several prefixes repeat the results under each name.

    Raises:
        UserError: The backbone is one for direct forces.
    """

    def __init__(self, backbone: EScAIPBackbone, prefix: str | list[str] | None = None) -> None:
        if backbone.config.direct_forces:
            raise UserError("ConservativeHead needs a backbone with direct_forces: false")
        super().__init__(backbone)
        prefixes = [prefix] if isinstance(prefix, str) else prefix
        self.prefixes = [f"{p}_" for p in prefixes] if prefixes else [""]

    @conditional_grad(torch.enable_grad())
    def forward(self, data: AtomicData, emb: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
        """{"energy": {"energy": [B]}, "forces": {"forces": [N, 3]}, "stress": {"stress": [B, 9]}}.

        Forces, stress and {"hessian": {"hessian": [1, 3 N, 3 N]}} are there if `regress_config`
        asks for them. Stress is dE/d(strain) over the volume, positive under tension as in ASE;
        a structure without periodic axes or without volume has none: zeros in training (where a
        mask hides it), NaN otherwise.

        Raises:
            UserError: A Hessian of several structures at once.
        """
        wanted = self.regress_config
        energy, *slopes = self._compiled_slopes(emb) or (self.total_energy(emb),)
        results = {"energy": energy}
        if wanted.forces:
            leaves = [emb["positions"]]
            if wanted.stress:
                leaves.append(emb["displacement"])
            # the graph is kept for another head on the same backbone
            gradients = torch.autograd.grad(
                slopes[0] if slopes else energy.sum(),
                leaves,
                slopes[1] if slopes else None,
                create_graph=self.training or wanted.hessian,
                retain_graph=True,
            )
            results["forces"] = -gradients[0]
            if wanted.stress:
                results["stress"] = self._stress(gradients[1], emb)
            if wanted.hessian:
                if emb["num_systems"] > 1:
                    raise UserError("a Hessian is computed for one structure at a time")
                results["hessian"] = hessian(gradients[0], emb["positions"])[None]
        if not self.training:
            results = {key: value.detach() for key, value in results.items()}
        return {f"{p}{key}": {key: results[key]} for p in self.prefixes for key in results}

    def _compiled_slopes(
        self, emb: dict[str, Any]
    ) -> tuple[Tensor, list[Tensor], tuple[Tensor, ...]] | None:
        """Energies [B], and outputs and cotangents whose gradient is that of their sum.

        None where nothing is compiled, or a second derivative is wanted.
        """
        wanted = self.regress_config
        if "derivatives" not in emb or wanted.hessian or not wanted.forces:
            return None
        index = emb["system_idx"]
        shares = torch.ones(len(index), device=index.device)
        if self.config.energy_reduce == "mean":
            shares = (1 / torch.bincount(index)).index_select(0, index)
        found = emb["derivatives"](self, shares=shares)
        if found is None:
            return None
        per_atom, outputs, slopes = found
        return _reduce(per_atom, emb, self.config.energy_reduce), outputs, slopes

    def _stress(self, virial: Tensor, emb: dict[str, Any]) -> Tensor:
        volume = torch.linalg.det(emb["cell"].detach()).abs()
        periodic = (emb["pbc"].any(1) & (volume > 1e-6))[:, None, None]
        missing = 0.0 if self.training else torch.nan
        stress = virial / torch.where(periodic, volume[:, None, None], 1.0)
        return torch.where(periodic, stress, missing).flatten(1)


def _need_edges(head: _Head) -> None:
    if not head.config.edge_outputs:
        raise UserError(
            f"{type(head).__name__} needs a backbone with direct_forces: true and "
            "regress_forces: true (or direct_stress: true)"
        )


def _reduce(per_atom: Tensor, emb: dict[str, Any], reduce: str) -> Tensor:
    """Sum or mean of [N, ...] over the atoms of each structure, [B, ...]."""
    index, size = emb["system_idx"], emb["num_systems"]
    total = per_atom.new_zeros(size, *per_atom.shape[1:]).index_add(0, index, per_atom)
    if reduce == "sum":
        return total
    counts = count_rows(index, size).to(total.dtype)
    return total / counts.view(-1, *[1] * (total.dim() - 1))


def _traceless_basis(like: Tensor) -> Tensor:
    """Orthonormal basis of the symmetric traceless 3 x 3 matrices, [5, 3, 3]."""
    basis = like.new_zeros(5, 3, 3)
    for index, (a, b) in enumerate([(0, 1), (1, 2), (0, 2)]):
        basis[index, a, b] = basis[index, b, a] = 0.5**0.5
    basis[3] = torch.diag(like.new_tensor([-1.0, -1.0, 2.0])) / 6**0.5
    basis[4] = torch.diag(like.new_tensor([1.0, -1.0, 0.0])) / 2**0.5
    return basis
