"""Preset ``paper`` against the authors' own numbers, a slow version, and textbook values."""

from __future__ import annotations

from functools import cache

import e3nn.o3
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.neighborlist import neighbor_list
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch

from escaip_fairchem import EScAIP
from escaip_fairchem.bench import v1_names
from escaip_fairchem.features import bond_orientational_order
from slow_paper import SlowPaper, neighborhoods

SIZES = {
    "authors": {  # as in their file
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "species_dim": 32,
        "boo_dim": 16,
        "rbf_dim": 64,
        "max_num_elements": 100,
        "cutoff": 12.0,
        "max_neighbors": 20,
    },
    "small": {  # every size different
        "hidden_size": 24,
        "num_layers": 3,
        "num_heads": 2,
        "species_dim": 8,
        "boo_dim": 5,
        "rbf_size": 60,
        "rbf_dim": 14,
        "cutoff": 6.0,
        "max_neighbors": 11,
    },
}
STAGES = ["node_input", "node_block0", "node_block1"]


def build_model(size: str, dtype: torch.dtype, *, direct: bool = True) -> EScAIP:
    backbone = dict(SIZES[size], model="escaip_fairchem.EScAIPBackbone", preset="paper")
    heads = {"energy": {"module": "escaip_fairchem.EnergyHead"}}
    heads["forces"] = {"module": "escaip_fairchem.DirectForceHead"}
    if not direct:
        heads = {"energy": {"module": "escaip_fairchem.ConservativeHead"}}
    torch.manual_seed(0)
    model = EScAIP(backbone={**backbone, "direct_forces": direct}, heads=heads)
    return model.to(dtype).eval()


def load(model: EScAIP, weights: dict, *, direct: bool = True) -> EScAIP:
    layers, own = model.backbone.config.num_layers, model.state_dict()
    tensors = v1_names.to_package(weights, own, layers, direct=direct)
    model.load_state_dict({name: torch.as_tensor(value) for name, value in tensors.items()})
    return model


def slow(size: str, weights: dict) -> SlowPaper:
    keys = SIZES[size]
    return SlowPaper(
        weights,
        layers=keys["num_layers"],
        heads=keys["num_heads"],
        cutoff=keys["cutoff"],
        max_neighbors=keys["max_neighbors"],
    )


@cache
def random_weights() -> dict:
    """Weights of the small model by V1 names, none of them zero or one."""
    state = build_model("small", torch.float64).state_dict()
    noise = np.random.default_rng(0)
    return {
        theirs: state[ours].numpy() + 0.2 * noise.normal(size=tuple(state[ours].shape))
        for theirs, ours in v1_names.names(SIZES["small"]["num_layers"]).items()
    }


def batch_of(structures: list[Atoms], dtype: torch.dtype) -> AtomicData:
    return atomicdata_list_to_batch(
        [AtomicData.from_ase(a, task_name="oc20", target_dtype=dtype) for a in structures]
    )


def run(model: EScAIP, structures: list[Atoms], dtype: torch.dtype = torch.float64):
    """Energies [B] and forces [N, 3]."""
    out = model(batch_of(structures, dtype))
    return out["energy"]["energy"].detach().numpy(), out["forces"]["forces"].detach().numpy()


def run_slow(model: SlowPaper, atoms: Atoms, **options) -> dict:
    return model(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, **options)


def error(ours, reference) -> float:
    """Largest difference relative to the largest reference value."""
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape
    return np.abs(ours - reference).max() / np.abs(reference).max()


# the authors' numbers


@pytest.fixture(scope="module")
def published(test_data) -> tuple[dict, list[dict]]:
    """Weights, and the results of each structure, as the authors' code gave them."""
    stored = dict(np.load(test_data / "reference" / "paper_v1_oc20.npz"))
    weights = {k: v for k, v in stored.items() if k.startswith(("backbone", "energy", "force"))}
    structures = [
        {k.partition("/")[2]: v for k, v in stored.items() if k.startswith(f"s{index}/")}
        for index in range(3)
    ]
    return weights, structures


def atoms_of(reference: dict) -> Atoms:
    return Atoms(reference["numbers"], reference["positions"], cell=reference["cell"], pbc=True)


