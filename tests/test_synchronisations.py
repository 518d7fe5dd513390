"""What makes the host wait for a GPU in a step: named, counted, and the same for any depth."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING

import pytest
import torch
from fairchem.core.units.mlip_unit import mlip_unit

from escaip_fairchem import EScAIP
from escaip_fairchem.data.energies import use_exact_energy
from escaip_fairchem.train.counting import summed
from helpers import SMALL
from unit_parts import batches, make_tasks, write_frames

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Reads in a forward pass outside of fairchem's search; docs/model.md has what and why.
COMMON = {
    "backbone._refuse_bad_input": 1,
    "neighbors._nonsingular_cell": 1,
    "neighbors._refuse_coincident": 1,
    "neighbors.select": 1,
    "candidates.choose": 1,
}
EXPECTED = {
    "v2": {**COMMON, "candidates.sorted_lists": 1, "soft_knn.torch_soft_knn": 2},
    "v2 fused": COMMON,
    "paper": {**COMMON, "candidates.sorted_lists": 1, "candidates.find_candidates": 1},
}


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frames") / "train"
    write_frames(folder)
    return folder


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """A fork, because the simulated GPU changes torch."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        yield pool


def waits(
    folder: Path, preset: str, *, conservative: bool, layers: int, fused: bool = False, **keys
) -> tuple[Counter, Counter]:
    """By place, of a forward pass in evaluation and of a training step."""
    from simulated_gpu import move, moved, simulated

    heads = ["EnergyHead", "DirectForceHead"]
    backbone = {
        "model": "escaip_fairchem.EScAIPBackbone", **SMALL, "preset": preset,
        "num_layers": layers, "neighbor_search": "fairchem", **keys,
    }  # fmt: skip
    if conservative:
        heads, backbone = ["ConservativeHead"], backbone | {"direct_forces": False}
        backbone["regress_stress"] = True
    names = {"EnergyHead": "energy", "DirectForceHead": "forces", "ConservativeHead": "all"}
    model = EScAIP(
        backbone=backbone,
        heads={names[head]: {"module": f"escaip_fairchem.{head}"} for head in heads},
    )
    model.backbone.fused_graph = fused
    batch = batches(folder, [[0, 3]], stress=conservative)[0]
    tasks = summed(make_tasks(preset, stress=conservative))
    for task in tasks:
        for part in (task.normalizer, task.element_references):
            if part is not None:
                move(part)
    optimizer = torch.optim.AdamW(move(model).parameters())

    def step(batch) -> None:
        predictions = model(batch)
        use_exact_energy(batch)
        sum(mlip_unit.compute_loss(tasks, predictions, batch).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()

    model.eval()
    _, forward = simulated(model, moved(batch))
    model.train()
    _, training = simulated(step, moved(batch))
    return forward.places, training.places


def own(places: Counter) -> Counter:
    """Without fairchem's graph generation and losses."""
    rest = {place: n for place, n in places.items() if not place.startswith("fairchem.")}
    theirs = ("fairchem.core.graph.", "fairchem.core.modules.loss.", "fairchem.core.units.")
    assert all(place.startswith(theirs) for place in places if place not in rest)
    return Counter(rest)


@pytest.mark.parametrize("preset", EXPECTED)
@pytest.mark.parametrize("conservative", [False, True], ids=["direct", "conservative"])
def test_a_step_waits_at_known_places(preset, conservative, frames, process):
    if "fused" in preset:
        pytest.importorskip("triton")
    keys = {"fused": "fused" in preset, "conservative": conservative, "layers": 1}
    forward, training = process.submit(waits, frames, preset.split()[0], **keys).result()
    assert own(forward) == own(training) == EXPECTED[preset]
    assert training.total() > forward.total()  # the losses' are seen


def test_depth_does_not_matter(frames, process):
    """Of a forward pass and a training step, fairchem's places included."""
    keys = {"conservative": False, "stochastic_depth": 0.1, "energy_reduce": "mean"}
    jobs = [process.submit(waits, frames, "v2", layers=layers, **keys) for layers in (1, 4)]
    shallow, deep = (job.result() for job in jobs)
    assert shallow == deep
    assert own(deep[0]) == own(deep[1]) == EXPECTED["v2"]


def test_every_wait_is_seen(process):
    """Each operation that makes a GPU wait, and none of those that do not."""
    assert process.submit(known_waits).result() == {}


def known_waits() -> dict[str, tuple[int, int]]:
    """Operations that were not counted as often as expected."""
    from simulated_gpu import DEVICE, NAME, OnDevice, simulated

    x = OnDevice(torch.tensor([3.0, 0.0, 2.0]))
    rows = OnDevice(torch.tensor([2, 0]))
    cell = OnDevice(torch.eye(3)[None])
    assert x.device == DEVICE
    cases = {
        "item": (1, lambda: float(x[0])),
        "bool": (1, lambda: bool(x.any())),
        "int": (1, lambda: int(x.max())),
        "tolist": (1, x.tolist),
        "cpu": (1, x.cpu),
        "to device": (1, lambda: torch.ones(3).to(NAME)),
        "tensor": (1, lambda: torch.tensor([1.0, 2.0], device=NAME)),
        "new_tensor": (1, lambda: x.new_tensor([1.0, 2.0])),
        "nonzero": (1, x.nonzero),
        "mask": (1, lambda: x[x > 0]),
        "two reads": (2, lambda: x[x > 0].max().item()),
        "masked_select": (1, lambda: x.masked_select(x > 0)),
        "unique": (1, lambda: torch.unique(x)),
        "repeats": (1, lambda: x.repeat_interleave(rows[:1].expand(3))),
        "bincount": (2, lambda: torch.bincount(rows)),
        "inv": (1, lambda: torch.linalg.inv(cell)),
        "indices of the host": (1, lambda: x[torch.tensor([0])]),
        "known repeats": (0, lambda: x.repeat_interleave(rows[:1].expand(3), output_size=6)),
        "indices": (0, lambda: x[rows]),
        "masked number": (0, lambda: x.masked_fill(x > 0, 1.0)),
        "inv_ex": (0, lambda: torch.linalg.inv_ex(cell)),
        "numbers of the host": (0, lambda: torch.tensor([1.0]).max().item()),
        "made there": (0, lambda: torch.full((2,), 1.0, device=NAME) * 2.0),
    }
    counted = {
        name: (n, sum(simulated(run)[1].places.values())) for name, (n, run) in cases.items()
    }
    return {name: pair for name, pair in counted.items() if pair[0] != pair[1]}
