"""Running points on this machine: each one a process of the `fairchem` command."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from escaip_fairchem.errors import UserError
from escaip_fairchem.sweep.halving import decide, reached, rungs, stop_overrides
from escaip_fairchem.sweep.states import LOCAL_LOG, log_tail, look
from escaip_fairchem.sweep.store import load_sweep
from escaip_fairchem.train.status import RunStatus, read_status, write_status

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from escaip_fairchem.sweep.store import Sweep

_LOOK_EVERY = 0.5  # s
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_locally(sweep: Sweep, names: Sequence[str]) -> None:
    """Run points, `sweep.parallel` at a time; with halving, rung by rung.

    Args:
        sweep: Its folder must be locked.
        names: Points that are to run.

    Raises:
        SystemExit: After Ctrl-C or SIGTERM, with 130; the runs have been stopped in good order.
    """
    n_rungs = len(rungs(sweep).steps) + 1 if sweep.halving else 1
    with _signals_as_interrupt():
        for rung in range(n_rungs):
            members = decide(sweep, rung) if sweep.halving else names
            _run_all(
                sweep, [n for n in members if n in names and not reached(sweep, n, rung)], rung
            )


def _run_all(sweep: Sweep, names: Sequence[str], rung: int) -> None:
    waiting, running, told = list(names), {}, set()
    try:
        while waiting or running:
            while waiting and len(running) < (sweep.parallel or 1):
                name = waiting.pop(0)
                # somebody may have cancelled it meanwhile
                if name not in load_sweep(sweep.folder).canceled:
                    running[name] = _start(sweep, name, rung)
                    print(f"{name}: started", flush=True)
            time.sleep(_LOOK_EVERY)
            for name in set(load_sweep(sweep.folder).canceled) & (running.keys() - told):
                told.add(name)
                running[name].send_signal(signal.SIGINT)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    print(_ended(sweep, name, process.returncode), flush=True)
    except KeyboardInterrupt:
        print(f"stopping {len(running)} runs; the same command continues them", flush=True)
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for process in running.values():
            process.wait()
        raise SystemExit(130) from None


def fairchem_command() -> list[str]:
    """The program `fairchem` of this environment.

    Raises:
        UserError: There is none.
    """
    beside = Path(sys.executable).with_name("fairchem")
    program = str(beside) if beside.exists() else shutil.which("fairchem")
    if program is None:
        raise UserError("there is no command `fairchem`; install fairchem-core")
    return [program]


def _start(sweep: Sweep, name: str, rung: int) -> subprocess.Popen:
    command = [*fairchem_command(), "-c", str(sweep.config(name)), *stop_overrides(sweep, rung)]
    run = sweep.run(name)
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCAL_LOG).open("a") as log:
        # a session of its own: Ctrl-C in the terminal is for the sweep, which passes it on
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def _ended(sweep: Sweep, name: str, code: int) -> str:
    status = read_status(sweep.run(name))
    if code == 0 and status.state in ("finished", "paused"):
        return f"{name}: {status.state} at step {status.step}"
    # read anew: it may have been cancelled
    state = next(it for it in look(load_sweep(sweep.folder)) if it.name == name)
    if state.state == "lost" and code > 0:  # before the run could say anything itself
        write_status(sweep.run(name), RunStatus("failed", reason=state.reason))
        state.state = "failed"
    reason = state.reason or next(iter(log_tail(sweep, state, lines=1)), "it wrote nothing")
    return f"{name}: {state.state}, exit code {code}: {reason}"


@contextmanager
def _signals_as_interrupt() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # SIGINT too: a shell script starts its background commands with that one ignored
    before = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