@pytest.fixture(scope="module")
@torch.no_grad()
def stages(published) -> list[dict]:
    """What the package computes on the way, in float32, for each of the authors' structures."""
    weights, references = published
    model = load(build_model("authors", torch.float32), weights)
    seen = {}
    backbone = model.backbone
    backbone.input_block.register_forward_hook(
        lambda module, args, out: seen.update(boo=args[1].boo, node_input=out[0])
    )
    for index, block in enumerate(backbone.blocks):
        block.register_forward_hook(
            lambda module, args, out, index=index: seen.update({f"node_block{index}": out[0]})
        )
    backbone.register_forward_hook(lambda module, args, out: seen.update(graph=out["graph"]))
    results = []
    for reference in references:
        energy, forces = run(model, [atoms_of(reference)], torch.float32)
        results.append({**seen, "energy": energy[:, None], "forces": forces})
    return results


@pytest.mark.parametrize("index", range(3))
def test_neighbors_and_directions_are_the_authors(index, published, stages):
    reference, graph = published[1][index], stages[index]["graph"]
    mask = reference["neighbor_mask"]
    assert mask.sum(1).tolist() == graph.counts.tolist()
    for i, count in enumerate(graph.counts.tolist()):
        own = slice(int(graph.starts[i]), int(graph.starts[i]) + count)
        senders, directions = graph.senders[own].numpy(), graph.directions[own].numpy()
        theirs = reference["neighbor_list"][i][mask[i]]
        assert sorted(senders) == sorted(theirs)
        # the order of slots is free: pair each edge with theirs of the same direction
        difference = directions[:, None] - reference["edge_direction"][i][mask[i]]
        distance = np.abs(difference).max(-1)
        partner = distance.argmin(1)
        assert sorted(partner) == list(range(count))
        assert (senders == theirs[partner]).all()
        assert distance.min(1).max() < 1e-5


@pytest.mark.parametrize("key", ["boo", *STAGES, "energy", "forces"])
@pytest.mark.parametrize("index", range(3))
def test_every_stage_is_the_authors(index, key, published, stages):
    assert error(stages[index][key], published[1][index][key]) < 1e-5


@pytest.fixture(scope="module")
def slow_published(published) -> list[dict]:
    """The slow version on the authors' structures."""
    weights, references = published
    model = slow("authors", weights)
    return [run_slow(model, atoms_of(reference)) for reference in references]


def test_slow_version_is_the_authors(published, slow_published):
    """As close as their float32 is to float64."""
    references, scale = published[1], max(abs(r["energy"].item()) for r in published[1])
    for reference, result in zip(references, slow_published, strict=True):
        for stage, key in enumerate(STAGES):
            assert error(result["stages"][stage], reference[key]) < 1e-5
        assert error(result["boo"], reference["boo"]) < 1e-5
        assert error(result["forces"], reference["forces"]) < 2e-5
        assert abs(result["energy"] - reference["energy"].item()) < 1e-5 * scale


# the slow version


def test_float64_on_the_authors_structures(published, slow_published):
    model = load(build_model("authors", torch.float64), published[0])
    energy, forces = run(model, [atoms_of(reference) for reference in published[1]])
    assert error(energy, [result["energy"] for result in slow_published]) < 1e-10
    assert error(forces, np.concatenate([r["forces"] for r in slow_published])) < 1e-10


def rattled(atoms: Atoms, amplitude: float = 0.1) -> Atoms:
    atoms.rattle(amplitude, seed=1)
    return atoms


@cache
def structures() -> dict[str, Atoms]:
    """Kinds of boundary; rattled, so that no two neighbours tie."""
    slab = fcc111("Pt", (2, 2, 3), vacuum=1.5)  # its images along z would be within reach
    slab += Atoms("CO", slab.positions[-1] + np.array([[0, 0, 1.8], [0, 0, 3.0]]))
    triclinic = Atoms("NaCl", cell=[[3.1, 0, 0], [0.9, 3.4, 0], [-0.7, 1.1, 3.6]], pbc=True)
    triclinic.positions = [[0, 0, 0], [1.6, 2.1, 1.9] - 3 * triclinic.cell.array[1]]
    wire = Atoms("CuO", [[0, 0, 0], [1.2, 1.3, 0.4]], cell=[2.9, 5, 5], pbc=(1, 0, 0))
    far = molecule("CH4")
    far.positions += [4.0, 0.5, 0.0]
    return {
        "molecule": rattled(molecule("CH3CH2OH")),
        "molecule larger than max_neighbors": rattled(molecule("C6H6") + far),
        "slab TTF": rattled(slab),
        "triclinic smaller than the cutoff": rattled(triclinic),
        "wire TFF": rattled(wire),
        "pair": Atoms("CO", [[0, 0, 0], [0.3, 0.5, 0.9]]),
    }


