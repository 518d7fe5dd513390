"""A leaderboard file by two jobs of an array, and a job that waits for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from run_helpers import save_checkpoint
from submission_helpers import OC20_SPLITS, make_test_set, slabs

if TYPE_CHECKING:
    from cluster import Cluster

RECIPE = Path(__file__).parents[2] / "configs" / "oc20" / "leaderboard_s2ef.yml"
SETTINGS = ["checkpoint=model", "part_rows=2", "max_atoms=30"]
ARRAY = [
    "cluster=slurm_cpu", "job.scheduler.num_array_jobs=2", "job.run_dir=array",
    "job.scheduler.slurm.mem_gb=2", "job.scheduler.slurm.cpus_per_task=1",
]  # fmt: skip


def test_array_of_two_jobs_and_its_reducer(slurm: Cluster, tmp_path: Path) -> None:
    """Its file is that of one process to the last bit; each part is made by one job."""
    test_set = {split: slabs(n, 2) for n, split in enumerate(OC20_SPLITS)}
    make_test_set(tmp_path / "data" / "oc20_s2ef_test", test_set)
    checkpoint = tmp_path / "model" / "inference_ckpt.pt"
    save_checkpoint(checkpoint, conservative=False, stress=False, dataset="oc20")
    for settings in (["cluster=cpu"], ARRAY):
        done = subprocess.run(
            [Path(sys.executable).with_name("fairchem"), "-c", RECIPE, *SETTINGS, *settings],
            cwd=tmp_path, capture_output=True, text=True, check=False,
            env=slurm.environment(ESCAIP_DATA="data", OMP_NUM_THREADS="1"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    # the reducer's job ends too: it depends on the two
    slurm.until(lambda: not slurm.jobs(), timeout=400, what=lambda: str(slurm.jobs()))
    run = tmp_path / "array" / "oc20_leaderboard_s2ef"
    logs = {path.name: path.read_text(errors="replace") for path in run.glob("logs/*_log.*")}
    file = run / "oc20_s2ef.npz"
    alone = tmp_path / "submissions" / "oc20_leaderboard_s2ef" / "oc20_s2ef.npz"
    assert file.is_file(), logs
    assert file.read_bytes() == alone.read_bytes()
    # three parts of each split, every second one by each job
    written = {name: log.count("wrote part") for name, log in logs.items()}
    assert sorted(number for number in written.values() if number) == [6, 6]
