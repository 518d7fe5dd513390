"""The tests' SLURM itself: jobs run, a failed node loses them, a stopped one leaves nothing."""

from __future__ import annotations

import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from cluster import Cluster, alive, kill

if TYPE_CHECKING:
    from pathlib import Path


def submit(slurm: Cluster, folder: Path, script: str, *options: str) -> str:
    file = folder / "job.sh"
    file.write_text(f"#!/bin/bash\n{script}\n")
    output = f"--output={folder}/job.out"
    command = ["sbatch", "--parsable", "--requeue", output, "--open-mode=append", *options, file]
    return subprocess.run(
        command, env=slurm.environment(), check=True, capture_output=True, text=True
    ).stdout.strip()


def test_job_of_two_nodes(slurm: Cluster, tmp_path: Path):
    job = submit(slurm, tmp_path, "srun printenv SLURMD_NODENAME", "-p", "both", "-N", "2")
    assert slurm.wait(job, timeout=60) == "COMPLETED"
    assert sorted((tmp_path / "job.out").read_text().split()) == slurm.nodes


def test_failed_node_queues_its_job_again(slurm: Cluster, tmp_path: Path):
    # the first attempt never ends by itself
    script = "echo attempt ${SLURM_RESTART_COUNT:-0}; [ $SLURM_RESTART_COUNT ] || srun sleep 900"
    job = submit(slurm, tmp_path, script)
    slurm.wait_running(job)
    output = tmp_path / "job.out"
    slurm.until(lambda: output.exists() and "attempt 0" in output.read_text(), timeout=20)
    slurm.kill_slurmd()
    slurm.start_slurmd()
    assert slurm.wait(job, timeout=120) == "COMPLETED"
    assert slurm.show(job)["Restarts"] == "1"
    assert output.read_text().split("\n")[-2] == "attempt 1"


def test_controller_that_dies_keeps_its_jobs(slurm: Cluster, tmp_path: Path):
    job = submit(slurm, tmp_path, "sleep 900")
    slurm.wait_running(job)
    time.sleep(6)  # its state is saved every five seconds
    kill(int((slurm.state / "slurmctld.pid").read_text()), signal.SIGKILL)
    with pytest.warns(UserWarning, match="slurmctld died"):
        assert slurm.jobs() == {job: "RUNNING"}
    slurm.cancel(job)
    assert slurm.wait(job, timeout=60) == "CANCELLED"


def test_stop_leaves_nothing(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory):
    other = Cluster(tmp_path_factory.mktemp("s")).start()
    job = submit(other, other.state, "srun sleep 900")
    other.wait_running(job)
    daemons = [int(file.read_text()) for file in other.state.glob("*.pid")]
    assert len(daemons) == 4  # munged, slurmctld, two slurmd
    other.stop()
    assert not any(alive(pid) for pid in daemons)
    assert not other.job_processes()
    assert set(slurm.run("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"}
