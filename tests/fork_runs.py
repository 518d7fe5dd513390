"""The `fairchem` command in forks of a process that has imported everything.

A run takes 3 s in place of 20, of which most are imports, compilation of the sampler, a report of
the machine, for which fairchem imports torch once more, and the search for unused keys in the
configuration, which tests of the recipes do. In everything else a run is that of the command: a
process of its own, its environment, its exit. Run as a script this is the process that imports and
forks.
"""

from __future__ import annotations

import atexit
import json
import os
import random
import select
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Run:
    """A running command.

    Args:
        folder: Where it runs, on one thread; the data are in ``data`` there.
        arguments: As after ``fairchem -c``.
        rank: Of two, that are started one by one on one port; None is alone.
        port: Free on this machine.
        log: File in the folder for the output, after what is in it.
        errors: The same for the standard error, if apart.
        search: Look for unused keys, too, as the command does.
        environment: Variables besides those of this process.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str | Path,
        rank: int | None = None,
        port: int = 0,
        log: str = "log",
        errors: str | None = None,
        search: bool = False,
        **environment: str,
    ) -> None:
        self.log = folder / f"{log}{rank or ''}"
        self._before = len(self.output()) if self.log.exists() else 0
        scratch = tempfile.TemporaryDirectory()
        self._scratch = scratch  # removed with this object
        self._exit = Path(scratch.name) / "exit"
        server = _server()
        job = {
            "folder": str(folder),
            "arguments": list(map(str, arguments)),
            "outputs": [str(self.log), str(folder / errors if errors else self.log)],
            "exit": str(self._exit),
            "rank": rank,
            "port": port,
            "search": search,
            "environment": {
                **os.environ, "ESCAIP_DATA": "data", "OMP_NUM_THREADS": "1", **environment
            },
        }  # fmt: skip
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return not self._exit.exists()

    def output(self) -> str:
        """All that was written to the log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def said(self) -> str:
        """What this process wrote, after its end."""
        return self.output()[self._before :]

    def wait(self, timeout: float = 400) -> int:
        """The exit code: negative for a signal that ended it."""
        end = time.monotonic() + timeout
        while self.running:
            if time.monotonic() > end:
                self.send_signal(9)
                raise AssertionError(f"still running after {timeout} s: {self.output()[-3000:]}")
            time.sleep(0.02)
        return int(self._exit.read_text())

    def when(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Wait until something is so; the process must live till then."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.running, self.output()[-3000:]
            assert time.monotonic() < end, self.output()[-3000:]
            time.sleep(0.01)

    def poll(self) -> int | None:
        """The exit code, or None while it runs; as of `subprocess.Popen`, like what follows."""
        return None if self.running else int(self._exit.read_text())

    returncode = property(poll)

    def send_signal(self, number: int) -> None:
        """Send a signal, if the process still lives."""
        if self.running:
            os.kill(self.pid, number)


def launch(
    folder: Path, *arguments: str | Path, search: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``fairchem -c ARGUMENTS`` to its end; see `Run`."""
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [Path(scratch) / name for name in ("stdout", "stderr")]
        log, errors = map(str, outputs)
        run = Run(folder, *arguments, log=log, errors=errors, search=search, **environment)
        code = run.wait()
        return subprocess.CompletedProcess(arguments, code, *(path.read_text() for path in outputs))


@contextmanager
def points_in_forks() -> Iterator[None]:
    """Sweeps on this machine run their points in forks; on SLURM they have their own processes."""

    def popen(command: list[str], *, stdout: IO, **_: Any) -> Run:
        data = os.environ.get("ESCAIP_DATA", "data")
        return Run(Path.cwd(), *command[2:], log=stdout.name, ESCAIP_DATA=data)

    stand_in = SimpleNamespace(
        Popen=popen, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT
    )  # fmt: skip
    with mock.patch("escaip_fairchem.sweep.local.subprocess", stand_in):
        yield


def killed_at_random(folder: Path, config: str, took: float, kills: int) -> Iterator[int]:
    """Kill a command at random moments of the seconds that it takes; its exit codes, last 0.

    The seed is printed, for pytest to show.
    """
    seed = random.randrange(10**6)
    print("seed", seed)
    moments = random.Random(seed)
    for _ in range(kills):
        run = Run(folder, config)
        end = time.monotonic() + moments.uniform(0, took)
        while run.running and time.monotonic() < end:
            time.sleep(0.005)
        run.send_signal(9)
        yield run.wait()
    code = Run(folder, config).wait()
    assert code == 0
    yield code


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
    """Fork for each job; a fork returns its job, the server returns at the end of its input."""
    exits: dict[int, Path] = {}
    while True:
        if select.select([sys.stdin], [], [], 0.01)[0]:
            line = sys.stdin.readline()  # one at a time: each waits for its pid
            if not line:
                return None
            job = json.loads(line)
            pid = os.fork()
            if pid == 0:
                return job
            exits[pid] = Path(job["exit"])
            print(pid, flush=True)
        pid, status = os.waitpid(-1, os.WNOHANG) if exits else (0, 0)
        if pid and (path := exits.pop(pid)).parent.exists():
            written = path.with_suffix(".new")
            written.write_text(str(os.waitstatus_to_exitcode(status)))
            written.rename(path)


def _become(job: dict[str, Any]) -> None:
    outputs = [
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) for path in job["outputs"]
    ]
    for stream, file in enumerate([os.open(os.devnull, os.O_RDONLY), *outputs]):
        os.dup2(file, stream)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv = ["fairchem", "-c", *job["arguments"]]


def _be_rank(job: dict[str, Any]) -> None:
    """What torch's launcher makes of the command on each of two ranks."""
    from fairchem.core import _cli
    from fairchem.core.launchers import slurm_launch
    from omegaconf import OmegaConf

    rank = job["rank"]
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in numbers.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]))
    recipe, *overrides = job["arguments"]
    config = _cli.get_hydra_config_from_yaml(recipe, overrides)
    os.makedirs(config.job.metadata.log_dir, exist_ok=True)
    if rank == 0:
        OmegaConf.save(config, config.job.metadata.config_path)
    slurm_launch.runner_wrapper(config)


def _main() -> None:
    import numpy as np
    from fairchem.core import _cli
    from fairchem.core.datasets.samplers.max_atom_distributed_sampler import get_batches
    from fairchem.core.launchers import slurm_launch

    import escaip_fairchem.data.datasets
    import escaip_fairchem.data.loaders
    import escaip_fairchem.predict.runner
    import escaip_fairchem.train.optim
    import escaip_fairchem.train.progress
    import escaip_fairchem.train.runner
    import escaip_fairchem.train.summary
    import escaip_fairchem.train.unit  # noqa: F401
    from run_helpers import without_search

    # starts one more process that imports torch
    slurm_launch.write_environment_report = lambda *args, **kwargs: None
    for dtype in (np.int64, np.int32):  # compiled by numba
        get_batches(np.ones(2, dtype), np.arange(2), 2, 0)
    job = _serve()
    if job is None:
        return
    _become(job)
    if not job["search"]:
        _cli.get_canonical_config = without_search
    if job["rank"] is None:
        _cli.main()
    else:
        _be_rank(job)


if __name__ == "__main__":
    _main()
