"""The tests' own SLURM. `make test-slurm` runs what is here, `make test` does not."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster import Cluster, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jobs import Training

# helpers of the other tests
sys.path.append(str(Path(__file__).parents[1]))


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A SLURM with two nodes of four CPUs, started for this session; see `cluster.Cluster`."""
    # not below pytest's folder: a socket's path is short
    state = Path(tempfile.mkdtemp(prefix="slurm-"))
    # its daemons would outlive tests that are stopped
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("stopped by SIGTERM", returncode=143))
    cluster = Cluster(state)
    try:
        try:
            cluster.start()
        except Unavailable as reason:
            pytest.skip(f"no SLURM: {reason}")
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(state, ignore_errors=True)


@pytest.fixture(scope="session")
def folder(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where trainings are submitted, with data; only if there is a SLURM for them."""
    from jobs import sample_data

    folder = tmp_path_factory.mktemp("slurm")
    sample_data(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(slurm: Cluster, folder: Path) -> Training:
    """A training of one rank, submitted by the command itself; it may still be running."""
    from jobs import Training, job_number

    settings = [
        "cluster=slurm", "job.device_type=CPU", "job.scheduler.num_nodes=1",
        "job.scheduler.ranks_per_node=1", "num_workers=0", "tf32=false",
    ]  # fmt: skip
    training = Training(slurm, folder, "undisturbed", settings)
    command = [Path(sys.executable).with_name("fairchem"), *training.arguments()]
    done = subprocess.run(
        command, cwd=folder, env=training.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    training.jobs.append(job_number(done.stdout + done.stderr))
    return training
