"""A job that is interrupted ends as one that is not: same weights, same learning curve.

Two random moments by default; all with ESCAIP_TEST_FULL=1 (`make test-slurm FULL=1`).
"""

from __future__ import annotations

import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from escaip_fairchem.train.status import read_status
from interruptions import Interruption, interruptions
from jobs import Training, assert_same

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cluster import Cluster

FULL = os.environ.get("ESCAIP_TEST_FULL", "") not in ("", "0")
POINTS = interruptions(20) if FULL else interruptions(2)


@pytest.fixture(scope="module")
def trainings(
    slurm: Cluster, folder: Path, undisturbed: Training
) -> Iterator[dict[Interruption, Future[Training]]]:
    """All that are interrupted, two at a time."""

    def carry_out(point: Interruption) -> Training:
        training = Training(slurm, folder, f"point{point.number}")
        point.carry_out(training)
        return training

    with ThreadPoolExecutor(2) as pool:
        yield {point: pool.submit(carry_out, point) for point in POINTS}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_interrupted_run_ends_as_an_undisturbed_one(
    slurm: Cluster,
    trainings: dict[Interruption, Future[Training]],
    undisturbed: Training,
    point: Interruption,
):
    assert slurm.wait(undisturbed.jobs[0], timeout=600) == "COMPLETED", undisturbed.log()[-3000:]
    training = trainings[point].result()
    print(f"{point}: {training.restarts()} restarts, {len(training.jobs)} jobs")
    assert_same(training, undisturbed)
    status = read_status(training.run)
    assert (status.state, status.step) == ("finished", undisturbed.step())
    # nothing half-written is left, and as many checkpoints as were asked for
    left = {path.name for path in (training.run / "checkpoints").iterdir()}
    assert {"final"} < left
    assert len(left) == 3
    assert all(re.fullmatch(r"final|step_\d+", name) for name in left)
    if point.kind == "daemon":
        assert training.restarts() == 0
    elif point.stage != "end":
        assert training.restarts() > 0
