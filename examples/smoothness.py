"""Measure the jumps of energy, forces and curvature where a neighbour comes or goes.

python examples/smoothness.py

One atom of a dimer, a slab and a crystal moves along a line. Events are found from distances alone,
by NumPy and the published formulas: a neighbour enters or leaves, a distance passes a radius, two
neighbours change ranks, a step of the rank function starts or ends. At each the model is
evaluated a little before and after, and the difference extrapolated to no step at all: 0 for
what is continuous. Models are random, as initialised.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, fcc111
from ase.neighborlist import neighbor_list
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from scipy.optimize import brentq

from escaip_fairchem import EScAIP, hessian_vector_product

if TYPE_CHECKING:
    from collections.abc import Callable

    from escaip_fairchem import EScAIPConfig

#: What a neighbour beyond all others has as distance, Angstrom.
FAR = 1e3


@dataclass
class Path:
    """An atom (the last) that moves from where it is along a vector.

    Attributes:
        atoms: Where the path starts.
        step: Unit vector.
        length: Angstrom.
    """

    atoms: Atoms
    step: np.ndarray
    length: float

    def at(self, t: float) -> Atoms:
        """The structure after `t` Angstrom."""
        moved = self.atoms.copy()
        moved.positions[-1] += t * self.step
        return moved


def paths() -> dict[str, Path]:
    """A dimer through 6 A, oxygen that leaves a copper slab, an atom in a rattled crystal."""
    slab = fcc111("Cu", (2, 2, 2), vacuum=9.0, periodic=True)
    slab.rattle(0.1, seed=3)
    slab += Atoms("O", [slab.positions[-1] + [0.3, 0.2, 3.6]])
    crystal = bulk("Cu", cubic=True)
    crystal.rattle(0.15, seed=4)
    crystal.set_cell(crystal.cell.array + [[0, 0, 0], [0.4, 0, 0], [0.2, 0.3, 0]])
    skew = np.array([0.6, 0.48, 0.64])
    return {
        "dimer": Path(Atoms("CuO", [[0, 0, 0], [0, 0.3, 5.6]]), np.array([0, 0, 1.0]), 1.2),
        "slab": Path(slab, np.array([0, 0, 1.0]), 2.5),
        "crystal": Path(crystal, skew, 0.4),
    }


class Neighbors:
    """Distances of every atom to all that ever matter along a path, as functions of `t`."""

    def __init__(self, path: Path, config: EScAIPConfig) -> None:
        self.path, self.config = path, config
        self.k = config.max_neighbors
        self.reach = config.cutoff + (np.pi * config.rank_scale if config.graph != "knn" else 0)
        # images move along with the atom, so a distance changes by the path's length at most
        atoms, radius = path.atoms, self.reach + path.length + 0.1
        i, j, shifts = neighbor_list("ijS", atoms, radius)
        counts = np.bincount(i, minlength=len(atoms))
        slot = np.arange(len(i)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.place, self.shape = (i, slot), (len(atoms), counts.max())
        self.senders = np.zeros(self.shape, int)
        self.senders[self.place] = j
        self.vectors = atoms.positions[i] - atoms.positions[j] - shifts @ atoms.cell.array
        last = len(atoms) - 1
        self.moves = ((i == last).astype(float) - (j == last))[:, None] * path.step

    def distances(self, t: float) -> np.ndarray:
        """[N, C], FAR where an atom has fewer than C neighbours."""
        distances = np.full(self.shape, FAR)
        distances[self.place] = np.linalg.norm(self.vectors + t * self.moves, axis=1)
        return distances

    def beyond(self, distances: np.ndarray) -> np.ndarray:
        """Below 0 for what is a neighbour, continuous where it stops to be one, [N, C]."""
        if self.config.graph == "knn":
            return np.maximum(self.passed(distances, self.k), distances - self.config.cutoff)
        own = self.rank(distances, distances)
        rows = distances[self.senders]  # of each neighbour, [N, C, C]
        theirs = self.rank(distances[..., None], rows)[..., 0]
        scale = self.config.envelope_scale
        terms = np.stack([own / self.k, theirs / self.k, distances / self.config.cutoff])
        return scale * np.logaddexp.reduce(terms / scale, axis=0) - 1

    def passed(self, distances: np.ndarray, count: int) -> np.ndarray:
        """Below 0 for the nearest `count` of each atom, [N, C]."""
        if distances.shape[1] <= count:
            return np.full(distances.shape, -1.0)
        ordered = np.sort(distances, axis=1)
        return distances - ordered[:, count - 1 : count + 1].mean(1, keepdims=True)

    def rank(self, lengths: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """How many of `rows` [..., C] and the atom itself lie below `lengths` [..., M]."""
        kept = rows <= self.reach
        if not self.config.smooth:
            listed = self.passed(rows.reshape(-1, rows.shape[-1]), self.k + 19) < 0
            kept &= listed.reshape(kept.shape)
        rows = np.concatenate([np.where(kept, rows, FAR), np.zeros((*rows.shape[:-1], 1))], -1)
        x = (lengths[..., :, None] - rows[..., None, :]) / self.config.rank_scale
        x = np.clip(x, -np.pi, np.pi)
        if not self.config.smooth:
            return (0.5 + 0.5 * np.sin(x / 2)).sum(-1)
        t = x / (2 * np.pi) + 0.5  # the polynomial step whose first three derivatives end at 0
        return (t**4 * (35 - 84 * t + 70 * t**2 - 20 * t**3)).sum(-1)

    def indicators(self) -> dict[str, Callable[[float], np.ndarray]]:
        """Functions of `t` whose changes of sign are events, by the kind of event."""

        def differences(t: float) -> np.ndarray:
            d = self.distances(t)
            near = np.where(self.beyond(d) < 0, d, np.nan)
            return near[:, :, None] - d[:, None, :]

        found = {"neighbour": lambda t: self.beyond(self.distances(t))}
        if self.config.graph == "soft_knn":
            found["cutoff"] = lambda t: self.distances(t) - self.config.cutoff
            found["reach"] = lambda t: self.distances(t) - self.reach
            found["ranks"] = differences
            width = np.pi * self.config.rank_scale
            found["step"] = lambda t: np.abs(differences(t)) - width
            if not self.config.smooth:
                found["list"] = lambda t: self.passed(self.distances(t), self.k + 19)
        return found


def events(path: Path, config: EScAIPConfig, *, most: int = 6, grid: int = 40) -> dict[str, list]:
    """Where along a path something is no longer as before.

    Args:
        path: The path.
        config: Of the model.
        most: Events of a kind; of more, evenly chosen ones.
        grid: Intervals in which a change of sign is looked for.

    Returns:
        Ascending positions along the path, Angstrom, for each kind of event.
    """
    points = np.linspace(0, path.length, grid + 1)
    found = {}
    for kind, function in Neighbors(path, config).indicators().items():
        before, changes = function(points[0]), []
        for low, high in pairwise(points):
            after = function(high)
            with np.errstate(invalid="ignore"):
                entries = zip(*np.nonzero(before * after < 0), strict=True)
            changes.extend((low, high, entry) for entry in entries)
            before = after
        chosen = np.unique(np.linspace(0, len(changes) - 1, min(most, len(changes))).astype(int))
        times = []
        for low, high, entry in (changes[index] for index in chosen):
            t = _crossing(lambda t, f=function, e=entry: f(t)[e], low, high)
            times += [t] if t is not None else []
        found[kind] = sorted(times)
    return found


def _crossing(function: Callable[[float], float], low: float, high: float) -> float | None:
    values = [function(t) for t in (low, high)]
    if not np.isfinite(values).all() or values[0] * values[1] >= 0:
        return None
    try:
        return brentq(function, low, high, xtol=1e-10)
    except ValueError:  # it stopped being a neighbour on the way
        return None


def evaluate(model: EScAIP, structures: list[Atoms]) -> dict[str, np.ndarray]:
    """Energy, forces and a fixed Hessian-vector product of each, [B, 1 or 3 N]; float64."""
    items = []
    for atoms in structures:
        item = AtomicData.from_ase(atoms, task_name="oc20", target_dtype=torch.float64)
        item.pos = torch.tensor(atoms.positions)
        items.append(item)
    batch, count = atomicdata_list_to_batch(items), len(structures)
    outputs = model(batch.clone())
    values = {key: outputs[key][key].detach().view(count, -1) for key in ("energy", "forces")}
    if not model.backbone.config.direct_forces:
        vector = torch.randn(len(structures[0]), 3, generator=torch.Generator().manual_seed(1))
        product = hessian_vector_product(model, batch, vector.repeat(count, 1))
        values["curvature"] = product.view(count, -1)
    return {key: value.numpy() for key, value in values.items()}


def jumps(model: EScAIP, path: Path, times: list[float], step: float = 1e-5) -> dict[str, Any]:
    """Differences across events, and what is left of them at no distance.

    Args:
        model: In float64 and evaluation mode.
        path: The path.
        times: Positions of the events along it.
        step: Distance from the event, Angstrom; a tenth of it is taken too.

    Returns:
        For ``energy``, ``forces`` and (of a conservative model) ``curvature``: ``far`` and
        ``near``, the largest differences at the two steps, and ``jump``, extrapolated to none,
        each for every event; ``scale``, the largest value on the way and where the path starts
        (of the energy: the largest force x 1 A).
    """
    offsets = (-step, step, -step / 10, step / 10)
    structures = [path.at(t + offset) for t in times for offset in offsets]
    values = evaluate(model, [*structures, path.atoms])
    found = {}
    for key, value in values.items():
        around = value[:-1].reshape(len(times), 4, -1)
        far, near = around[:, 1] - around[:, 0], around[:, 3] - around[:, 2]
        left = (10 * near - far) / 9  # of a smooth function both are proportional to the step
        sizes = {"far": far, "near": near, "jump": left}
        found[key] = {name: np.abs(size).max(1) for name, size in sizes.items()}
        found[key]["scale"] = np.abs(values["forces" if key == "energy" else key]).max()
    return found


def random_model(**backbone: Any) -> EScAIP:
    """A conservative model as initialised, small but for its neighbourhoods and basis."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "direct_forces": False}
    return (
        EScAIP(
            backbone={"model": "escaip_fairchem.EScAIPBackbone", **size, **backbone},
            heads={"efs": {"module": "escaip_fairchem.ConservativeHead"}},
        )
        .double()
        .eval()
    )


def main() -> None:
    """Print the largest jump at any event, in model units and over the largest force."""
    print(f"{'model':<18}{'path':<9}{'events':>6}  largest jump, and over the scale of its kind")
    choices = {
        "paper": {"preset": "paper"},
        "v2 smooth: false": {"preset": "v2"},
        "v2 smooth: true": {"preset": "v2", "smooth": True},
    }
    for name, choice in choices.items():
        model = random_model(**choice)
        for place, path in paths().items():
            times = list(chain(*events(path, model.backbone.config).values()))
            if not times:
                continue
            found = jumps(model, path, times)
            parts = [
                f"{key} {value['jump'].max():.1e} ({value['jump'].max() / value['scale']:.1e})"
                for key, value in found.items()
            ]
            print(f"{name:<18}{place:<9}{len(times):>6}  {'  '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
