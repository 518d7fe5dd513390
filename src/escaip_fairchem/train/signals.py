"""Signals that end a run in good order: noted when they come, acted on between two steps.

Batch systems ask a job to end by SIGUSR2 (submitit: preemption and time limits) or SIGTERM (SLURM:
requeue, cancellation, shutdown of a node); people by Ctrl-C, and a terminal that closes by SIGHUP.
A checkpoint takes all ranks, and they get their signals at different moments, or not at all, so
they first agree; see `TrainEvalUnit`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import stat
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

#: How often submitit requeues a job that reached its time limit without progress; as fairchem.
TIMEOUTS = 3
#: torch's launcher passes a Ctrl-C of the terminal on to processes that have it already.
ECHO_SECONDS = 1.0
#: How long the other ranks wait for SLURM to end them after a requeue.
REQUEUE_SECONDS = 300


class Stop(Exception):
    """Ends a training between two steps; the checkpoint is written.

    Args:
        state: ``paused`` or ``interrupted``, as in status.json.
        number: The signal, if one is the reason.
    """

    def __init__(self, state: str, number: int | None = None) -> None:
        self.number = number
        name = signal.Signals(number).name if number is not None else "stop_at_step"
        super().__init__(name)
        self.state = state


class Signals:
    """Notes signals while it is installed.

    Attributes:
        kinds: The signals, those that decide first.
    """

    def __init__(self) -> None:
        requeue = os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")
        self.requeue = getattr(signal, f"SIG{requeue}", signal.SIGUSR2)
        self.kinds: tuple[int, ...] = (
            self.requeue, signal.SIGTERM, signal.SIGHUP, signal.SIGINT
        )  # fmt: skip
        self._came = dict.fromkeys(self.kinds, False)
        self._before: dict[int, Any] = {}
        self._interrupted = 0.0

    def install(self) -> None:
        """Take the signals over; fairchem and submitit set handlers of their own, at any time."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self.kinds:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            before = signal.signal(number, self._note)
            self._before.setdefault(number, before)

    def remove(self) -> None:
        """Set the handlers that were there before."""
        for number, before in self._before.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)
        self._before = {}

    def flags(self) -> list[float]:
        """1 for each of `kinds` that came, else 0: what the ranks add up."""
        return [float(self._came[number]) for number in self.kinds]

    def decided(self, flags: Sequence[float] | None) -> int | None:
        """The signal to obey.

        Args:
            flags: `flags` added up over ranks.
        """
        if flags is None:
            return None
        return next((n for n, flag in zip(self.kinds, flags, strict=True) if flag > 0), None)

    def came(self) -> bool:
        """Whether this process got one."""
        return any(self._came.values())

    def requeue_handler(self) -> Callable[[int, FrameType | None], None] | None:
        """Of submitit, if this is one of its jobs: requeues the job and ends the process."""
        handler = self._before.get(self.requeue)
        owner = getattr(handler, "__self__", None)
        return handler if hasattr(owner, "checkpoint_and_try_requeue") else None

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._came[number] = True
        if number == signal.SIGHUP:
            _leave_terminal()
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted and now - self._interrupted > ECHO_SECONDS:
            raise KeyboardInterrupt
        if not self._interrupted:
            # print() may not be entered a second time by a handler
            os.write(2, b"stopping after this step; Ctrl-C again stops at once\n")
            self._interrupted = now


def _leave_terminal() -> None:
    """Write no more to a terminal that is gone, nor to pipes into what ended with it: both fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # it may be closed
            if not stat.S_ISREG(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)
    os.close(nowhere)


def requeue(handler: Any, number: int, *, rank: int, progress: bool) -> None:
    """Have submitit requeue this job; returns only if it cannot.

    Args:
        handler: Of submitit; see `Signals.requeue_handler`.
        number: The signal.
        rank: This rank; the first one requeues, the others wait for SLURM to end them, since the
            end of one might end them all.
        progress: Whether steps were done since the job started. A job without is requeued after
            its time limit only so often as fairchem tells submitit.

    Raises:
        submitit.core.utils.UncompletedJobError: The job reached its time limit too often.
    """
    if rank == 0:
        if progress:
            handler.__self__._delayed._timeout_countdown = TIMEOUTS
        handler(number, None)
    logging.info("waiting for SLURM to requeue the job")
    time.sleep(REQUEUE_SECONDS)
