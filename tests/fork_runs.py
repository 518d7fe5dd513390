"""The `fairchem` command in processes forked from one that has imported everything.

A run takes 3 s in place of 15, of which 12 are imports; what it does is the same, from the command
line on. Exit codes are those of processes: negative for a signal that ended it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Callable

_CONTEXT = multiprocessing.get_context("forkserver")


def _serve() -> None:
    """Start the process that imports, once; it looks for modules where its environment says."""
    _CONTEXT.set_forkserver_preload(["fork_runs_imports"])
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths))):
        forkserver.ensure_running()


class Run:
    """A running command.

    Args:
        folder: Where it runs; the data are in ``data`` there.
        arguments: As on the command line.
        rank: Of two, that are started one by one on one port; None is alone.
        port: Free on this machine.
        log: File in the folder for the output, after what is in it.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        rank: int | None = None,
        port: int = 0,
        log: str = "log",
    ) -> None:
        self.folder = folder
        self.log = folder / f"{log}{rank or ''}"
        self._before = len(self.output()) if self.log.exists() else 0
        _serve()
        self.process = _CONTEXT.Process(target=_main, args=(str(self.log), arguments, rank, port))
        self.process.start()
        self.pid = self.process.pid

    def output(self) -> str:
        """All that was written to the log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self, timeout: float = 240) -> int:
        """The exit code."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s: {self.output()[-3000:]}")
        return self.process.exitcode

    def said(self) -> str:
        """What this process wrote, after its end."""
        return self.output()[self._before :]

    def when(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Wait until something is so; the process must live till then."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.is_alive(), self.output()[-3000:]
            assert time.monotonic() < end, self.output()[-3000:]
            time.sleep(0.01)

    def kill(self, number: int) -> None:
        """Send a signal, if the process still lives."""
        if self.process.is_alive():
            os.kill(self.pid, number)


def _main(log: str, arguments: tuple[str, ...], rank: int | None, port: int) -> None:
    os.chdir(os.path.dirname(log))
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.environ.update(ESCAIP_DATA="data", OMP_NUM_THREADS="1")
    import torch
    from fairchem.core import _cli
    from fairchem.core.launchers import slurm_launch
    from omegaconf import OmegaConf

    # starts one more process that imports torch
    slurm_launch.write_environment_report = lambda **_: None
    torch.set_num_threads(1)
    if rank is None:
        sys.argv = ["fairchem", "-c", *arguments]
        _cli.main()
        return
    # as torch's launcher does
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in numbers.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    config = _cli.get_hydra_config_from_yaml(arguments[0], list(arguments[1:]))
    os.makedirs(config.job.metadata.log_dir, exist_ok=True)
    if rank == 0:
        OmegaConf.save(config, config.job.metadata.config_path)
    slurm_launch.runner_wrapper(config)
