"""Tasks in processes that end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import TYPE_CHECKING, Any

from escaip_fairchem.data.journal import Interrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

POLL = 0.2  # s
_shared: dict[str, Any] = {}  # of a worker: where it reports to


class Stopped(Exception):
    """Ends a task whose result nobody wants any more."""


def run_tasks(
    tasks: Sequence[tuple[Callable[..., None], tuple]],
    workers: int,
    report: Callable[[int], None],
) -> None:
    """Do tasks; the first exception stops all of them.

    Args:
        tasks: Functions and their arguments, in the order in which they are begun; a function to
            report progress to is added to the arguments.
        workers: Processes; 1 works in this one.
        report: Is told of progress.

    Raises:
        Interrupted: If a process was killed.
    """
    if workers == 1 or len(tasks) < 2:
        for function, arguments in tasks:
            function(*arguments, report)
        return
    # Not by fork: a fork of a process with threads (torch, BLAS) may hang.
    context = multiprocessing.get_context("forkserver")
    progress, stop = context.SimpleQueue(), context.Event()
    size = min(workers, len(tasks))
    with ProcessPoolExecutor(size, context, _begin, (progress, stop)) as pool:
        pending = {pool.submit(_call, *task) for task in tasks}
        try:
            while pending:
                done, pending = wait(pending, POLL, FIRST_EXCEPTION)
                while not progress.empty():
                    report(progress.get())
                for future in done:
                    future.result()
            while not progress.empty():
                report(progress.get())
        except BaseException as error:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise Interrupted(
                    "a worker was killed, perhaps for want of memory: run the same command again "
                    "to go on, with fewer --workers"
                ) from error
            raise


def _begin(progress: Any, stop: Any) -> None:
    """Prepare a worker."""
    _shared.update(progress=progress, stop=stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops it
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A killed parent can stop nobody."""
    wait_for([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _call(function: Callable[..., None], arguments: tuple) -> None:
    """Run a task in a worker, which reports in bundles and stops if nobody wants it any more."""
    held, last = 0, time.monotonic()

    def report(count: int) -> None:
        nonlocal held, last
        held += count
        if time.monotonic() - last > POLL:
            if _shared["stop"].is_set():
                raise Stopped
            _shared["progress"].put(held)
            held, last = 0, time.monotonic()

    function(*arguments, report)
    _shared["progress"].put(held)
