"""`escaip sweep` on a real SLURM: six points, two at a time, one of which is made to fail."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cluster import Cluster

RECIPE = Path(__file__).parents[2] / "configs/oc20/escaip_2m.yml"
FIXED = (
    "fixed: {cluster: slurm, job.device_type: CPU, job.scheduler.ranks_per_node: 1,"
    " job.scheduler.num_nodes: 1, job.scheduler.slurm.mem_gb: 1, job.scheduler.slurm.timeout_hr: 1,"
    " job.scheduler.slurm.cpus_per_task: 1, num_workers: 0, tf32: false, backbone: tiny,"
    " dataset: sample, epochs: null, max_atoms: 120, evaluate_every_n_steps: 2,"
    " checkpoint_every_n_steps: 2, steps: 4}\n"
)


def sweep(slurm: Cluster, folder: Path, *words: str) -> str:
    """Output of the command, which must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "escaip_fairchem.cli", *words], cwd=folder, check=False, text=True,
        capture_output=True, env=slurm.environment(ESCAIP_DATA="data", OMP_NUM_THREADS="1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def sbatch_calls(slurm: Cluster) -> int:
    """Numbers that SLURM has given out: each call of sbatch takes one at least."""
    lines = slurm.run("squeue", "-h", "-t", "all", "-o", "%F").split()
    return len(set(lines))


@pytest.fixture(scope="module")
def folder(slurm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    sweep(slurm, folder, "sample-data", "oc20", "--frames", "24")
    shutil.copytree(folder / "data/oc20/sample", folder / "data/flaky")
    for database in (folder / "data/flaky/train").glob("*.aselmdb"):
        database.rename(database.with_suffix(".kept"))
        database.write_text("no database")
    (folder / "s.yml").write_text(
        "list: [{seed: 0}, {seed: 1}, {seed: 2}, {seed: 3}, {seed: 4},"
        " {seed: 5, dataset.train: flaky/train}]\nparallel: 2\n" + FIXED
    )
    return folder


def states(slurm: Cluster, folder: Path) -> dict[str, int]:
    first = sweep(slurm, folder, "sweep", "status", "d").splitlines()[0]
    return {word.split()[1]: int(word.split()[0]) for word in first.split(", ")}


def wait(slurm: Cluster) -> list[int]:
    """Until the queue is empty; how many jobs were seen running at a time."""
    seen = []

    def empty() -> bool:
        jobs = slurm.jobs()
        seen.append(sum(state == "RUNNING" for state in jobs.values()))
        return not jobs

    slurm.until(empty, timeout=900, what=lambda: str(slurm.jobs()))
    return seen


def test_six_points_two_at_a_time_with_one_that_fails(slurm, folder):
    command = ("sweep", str(RECIPE), "s.yml", "--dir", "d")
    before = sbatch_calls(slurm)
    assert "6 points, 2 at a time" in sweep(slurm, folder, *command)
    assert sbatch_calls(slurm) == before + 1
    # given while the first one's jobs wait and run
    again = sweep(slurm, folder, *command)
    assert "left alone" in again
    assert sbatch_calls(slurm) == before + 1
    assert max(wait(slurm)) == 2
    assert states(slurm, folder) == {"finished": 5, "failed": 1}
    shown = sweep(slurm, folder, "sweep", "status", "d")
    assert "File is not an LMDB file" in shown
    # given when all is over
    assert "left alone: 5 finished, 1 failed" in sweep(slurm, folder, *command)
    assert sbatch_calls(slurm) == before + 1
    restarts = [
        json.loads(p.read_text())["restarts"] for p in folder.glob("d/points/*/status.json")
    ]
    assert set(restarts) == {0}

    for database in (folder / "data/flaky/train").glob("*.kept"):
        database.rename(database.with_suffix(".aselmdb"))
    assert "had failed: " in sweep(slurm, folder, "sweep", "retry", "d")
    wait(slurm)
    assert states(slurm, folder) == {"finished": 6}
    assert len([*folder.glob("d/points/*/checkpoints/final/inference_ckpt.pt")]) == 6


def test_two_hundred_points_are_submitted_by_one_call_in_under_a_minute(slurm, folder):
    (folder / "many.yml").write_text(
        "random: {lr: {loguniform: [1e-4, 1e-2]}, loss.forces: {uniform: [1, 100]}}\n"
        "samples: 200\nparallel: 4\n"
        + FIXED.replace("{", "{+job.scheduler.slurm.additional_parameters.hold: true, ", 1)
    )
    before, used = sbatch_calls(slurm), resource.getrusage(resource.RUSAGE_CHILDREN)
    out = sweep(slurm, folder, "sweep", str(RECIPE), "many.yml", "--dir", "many")
    assert "200 points composed and checked" in out
    assert sbatch_calls(slurm) == before + 1
    assert len(slurm.jobs()) == 200
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # of the processor: other programs share it
    assert after.ru_utime - used.ru_utime + after.ru_stime - used.ru_stime < 60
    sweep(slurm, folder, "sweep", "cancel", "many")
    wait(slurm)
    assert states_of_all_canceled(slurm, folder)


def states_of_all_canceled(slurm: Cluster, folder: Path) -> bool:
    return sweep(slurm, folder, "sweep", "status", "many").startswith("200 canceled\n")


def test_halving_submits_all_rungs_at_once(slurm, folder):
    (folder / "h.yml").write_text(
        "grid: {lr: [1e-3, 1e-2]}\nhalving: {metric: val_loss, steps: [2], factor: 2}\n" + FIXED
    )
    before = sbatch_calls(slurm)
    out = sweep(slurm, folder, "sweep", str(RECIPE), "h.yml", "--dir", "h")
    assert "2 points of rung 0" in out
    assert "1 points of rung 1" in out
    assert sbatch_calls(slurm) == before + 2
    wait(slurm)
    found = json.loads((folder / "h/halving/rung_1.json").read_text())
    winner = min(found["scores"], key=found["scores"].get)
    assert found["names"] == [winner]
    shown = sweep(slurm, folder, "sweep", "status", "h")
    assert shown.startswith("1 finished, 1 eliminated\n")
    steps = {
        path.parent.name: json.loads(path.read_text())["step"]
        for path in folder.glob("h/points/*/status.json")
    }
    assert steps == {name: 4 if name == winner else 2 for name in found["scores"]}
