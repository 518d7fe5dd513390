"""A process that imports fairchem once, and runs its command in forks of itself.

Most of the time of a short `fairchem` run is imports, compilation of the sampler, and a report of
the machine, for which fairchem imports torch once more. Here they are done once, or not at all; in
everything else a run is that of the command: a process of its own, its environment, its exit.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

TIMEOUT = 400


def launch(
    folder: Path, *arguments: str | Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``fairchem ARGUMENTS`` in a folder, with its data in ``data`` and on one thread."""
    server = _server()
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [Path(scratch) / name for name in ("stdout", "stderr")]
        job = {
            "folder": str(folder),
            "argv": ["fairchem", *map(str, arguments)],
            "outputs": list(map(str, outputs)),
            "environment": {
                **os.environ, "ESCAIP_DATA": "data", "OMP_NUM_THREADS": "1", **environment
            },
        }  # fmt: skip
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], TIMEOUT)[0]:
            server.kill()
            _server.cache_clear()
            raise TimeoutError(f"{job['argv']} took more than {TIMEOUT} s")
        code = int(server.stdout.readline())
        texts = [path.read_text() for path in outputs]
    return subprocess.CompletedProcess(job["argv"], code, *texts)


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    atexit.register(server.kill)
    return server


def _serve() -> dict[str, Any] | None:
    """Fork for each job; the fork returns its job, the server returns at the end of its input."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            return json.loads(line)
        status = os.waitpid(pid, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def _become(job: dict[str, Any]) -> None:
    for stream, path in enumerate([os.devnull, *job["outputs"]]):
        flags = os.O_RDWR | os.O_CREAT
        os.dup2(os.open(path, flags), stream)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv = job["argv"]


def _main() -> None:
    import numpy as np
    from fairchem.core import _cli
    from fairchem.core.datasets.samplers.max_atom_distributed_sampler import get_batches
    from fairchem.core.launchers import slurm_launch

    import escaip_fairchem.data.datasets
    import escaip_fairchem.data.loaders
    import escaip_fairchem.train.progress
    import escaip_fairchem.train.runner
    import escaip_fairchem.train.summary
    import escaip_fairchem.train.unit  # noqa: F401

    slurm_launch.write_environment_report = lambda *args, **kwargs: None
    for dtype in (np.int64, np.int32):
        get_batches(np.ones(2, dtype), np.arange(2), 2, 0)
    job = _serve()
    if job is not None:
        _become(job)
        _cli.main()


if __name__ == "__main__":
    _main()
