"""Progress of something long: a bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from tqdm import tqdm

_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
BAR_SECONDS = 0.5  # between updates of the bar; each reads the loss, which waits for the GPU
LINE_SECONDS = 30.0


def open_display(
    what: str, total: int | None, done: int, seconds: float = LINE_SECONDS, *, below: bool = False
) -> Bar | Lines:
    """A bar where stderr is a terminal, else lines.

    Args:
        what: Words before the numbers.
        total: How much there is to do, if that is known.
        done: How much of it was done before.
        seconds: Least time between lines.
        below: Whether a bar stands below another one for a while.
    """
    if sys.stderr.isatty():
        return Bar(what, total, done, below=below)
    return Lines(what, total, done, seconds)


class Bar:
    """A bar of tqdm on stderr, or one that stands below another for a while."""

    def __init__(self, what: str, total: int | None, done: int, *, below: bool = False) -> None:
        # smoothing 0: the remaining time follows from the mean over everything so far
        self._bar = tqdm(
            desc=what, total=total, initial=done, bar_format=_BAR, smoothing=0, **_width(),
            position=int(below), leave=not below, file=sys.stderr,
        )  # fmt: skip
        self._shown = 0.0

    def due(self) -> bool:
        """Whether it is time to show something."""
        return time.monotonic() - self._shown >= BAR_SECONDS

    def show(self, done: int, note: str) -> None:
        """Show how much is done, and a note."""
        self._shown = time.monotonic()
        self._bar.n = done
        self._bar.set_postfix_str(note)  # draws, too

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.close()


class Lines:
    """Lines on stdout, at least `seconds` and at least a fiftieth of the time so far apart."""

    def __init__(self, what: str, total: int | None, done: int, seconds: float) -> None:
        self._what, self._total, self._initial, self._seconds = what, total, done, seconds
        self._start = self._shown = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to show something."""
        now = time.monotonic()
        return now - self._shown >= max(self._seconds, (now - self._start) / 50)

    def show(self, done: int, note: str) -> None:
        """Show how much is done, and a note."""
        self._shown = time.monotonic()
        passed = self._shown - self._start
        text = f"{self._what}: {done}"
        if self._total:
            new = done - self._initial
            left = passed * (self._total - done) / new if new else float("nan")
            text += f"/{self._total} ({done / self._total:.0%})"
            note = f"{_interval(left)} left, {note}" if new else note
        print(f"{text}, {_interval(passed)} passed, {note}".rstrip(", "), flush=True)

    def close(self) -> None:
        """Nothing to close: lines stay."""


def _width() -> dict[str, Any]:
    """Follow the width of the terminal; some report 0, in which tqdm would show nothing."""
    known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    return {"dynamic_ncols": True} if known else {"ncols": 100}


def _interval(seconds: float) -> str:
    return tqdm.format_interval(round(seconds))