@cache
def small_results() -> tuple[dict, dict]:
    """The package on all structures in one batch, and the slow version on each."""
    model = load(build_model("small", torch.float64), random_weights())
    energy, forces = run(model, list(structures().values()))
    ends = np.cumsum([len(atoms) for atoms in structures().values()])
    own = zip(energy, np.split(forces, ends[:-1]), strict=True)
    reference = slow("small", random_weights())
    return (
        dict(zip(structures(), own, strict=True)),
        {name: run_slow(reference, atoms) for name, atoms in structures().items()},
    )


def gap_at_the_cut(atoms: Atoms) -> float:
    """How much further the first neighbour left out is than the last one kept, at least."""
    limit, cutoff = SIZES["small"]["max_neighbors"], SIZES["small"]["cutoff"]
    lists = neighborhoods(atoms.positions, atoms.cell.array, atoms.pbc, cutoff, limit + 1)
    return min((a[-1].distance - a[-2].distance for a in lists if len(a) > limit), default=cutoff)


@pytest.mark.parametrize("name", structures())
def test_float64_is_the_slow_version(name):
    assert gap_at_the_cut(structures()[name]) > 1e-3
    own, reference = small_results()
    energy, forces = own[name]
    assert error([energy], [reference[name]["energy"]]) < 1e-10
    assert error(forces, reference[name]["forces"]) < 1e-10


LONELY = {
    "alone": Atoms("O", [[0.1, 0.2, 0.3]]),
    "alone in a large cell": Atoms("O", [[0.1, 0.2, 0.3]], cell=[7, 8, 9], pbc=True),
    "far from a molecule": molecule("CH4") + Atoms("O", [[9.0, 9.0, 9.0]]),
}


@pytest.mark.parametrize("name", LONELY)
def test_isolated_atom_has_the_published_energy_but_no_force(name):
    """The authors give its self edge the direction (1, 0, 0), and thereby a force."""
    model = load(build_model("small", torch.float64), random_weights())
    energy, forces = run(model, [LONELY[name]])
    reference = slow("small", random_weights())
    authors = run_slow(reference, LONELY[name], lone_direction=(1.0, 0.0, 0.0))
    assert error(energy, [authors["energy"]]) < 1e-10
    assert abs(authors["forces"][-1, 0]) > 1e-3
    assert (forces[-1] == 0).all()
    ours = run_slow(reference, LONELY[name])["forces"]
    assert np.abs(forces - ours).max() <= 1e-10 * np.abs(ours).max()


@pytest.mark.parametrize("name", ["molecule", "triclinic smaller than the cutoff"])
def test_conservative_forces_are_differences_of_the_slow_energy(name):
    model = load(build_model("small", torch.float64, direct=False), random_weights(), direct=False)
    atoms, step = structures()[name], 1e-5
    energy, forces = run(model, [atoms])
    reference = slow("small", random_weights())
    assert error(energy, [small_results()[1][name]["energy"]]) < 1e-10
    for i, axis in [(0, 0), (1, 1), (1, 2)]:
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[i, axis] += sign * step
            energies.append(run_slow(reference, moved)["energy"])
        difference = -(energies[0] - energies[1]) / (2 * step)
        assert abs(forces[i, axis] - difference) < 1e-6 * np.abs(forces).max()


# bond-orientational order


def boo_of(vectors: np.ndarray, scale: str, lmax: int = 9) -> np.ndarray:
    """Of one neighbourhood."""
    directions = torch.nn.functional.normalize(torch.as_tensor(vectors, dtype=torch.float64))
    receivers = torch.zeros(len(directions), dtype=torch.long)
    weights = torch.ones(len(directions), dtype=torch.float64)
    return bond_orientational_order(
        directions, receivers, weights, 1, lmax=lmax, scale=scale
    ).numpy()[0]


