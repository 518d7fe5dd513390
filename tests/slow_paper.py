"""The NeurIPS 2024 model with loops over atoms, neighbours and heads, in float64.

Written from the formulas; it shares nothing with the package. Weights go by the names of the
authors' code (ASK-Berkeley/EScAIP at cea229e). A vector is a numpy array over channels.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from scipy.special import erf, sph_harm_y

EPS = float(np.finfo(np.float64).eps)
Vector = np.ndarray


@dataclass
class Neighbor:
    """Index of the neighbour, its distance, the unit vector from it to the atom."""

    index: int
    distance: float
    direction: tuple[float, float, float]


def neighborhoods(
    positions: Vector,
    cell: Vector,
    pbc: tuple[bool, bool, bool],
    cutoff: float,
    max_neighbors: int,
    lone_direction: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> list[list[Neighbor]]:
    """The nearest neighbours of each atom among all images; an atom without any has itself."""
    points = [tuple(p) for p in positions.tolist()]
    extent = max(math.dist(a, b) for a in points for b in points)
    shifts = lattice_shifts(cell, pbc, cutoff + extent)
    found = []
    for i, (xi, yi, zi) in enumerate(points):
        near = []
        for j, (xj, yj, zj) in enumerate(points):
            for sx, sy, sz in shifts:
                vector = (xi - xj - sx, yi - yj - sy, zi - zj - sz)
                distance = math.hypot(*vector)
                if 0 < distance <= cutoff:
                    near.append(Neighbor(j, distance, tuple(x / distance for x in vector)))
        near.sort(key=lambda neighbor: neighbor.distance)
        found.append(near[:max_neighbors] or [Neighbor(i, math.inf, lone_direction)])
    return found


def lattice_shifts(cell: Vector, pbc: tuple[bool, bool, bool], reach: float) -> list[tuple]:
    """All lattice vectors that can bring two atoms within `reach`, and more."""
    axes = [cell[axis] for axis in range(3) if pbc[axis]]
    if not axes:
        return [(0.0, 0.0, 0.0)]
    # the columns of the pseudo-inverse have the lengths of the inverse heights
    heights = np.linalg.pinv(np.array(axes)).T
    counts = [math.ceil(reach * np.linalg.norm(height)) for height in heights]
    ranges = [range(-n, n + 1) for n in counts]
    return [
        tuple(sum(n * axis for n, axis in zip(numbers, axes, strict=True)).tolist())
        for numbers in itertools.product(*ranges)
    ]


def bond_order(neighbors: list[Neighbor], lmax: int = 9) -> Vector:
    """sqrt(2l + 1) Q_l through complex spherical harmonics; zeros without a neighbour."""
    orders = np.zeros(lmax + 1)
    if math.isinf(neighbors[0].distance):
        return orders
    directions = [neighbor.direction for neighbor in neighbors]
    polar = [math.atan2(math.hypot(x, y), z) for x, y, z in directions]
    azimuth = [math.atan2(y, x) for x, y, _ in directions]
    for degree in range(lmax + 1):
        total = 0.0
        for m in range(-degree, degree + 1):
            total += abs(np.mean(sph_harm_y(degree, m, polar, azimuth))) ** 2
        steinhardt = math.sqrt(4 * math.pi / (2 * degree + 1) * total)
        orders[degree] = math.sqrt(2 * degree + 1) * steinhardt
    return orders


def radial_basis(distance: float, cutoff: float, size: int) -> Vector:
    """Gaussians on [0, cutoff], twice their spacing wide."""
    spacing = cutoff / (size - 1)
    return np.array(
        [math.exp(-0.5 * ((distance - n * spacing) / (2 * spacing)) ** 2) for n in range(size)]
    )


def gelu(x: Vector) -> Vector:
    """x times the normal distribution function."""
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def mean_over_slots(slots: list[Vector]) -> Vector:
    """Mean, with the published 1e-5 in the count."""
    return sum(slots) / (len(slots) + 1e-5)


@dataclass
class Inputs:
    """Elements and geometry of one structure: what every block reads."""

    numbers: list[int]
    neighbors: list[list[Neighbor]]
    rbf: list[list[Vector]]
    boo: list[Vector]


class SlowPaper:
    """Energy and forces of the model whose weights are given, and every stage on the way."""

    def __init__(
        self, weights: dict, *, layers: int, heads: int, cutoff: float, max_neighbors: int
    ) -> None:
        self.w = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
        self.layers, self.heads = layers, heads
        self.cutoff, self.max_neighbors = cutoff, max_neighbors

    def __call__(self, numbers, positions, cell, pbc, lone_direction=(0.0, 0.0, 0.0)) -> dict:
        """Results and stages of one structure."""
        neighbors = neighborhoods(
            positions, cell, pbc, self.cutoff, self.max_neighbors, lone_direction
        )
        size = self.w["backbone/input_block.input_layer.edge_distance_embedding.0.weight"].shape[1]
        x = Inputs(
            numbers=numbers.tolist(),
            neighbors=neighbors,
            rbf=[[radial_basis(n.distance, self.cutoff, size) for n in near] for near in neighbors],
            boo=[bond_order(near) for near in neighbors],
        )
        node, edge = self.input_block(x)
        stages = [node]
        node_readouts, edge_readouts = self.readout(0, node, edge)
        for layer in range(self.layers):
            node, edge = self.transformer_block(layer, node, edge, x)
            stages.append(node)
            more_nodes, more_edges = self.readout(layer + 1, node, edge)
            for i in range(len(node)):
                node_readouts[i] = np.concatenate([node_readouts[i], more_nodes[i]])
                for slot, more in enumerate(more_edges[i]):
                    edge_readouts[i][slot] = np.concatenate([edge_readouts[i][slot], more])
        node = [self.projection("node", r) for r in node_readouts]
        edge = [[self.projection("edge", r) for r in around] for around in edge_readouts]
        energy = sum(self.output("energy_head/energy_layer", h)[0] for h in node)
        forces = [self.force(node[i], edge[i], neighbors[i]) for i in range(len(node))]
        return {
            "energy": energy,
            "forces": np.array(forces),
            "neighbors": neighbors,
            "boo": np.array(x.boo),
            "stages": np.array(stages),
        }

    def linear(self, name: str, x: Vector) -> Vector:
        return self.w[f"{name}.weight"] @ x + self.w[f"{name}.bias"]

    def norm(self, name: str, x: Vector) -> Vector:
        return self.w[f"{name}.weight"] * x / math.sqrt(sum(x * x) / len(x) + EPS)

    def ffn(self, name: str, x: Vector) -> Vector:
        return self.linear(f"{name}.1.0", gelu(self.linear(f"{name}.0.0", x)))

    def attributes(self, name: str, i: int, slot: int, x: Inputs) -> Vector:
        """Attributes of the edge from a neighbour to atom i."""
        j = x.neighbors[i][slot].index
        parts = [
            gelu(self.linear(f"{name}.edge_distance_embedding.0", x.rbf[i][slot])),
            gelu(self.linear(f"{name}.source_direction_embedding.0", x.boo[j])),
            self.w[f"{name}.source_atomic_embedding.weight"][x.numbers[j]],
            gelu(self.linear(f"{name}.target_direction_embedding.0", x.boo[i])),
            self.w[f"{name}.target_atomic_embedding.weight"][x.numbers[i]],
        ]
        return gelu(self.linear(f"{name}.edge_linear.0", np.concatenate(parts)))

    def input_block(self, x: Inputs):
        name = "backbone/input_block"
        nodes, edges = [], []
        for i, around in enumerate(x.neighbors):
            hidden = []
            for slot in range(len(around)):
                attributes = self.attributes(f"{name}.input_layer", i, slot, x)
                normed = self.norm(f"{name}.input_layer.norm", attributes)
                hidden.append(attributes + self.ffn(f"{name}.input_layer.edge_ffn", normed))
            nodes.append(self.norm(f"{name}.norm.node_norm", mean_over_slots(hidden)))
            edges.append([self.norm(f"{name}.norm.edge_norm", h) for h in hidden])
        return nodes, edges

    def transformer_block(self, layer: int, node: list, edge: list, x: Inputs):
        name = f"backbone/transformer_blocks.{layer}"
        normed = [self.norm(f"{name}.norm_attn", h) for h in node]
        nodes, edges = [], []
        for i, around in enumerate(x.neighbors):
            messages = [
                self.message(f"{name}.graph_attention", i, slot, normed, x)
                for slot in range(len(around))
            ]
            attended = self.attention(f"{name}.graph_attention", messages, around)
            h = node[i] + mean_over_slots(attended)
            nodes.append(h + self.node_or_edge_ffn(name, "node", h))
            hidden = [old + new for old, new in zip(edge[i], attended, strict=True)]
            edges.append([h + self.node_or_edge_ffn(name, "edge", h) for h in hidden])
        return nodes, edges

    def node_or_edge_ffn(self, name: str, kind: str, h: Vector) -> Vector:
        normed = self.norm(f"{name}.norm_ffn.{kind}_norm", h)
        return self.ffn(f"{name}.feedforward.mlp_{kind}", normed)

    def message(self, name: str, i: int, slot: int, node: list, x: Inputs) -> Vector:
        attributes = self.attributes(name, i, slot, x)
        ends = np.concatenate([node[x.neighbors[i][slot].index], node[i]])
        pair = gelu(self.linear(f"{name}.node_linear.0", ends))
        return gelu(self.linear(f"{name}.message_linear.0", np.concatenate([attributes, pair])))

    def attention(self, name: str, messages: list, around: list[Neighbor]) -> list[Vector]:
        """Self-attention among the messages of one atom."""
        module = f"{name}.multi_head_attention"
        weight, bias = self.w[f"{module}.in_proj_weight"], self.w[f"{module}.in_proj_bias"]
        size = len(messages[0])
        width = size // self.heads
        projected = [weight @ message + bias for message in messages]
        scalar = float(self.w[f"{name}.attn_scalar"])
        slots = range(len(around))
        cosines = [[np.dot(a.direction, b.direction) for b in around] for a in around]
        attended = [[] for _ in slots]
        for head in range(self.heads):
            own = slice(head * width, (head + 1) * width)
            queries = [p[:size][own] for p in projected]
            keys = [p[size : 2 * size][own] for p in projected]
            values = [p[2 * size :][own] for p in projected]
            for a in slots:
                logits = [
                    queries[a] @ keys[b] / math.sqrt(width) + cosines[a][b] * scalar for b in slots
                ]
                largest = max(logits)
                shares = [math.exp(logit - largest) for logit in logits]
                total = sum(shares)
                attended[a].append(sum(shares[b] / total * values[b] for b in slots))
        return [self.linear(f"{module}.out_proj", np.concatenate(parts)) for parts in attended]

    def readout(self, index: int, node: list, edge: list):
        name = f"backbone/readout_layers.{index}"

        def one(kind: str, h: Vector) -> Vector:
            return h + self.ffn(f"{name}.{kind}_ffn", self.norm(f"{name}.{kind}_norm", h))

        return [one("energy", h) for h in node], [[one("force", h) for h in e] for e in edge]

    def projection(self, kind: str, readouts: Vector) -> Vector:
        name = "backbone/output_projection"
        normed = self.norm(f"{name}.readout_norm.{kind}_norm", readouts)
        projected = gelu(self.linear(f"{name}.{kind}_projection.0", normed))
        return self.norm(f"{name}.output_norm.{kind}_norm", projected)

    def output(self, name: str, h: Vector) -> Vector:
        return self.w[f"{name}.final_output.0.weight"] @ (h + self.ffn(f"{name}.ffn", h))

    def force(self, node: Vector, edge: list, around: list[Neighbor]) -> Vector:
        total = np.zeros(3)
        for h, neighbor in zip(edge, around, strict=True):
            weights = self.output("force_head/force_direction_layer", h)
            total += weights * np.array(neighbor.direction)
        return self.output("force_head/force_magnitude_layer", node)[0] * total
