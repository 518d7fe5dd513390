"""Energy, forces and curvature where neighbours come and go; `examples/smoothness.py` finds where.

What is continuous differs across an event in proportion to the step taken, so that a tenth of
the step leaves a tenth of the difference, and the extrapolation to no step nothing.
"""

from __future__ import annotations

from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import pytest
import smoothness
import torch
from ase import Atoms

from helpers import make_batch, small_model

TINY = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "boo_lmax": 4}
SMOOTH = {"preset": "v2", "smooth": True}
PUBLISHED = {"preset": "v2"}
PAPER = {"preset": "paper", "cutoff": 6.0}
# Small neighbourhoods, so that ranks count where there are few atoms.
NEIGHBORS = {"dimer": 30, "trimer": 2, "slab": 24, "crystal": 8}


def path_of(place: str) -> smoothness.Path:
    if place == "trimer":  # the oxygen passes the nitrogen at 2 A from the copper
        atoms = Atoms("CuNO", [[0, 0, 0], [1.9, 0.5, 0.2], [-0.9, 1.2, 0.4]])
        return smoothness.Path(atoms, np.array([0, 0.8, 0.6]), 1.5)
    return smoothness.paths()[place]


def model_of(place: str, choice: dict[str, Any], *, conservative: bool = True):
    k = NEIGHBORS[place]
    if place == "trimer" and choice["preset"] == "paper":
        k = 1  # its list does not have the atom itself
    if place == "crystal":
        choice = choice | {"cutoff": 4.0}
    return small_model(conservative=conservative, max_neighbors=k, **TINY, **choice)


@cache
def measured(place: str, *items: tuple[str, Any], conservative: bool = True):
    """Events of each kind, and the jumps there."""
    model = model_of(place, dict(items), conservative=conservative)
    path = path_of(place)
    found = smoothness.events(path, model.backbone.config, most=3, grid=12)
    times = list(chain(*found.values()))
    return found, smoothness.jumps(model, path, times)


@pytest.mark.parametrize("place", NEIGHBORS)
def test_nothing_jumps_where_neighbours_come_and_go(place):
    found, results = measured(place, *SMOOTH.items())
    assert found["neighbour"]
    if place in ("slab", "crystal"):
        assert all(found[kind] for kind in ("cutoff", "reach", "ranks", "step"))
    assert set(results) == {"energy", "forces", "curvature"}
    for key, result in results.items():
        assert result["scale"] > 1e-4, key
        assert result["jump"].max() < 1e-6 * result["scale"], key
        assert (result["near"] < 0.11 * result["far"] + 1e-8 * result["scale"]).all(), key


@pytest.mark.parametrize("choice", [PUBLISHED, PAPER], ids=["v2", "paper"])
@pytest.mark.parametrize("place", NEIGHBORS)
def test_the_published_forms_jump(place, choice):
    """The control: what the test above sees where there is something to see."""
    found, results = measured(place, *choice.items())
    assert found["neighbour"]
    energy = results["energy"]
    worst = energy["jump"].argmax()
    assert energy["jump"][worst] > 1e-3 * energy["scale"]
    assert energy["near"][worst] == pytest.approx(energy["far"][worst], rel=0.1)
    if place in ("slab", "crystal"):  # the forces of a leaving pair have died away before
        assert results["forces"]["jump"].max() > 1e-3 * results["forces"]["scale"]


@pytest.mark.parametrize("smooth", [True, False])
def test_direct_forces_jump_without_smooth_only(smooth):
    _, results = measured("slab", *(SMOOTH | {"smooth": smooth}).items(), conservative=False)
    for key in ("energy", "forces"):
        jump = results[key]["jump"].max() / results[key]["scale"]
        assert jump < 1e-6 if smooth else jump > 1e-3


@pytest.mark.parametrize("choice", [SMOOTH, PUBLISHED, PAPER], ids=["smooth", "v2", "paper"])
def test_neighbours_come_and_go_where_the_formulas_say(choice):
    """The package's graph gains or loses an edge at each event, and nowhere beside it."""
    path, (found, _) = path_of("slab"), measured("slab", *choice.items())
    backbone = model_of("slab", choice).backbone
    for t in found["neighbour"]:
        edges = []
        for offset in (-2e-6, -1e-6, 1e-6, 2e-6):
            with torch.no_grad():
                graph = backbone(make_batch(path.at(t + offset)))["graph"]
            vectors = graph.directions * graph.lengths[:, None]
            names = zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True)
            rounded = vectors.detach().numpy().round(2).tolist()
            edges.append({(*name, *vector) for name, vector in zip(names, rounded, strict=True)})
        assert edges[0] == edges[1] != edges[2] == edges[3]
