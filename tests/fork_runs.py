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
from typing import TYPE_CHECKING, Any
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
        folder: Where it runs; its output goes to ``log`` there, after what is in it.
        arguments: As on the command line.
        limits: Called in the process before anything else, such as `setrlimit` with its arguments.
    """

    def __init__(self, folder: Path, *arguments: str, prepare: tuple[Any, ...] = ()) -> None:
        self.folder = folder
        self.log = folder / "log"
        self._before = len(self.output()) if self.log.exists() else 0
        _serve()
        self.process = _CONTEXT.Process(target=_main, args=(str(folder), arguments, prepare))
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


def _main(folder: str, arguments: tuple[str, ...], prepare: tuple[Any, ...]) -> None:
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.environ.update(ESCAIP_DATA="data", OMP_NUM_THREADS="1")
    import torch
    from fairchem.core import _cli
    from fairchem.core.launchers import slurm_launch

    # starts one more process that imports torch
    slurm_launch.write_environment_report = lambda **_: None
    torch.set_num_threads(1)
    if prepare:
        function, *values = prepare
        function(*values)
    sys.argv = ["fairchem", "-c", *arguments]
    _cli.main()