@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_boo_equals_e3nn(count):
    vectors = torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [
        e3nn.o3.spherical_harmonics(n, vectors, True, normalization="component").mean(0).norm()
        for n in range(10)
    ]
    component = boo_of(vectors, "component")
    assert np.abs(component - expected).max() < 1e-12
    unit = boo_of(vectors, "unit") * np.sqrt(2 * np.arange(10) + 1)
    assert np.abs(unit - expected).max() < 1e-12


def shell(atoms: Atoms, radius: float) -> np.ndarray:
    """Vectors from atom 0 to its neighbours."""
    index, vectors = neighbor_list("iD", atoms, radius)
    return vectors[index == 0]


def icosahedron() -> np.ndarray:
    golden = (1 + 5**0.5) / 2
    return np.array(
        [
            np.roll([0, a, b], shift)
            for shift in range(3)
            for a in (-1, 1)
            for b in (-golden, golden)
        ]
    )


BCC = bulk("Fe", "bcc", a=2.0)
HCP = bulk("Mg", "hcp", a=2.0, c=2.0 * (8 / 3) ** 0.5)
TEXTBOOK = {  # neighbours, their number, Q_4, Q_6
    "fcc": (shell(bulk("Cu", "fcc", a=2.0), 1.5), 12, 0.1909, 0.5745),
    "hcp": (shell(HCP, 2.1), 12, 0.0972, 0.4848),
    "bcc, first shell": (shell(BCC, 1.8), 8, 0.5092, 0.6285),
    "bcc, two shells": (shell(BCC, 2.1), 14, 0.0364, 0.5107),
    "simple cubic": (shell(bulk("Po", "sc", a=2.0), 2.1), 6, 0.7638, 0.3536),
    "diamond": (shell(bulk("C", "diamond", a=2.0), 1.0), 4, 0.5092, 0.6285),
    "icosahedron": (icosahedron(), 12, 0.0, 0.6633),
}


@pytest.mark.parametrize("name", TEXTBOOK)
def test_textbook_order_parameters(name):
    """Values as in Mickel et al., J. Chem. Phys. 138, 044501 (2013)."""
    vectors, count, q4, q6 = TEXTBOOK[name]
    assert len(vectors) == count
    unit, component = boo_of(vectors, "unit"), boo_of(vectors, "component")
    assert component[[4, 6]] / np.sqrt([9, 13]) == pytest.approx([q4, q6], abs=6e-5)
    floor = 1e-3
    assert unit[[4, 6]] == pytest.approx([max(q4, floor), q6], abs=6e-5)
    assert (component[0], unit[0]) == pytest.approx((1, 1))


@pytest.mark.parametrize("name", sorted(TEXTBOOK.keys() - {"diamond", "hcp"}))
def test_odd_orders_vanish_under_inversion(name):
    assert boo_of(TEXTBOOK[name][0], "component")[1::2] == pytest.approx(0, abs=1e-12)


# ties


def energies_of_permutations(atoms: Atoms) -> np.ndarray:
    """Energies of the same crystal with its atoms listed in different orders."""
    model = load(build_model("small", torch.float64), random_weights())
    orders = [np.random.default_rng(seed).permutation(len(atoms)) for seed in range(4)]
    return run(model, [atoms[order] for order in orders])[0]


def perfect_crystal() -> Atoms:
    """Shells of 6 and 12 neighbours, so that the cut lies within the second."""
    return bulk("Po", "sc", a=2.0).repeat(3)


def test_equally_distant_neighbors_at_the_cut_are_chosen_by_the_order_of_atoms():
    """As in the publication: the nearest `max_neighbors` are not unique in a crystal."""
    assert gap_at_the_cut(perfect_crystal()) == 0
    energies = energies_of_permutations(perfect_crystal())
    assert np.ptp(energies) > 1e-3 * np.abs(energies).max()


def test_without_ties_the_order_of_atoms_does_not_matter():
    assert gap_at_the_cut(rattled(perfect_crystal())) > 0
    energies = energies_of_permutations(rattled(perfect_crystal()))
    assert np.ptp(energies) < 1e-12 * np.abs(energies).max()
