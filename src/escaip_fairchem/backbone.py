"""The EScAIP backbone: structures -> graph -> features -> blocks -> readouts. Start here."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.common.utils import conditional_grad
from fairchem.core.models.base import BackboneInterface
from fairchem.core.models.uma.escn_md import GradRegressConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from escaip_fairchem.block_inputs import BlockInputs
from escaip_fairchem.blocks import InputBlock, Readout, TransformerBlock
from escaip_fairchem.compiled import Compiled
from escaip_fairchem.config import EScAIPConfig
from escaip_fairchem.edge_attributes import EdgeAttributes
from escaip_fairchem.errors import UserError
from escaip_fairchem.features import RadialBasis, bond_orientational_order, force_projections
from escaip_fairchem.graph import FAR, NeighborGraph, build_graph
from escaip_fairchem.kernels import (
    AttentionGeometry,
    SortedLengths,
    fused_edges,
    fuses_graph,
    order_by,
    reads_angles,
    recomputed_tree,
)
from escaip_fairchem.layers import names_without_decay, norm_factory
from escaip_fairchem.neighbors import Structures, times_matrix
from escaip_fairchem.shapes import Edges

if TYPE_CHECKING:
    from collections.abc import Callable

    from ase import Atoms
    from fairchem.core.datasets.atomic_data import AtomicData

_NO_ATOMS = "a structure of the batch has no atoms; remove it"


class Output(dict):
    """What the backbone says of a batch; features that are not there are computed when read.

    Attributes:
        encode: Computes node and edge features.
    """

    encode: Callable[[], tuple[Tensor, Tensor | None]]

    def __missing__(self, key: str) -> Tensor | None:
        """Compute features that nothing has asked for yet."""
        if key not in ("node_features", "edge_features"):
            raise KeyError(key)
        self.add(self.encode())
        return self[key]

    def add(self, features: tuple[Tensor, Tensor | None]) -> None:
        """Put in node and edge features."""
        self["node_features"], self["edge_features"] = features


class EScAIPBackbone(nn.Module, BackboneInterface):
    """Efficiently scaled attention over each atom's neighbours (arXiv 2410.24169).

    Args:
        **kwargs: The keys of `EScAIPConfig`, or those of fairchem's built-in EScAIP.

    Raises:
        UserError: An unknown key or a bad value.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        config = self.config = EScAIPConfig.from_kwargs(**kwargs)
        # fairchem reads and changes this object: read it in forward, never copy it
        self.regress_config = GradRegressConfig(
            direct_forces=config.direct_forces,
            direct_stress=config.direct_stress,
            forces=config.regress_forces,
            stress=config.regress_stress,
        )
        self.fused_edges = fused_edges(config.activation)
        self.fused_graph = fuses_graph()
        norm = norm_factory(config.norm, config.hidden_size)
        carries_edges = config.message == "pair_and_edge"
        self.input_block = InputBlock(config, norm, edge_used=carries_edges or config.edge_outputs)
        last = config.num_layers - 1
        self.blocks = nn.ModuleList(
            TransformerBlock(
                config, norm, edge_used=config.edge_outputs or (carries_edges and index < last)
            )
            for index in range(config.num_layers)
        )
        self.node_readout = Readout(config, norm)
        self.edge_readout = Readout(config, norm) if config.edge_outputs else None
        self._initialize()
        slots = config.max_neighbors + 1 if config.cuda_graphs else None
        self.compiled = Compiled(slots=slots) if config.compile else None

    @conditional_grad(torch.enable_grad())
    def forward(self, data: AtomicData) -> dict[str, Any]:
        """Features of a batch.

        Args:
            data: fairchem's batch; reads pos, cell, pbc, atomic_numbers, batch, natoms; sets
                `batch_full` and `atomic_numbers_full`, which element references read. With
                `force_encoding` also encoded_forces, if there are any: forces that are given as an
                input, in any unit, [N, 3].

        Returns:
            node_features [N, H], edge_features [E, H] or None, graph (`NeighborGraph`),
            system_idx [N], num_systems, cell [B, 3, 3], pbc [B, 3], and what a conservative
            head differentiates by: positions [N, 3], displacement [B, 3, 3] or None. Of a
            compiled conservative model also derivatives, see `Compiled.derivatives`; there the
            features are computed, without compilation, if something reads them.

        Raises:
            UserError: No atoms, positions that are not finite, elements out of range,
                coinciding atoms.
        """
        data["atomic_numbers"] = data["atomic_numbers"].long()
        data["atomic_numbers_full"], data["batch_full"] = data["atomic_numbers"], data["batch"]
        self._refuse_bad_input(data)
        # geometry in bf16 would be wrong by tenths of an Angstrom, so autocast stops here
        device = data["pos"].device.type
        with torch.autocast(device, enabled=False):
            structures, leaves = self._strained(data)
            graph = build_graph(structures, self.config, fused=self.fused_graph)
        encoded = self.config.force_encoding and "encoded_forces" in data
        edges = Edges(
            graph,
            species=data["atomic_numbers"],
            system_idx=structures.system_idx,
            forces=data["encoded_forces"] if encoded else None,
            autocast=torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device)
            else None,
        )
        output = Output(
            graph=graph,
            system_idx=structures.system_idx,
            num_systems=len(structures.natoms),
            cell=structures.cell,
            pbc=structures.pbc,
            **leaves,
        )
        if self.compiled is not None and self._differentiated:
            output.encode = partial(self.encode, edges)
            output["derivatives"] = partial(self.compiled.derivatives, self, edges=edges)
        else:
            output.add(self._compiled_features(edges) or self.encode(edges))
        return output

    @property
    def _differentiated(self) -> bool:
        """Whether forces are derivatives of the energy."""
        return self.regress_config.forces and not self.regress_config.direct_forces

    def _compiled_features(self, edges: Edges) -> tuple[Tensor, Tensor | None] | None:
        """`encode` by the compiled function; None where there is none."""
        chunk = self.config.inference_chunk
        chunked = 0 < chunk < len(edges.species) and not torch.is_grad_enabled()
        if self.compiled is None or chunked:
            return None
        return self.compiled.features(self, edges)

    def encode(self, edges: Edges) -> tuple[Tensor, Tensor | None]:
        """Everything after the graph: node features [N, H], edge features [E, H] or None."""
        graph, device = edges.graph, edges.species.device.type
        # see `forward`
        with torch.autocast(device, enabled=False):
            inputs = self._features(graph, edges.species, edges.system_idx)
            if edges.forces is not None:
                inputs.forces = force_projections(
                    edges.forces, graph.directions, graph.receivers, graph.senders
                )
        with torch.autocast(device, dtype=edges.autocast, enabled=edges.autocast is not None):
            return self._encode(inputs)

    def _strained(self, data: AtomicData) -> tuple[Structures, dict[str, Tensor]]:
        """The batch with a symmetric strain of zero, if a gradient with respect to it is due."""
        regress = self.regress_config
        positions, cell = data["pos"], data["cell"]
        pbc = torch.atleast_2d(data["pbc"]).bool()
        displacement = None
        leaf = positions
        if self._differentiated:
            if not positions.requires_grad:
                leaf = positions = positions.detach().requires_grad_(True)
            if regress.stress:
                displacement = torch.zeros_like(cell, requires_grad=True)
                symmetric = 0.5 * (displacement + displacement.transpose(1, 2))
                per_atom = symmetric[data["batch"]]
                positions = positions + times_matrix(positions, per_atom)
                cell = cell + (cell[..., None] * symmetric[:, None]).sum(2)
        structures = Structures(positions, cell, pbc, data["natoms"], data["batch"])
        return structures, {"positions": leaf, "displacement": displacement}

    def _features(self, graph: NeighborGraph, species: Tensor, system_idx: Tensor) -> BlockInputs:
        """Geometric features and attention geometry, in the precision of the positions."""
        config = self.config
        boo = bond_orientational_order(
            graph.directions,
            graph.receivers,
            graph.envelope if config.smooth else graph.exists,
            len(species),
            lmax=config.boo_lmax,
            scale=config.boo_scale,
            smooth=config.smooth,
        )
        # the row for self edges; in `paper` it stands for "no neighbour": a basis of zeros
        lengths = graph.pair_lengths
        if config.graph == "knn":
            lengths = torch.cat([lengths[:-1], lengths.new_full((1,), FAR)])
        basis, orders = SortedLengths if self.fused_edges else RadialBasis, ()
        rbf = basis.build(lengths, graph.pairs, config.cutoff, config.rbf_size, config.rbf_width)
        if self.fused_edges and torch.is_grad_enabled():
            orders = *order_by(rbf.rows, len(lengths)), *order_by(graph.senders, len(species))
        attention = AttentionGeometry.build(
            graph.directions,
            graph.log_envelope,
            graph.counts,
            graph.slots,
            graph.num_slots,
            angular=config.angular if reads_angles(self.blocks[0].attention.attend) else "none",
            lmax=len(config.frequency_list) - 1,
        )
        return BlockInputs(
            species=species,
            boo=boo,
            rbf=rbf,
            senders=graph.senders,
            receivers=graph.receivers,
            starts=graph.starts,
            counts=graph.counts,
            system_idx=system_idx,
            attention=attention,
            orders=orders,
        )

    def _encode(self, x: BlockInputs) -> tuple[Tensor, Tensor | None]:
        """Blocks and readouts: node features [N, H], edge features [E, H] or None."""
        size, recorded = self.config.inference_chunk, torch.is_grad_enabled()
        whole = recorded or not size or torch.compiler.is_compiling()
        chunks = [x] if whole else x.chunks(size)
        prepared = self.input_block.prepare(x)
        states = [
            self._read_out(0, *self.input_block(prepared, chunk), None, None) for chunk in chunks
        ]
        for index, block in enumerate(self.blocks, start=1):
            if self.config.checkpointing == "block" and recorded:
                states = [self._checkpointed(index, block, states[0], x)]
            else:
                self._layers(index, block, states, x, chunks)
        nodes, edges = [], []
        while states:
            _, _, node_total, edge_total = states.pop(0)
            nodes.append(self.node_readout.finish(node_total))
            if self.edge_readout is not None:
                edges.append(self.edge_readout.finish(edge_total))
        return torch.cat(nodes), torch.cat(edges) if edges else None

    def _checkpointed(self, index: int, block: TransformerBlock, state, x: BlockInputs):
        """One block and its readouts, of which only the inputs are kept."""

        def layer(arguments):
            state, x = arguments
            states = [state]
            self._layers(index, block, states, x, [x])
            return states[0]

        if self.config.direct_forces or (self.training and self.config.is_random):
            return checkpoint(layer, (state, x), use_reentrant=False)
        # a derivative that is differentiated again, which torch's form would keep whole
        readouts = [self.node_readout, self.edge_readout or nn.Identity()]
        parameters = itertools.chain(*(part.parameters() for part in (block, *readouts)))
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        return recomputed_tree(layer, (state, x), *trained)

    def _layers(self, index: int, block: TransformerBlock, states: list, x: BlockInputs, chunks):
        """One block and its readouts, for the chunks in turn; only nodes see all of the batch."""
        nodes = [state[0] for state in states]
        prepared = block.prepare(nodes[0] if len(nodes) == 1 else torch.cat(nodes), x)
        for i, chunk in enumerate(chunks):
            node, edge, *totals = states[i]
            states[i] = self._read_out(index, *block(prepared, node, edge, chunk), *totals)

    def _read_out(self, index: int, node, edge, node_total, edge_total):
        """Node and edge features and the running projections, with readout `index` added."""
        node_total = self.node_readout.add(node_total, index, node)
        if self.edge_readout is not None:
            edge_total = self.edge_readout.add(edge_total, index, edge)
        return node, edge, node_total, edge_total

    def _initialize(self) -> None:
        """``paper``: Xavier-uniform; ``v2``: torch's defaults; biases zero in both; then `init`."""
        for module in self.modules():
            if not isinstance(module, nn.Linear):
                continue
            if self.config.layout == "paper":
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.config.init == "resolved":
            for module in self.modules():
                if isinstance(module, EdgeAttributes):
                    module.resolve()

    def _refuse_bad_input(self, data: AtomicData) -> None:
        numbers, limit = data["atomic_numbers"], self.config.max_num_elements
        if len(numbers) == 0:
            raise UserError(_NO_ATOMS)
        unknown = (numbers >= limit) | (numbers < 0)
        finite = torch.isfinite(data["pos"]).all() & torch.isfinite(data["cell"]).all()
        # read together: each read makes the host wait for a GPU
        wrong = torch.stack([data["natoms"].min() == 0, ~finite, unknown.any()])
        no_atoms, not_finite, out_of_range = wrong.tolist()
        if no_atoms:
            raise UserError(_NO_ATOMS)
        if not_finite:
            raise UserError("positions or cell of the batch are not finite (NaN or inf)")
        if out_of_range:
            raise UserError(
                f"atomic number {int(numbers[unknown][0])} is outside of the model's range "
                f"0..{limit - 1}; set max_num_elements when training"
            )

    def no_weight_decay(self) -> set[str]:
        """Parameters that the optimizer must not decay: norms, embeddings, biases, scalars."""
        return names_without_decay(self)

    # fairchem's inference interface

    @classmethod
    def build_inference_settings(cls, settings: Any) -> dict[str, Any]:
        """No overrides; switches off fairchem's `torch.compile`, minutes long on first use.

        The model has a key `compile` of its own. `hessian_vmap` is not read: Hessians are computed
        row by row.
        """
        settings.compile = False
        return {}

    def get_default_untrained_tasks(self, checkpoint_tasks: dict, inference_settings: Any) -> list:
        """None: properties that were not trained are added on request only."""
        return []

    def validate_tasks(self, dataset_to_tasks: dict[str, list]) -> None:
        """Every dataset name is accepted."""

    def prepare_for_inference(self, data: AtomicData, settings: Any) -> EScAIPBackbone:
        """Nothing to prepare."""
        return self

    def on_predict_check(self, data: AtomicData) -> None:
        """Nothing beyond the checks of `forward`."""

    def validate_atoms_data(self, atoms: Atoms, task_name: str) -> None:
        """Charge and spin are not read; set fairchem's defaults so that nothing is missing."""
        atoms.info.setdefault("charge", 0)
        atoms.info.setdefault("spin", 0)
