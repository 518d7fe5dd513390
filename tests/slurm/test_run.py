"""Trainings on SLURM by fairchem's command: one rank, two on one node, two nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from escaip_fairchem.train.status import read_status
from jobs import STEPS, Training, assert_same

if TYPE_CHECKING:
    from pathlib import Path

    from cluster import Cluster

ONE_NODE = [
    "cluster=slurm_cpu", "job.scheduler.ranks_per_node=2",
    "job.scheduler.distributed_init_method=FILE",
]  # fmt: skip
TWO_NODES = [
    "cluster=slurm_cpu", "job.scheduler.num_nodes=2", "job.scheduler.slurm.partition=both",
]  # fmt: skip


@pytest.fixture(scope="module")
def trainings(slurm: Cluster, folder: Path, undisturbed: Training) -> dict[str, Training]:
    """Three at a time; that of one node is requeued on its way."""
    nodes = Training(slurm, folder, "two-nodes", TWO_NODES)
    nodes.submit()
    node = Training(slurm, folder, "one-node", ONE_NODE)
    job = node.submit()
    slurm.until(lambda: node.step() >= 4, timeout=240, what=node.log)
    slurm.requeue(job)
    all_ = {"one-rank": undisturbed, "one-node": node, "two-nodes": nodes}
    for training in all_.values():
        assert slurm.wait(training.jobs[0], timeout=600) == "COMPLETED", training.log()[-3000:]
    return all_


def test_checkpoint_predicts_what_the_run_measured(trainings: dict[str, Training]):
    import ase.db

    import escaip_fairchem

    training = trainings["one-rank"]
    status = read_status(training.run)
    assert (status.state, status.step, status.restarts) == ("finished", STEPS, 0)
    assert status.slurm_job_id == training.jobs[0]
    checkpoint = training.run / "checkpoints" / "final" / "inference_ckpt.pt"
    calculator = escaip_fairchem.calculator(str(checkpoint))
    errors = []
    (file,) = (training.folder / "data" / "oc20" / "sample" / "val").glob("*.aselmdb")
    with ase.db.connect(str(file), type="aselmdb") as database:
        for row in database.select():
            atoms = row.toatoms()
            truth = atoms.get_forces(apply_constraint=False)
            fixed = np.isin(np.arange(len(atoms)), atoms.constraints[0].index)
            atoms.calc = calculator
            errors.append((atoms.get_forces(apply_constraint=False) - truth)[~fixed])
    measured = float(training.metrics()[-1]["val_forces_mae"])
    assert np.abs(np.concatenate(errors)).mean() == pytest.approx(measured, rel=1e-4)


def test_two_ranks_on_two_nodes_and_requeued_on_one(trainings: dict[str, Training]):
    """By ports between nodes; by a file, which a start that was stopped leaves behind."""
    nodes, node = trainings["two-nodes"], trainings["one-node"]
    assert "tcp://" in nodes.log(rank=1)
    assert "file://" in node.log(rank=1)
    assert [nodes.restarts(), node.restarts()] == [0, 1]
    assert_same(node, nodes)
    assert nodes.metrics() != trainings["one-rank"].metrics()  # twice the batch
