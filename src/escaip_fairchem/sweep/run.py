"""The whole of `escaip sweep CONFIG SWEEP.yml`, `retry` and `cancel`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from typing import TYPE_CHECKING

from escaip_fairchem.errors import UserError
from escaip_fairchem.sweep.cost import cost_lines
from escaip_fairchem.sweep.local import run_locally
from escaip_fairchem.sweep.plan import make_plan, store
from escaip_fairchem.sweep.states import BUSY, SETTLED, look, open_jobs
from escaip_fairchem.sweep.store import load_sweep, select
from escaip_fairchem.sweep.submit import submit
from escaip_fairchem.sweep.table import plan_table, status_lines
from escaip_fairchem.train.lock import RunLock, holder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from escaip_fairchem.sweep.plan import Plan
    from escaip_fairchem.sweep.store import Sweep


def start(
    recipe: Path,
    sweep_file: Path,
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    dry_run: bool = False,
) -> None:
    """Compose and check all points, then run those that are neither done nor being done.

    Args:
        recipe: A recipe of fairchem's command.
        sweep_file: The sweep file.
        folder: Folder of the sweep; made if it does not exist.
        overrides: For all points, as on fairchem's command line.
        dry_run: Only say what would be done.

    Raises:
        UserError: A mistake in any point; nothing was started then. Or points that failed.
    """
    if dry_run:
        plan = make_plan(recipe, sweep_file, folder, overrides)
        print("\n".join([_composed(plan), *plan_table(plan), *cost_lines(plan)]))
        return
    with RunLock(folder, "wait for it or stop it, or give another --dir"):
        plan = make_plan(recipe, sweep_file, folder, overrides)
        print(_composed(plan), flush=True)
        store(plan, recipe, sweep_file)
        _carry_on(plan.sweep, list(plan.configs))


def retry(folder: Path, names: list[str]) -> None:
    """Start failed and cancelled points anew, from their newest checkpoints.

    Args:
        folder: Of the sweep.
        names: Of points; all that failed or were cancelled by default.

    Raises:
        UserError: No such sweep or point, or nothing to start.
    """
    load_sweep(folder)
    with RunLock(folder, "wait for it or stop it"):
        sweep = load_sweep(folder)
        chosen = select(sweep, names)
        states = {state.name: state for state in look(sweep)}
        again = [name for name in chosen if states[name].state in ("failed", "canceled")]
        if not again:
            raise UserError(
                "none of these points failed or was cancelled, so there is nothing to retry"
            )
        for name in again:
            if states[name].state == "failed":
                print(f"{name}: had failed: {states[name].reason}")
        sweep.save_canceled(set(sweep.canceled).difference(again))
        _carry_on(sweep, again, settled=("finished", "eliminated"))


def cancel(folder: Path, names: list[str]) -> None:
    """Stop points, waiting ones and running ones; the sweep leaves them alone until `retry`.

    Args:
        folder: Of the sweep.
        names: Of points; all by default.

    Raises:
        UserError: No such sweep or point.
    """
    sweep = load_sweep(folder)
    chosen = set(select(sweep, names))
    states = [state for state in look(sweep) if state.name in chosen]
    left = [state.name for state in states if state.state not in SETTLED]
    sweep = load_sweep(folder)  # jobs may have been submitted during the look
    sweep.save_canceled({*sweep.canceled, *left})
    ended = len(states) - len(left)
    print(f"cancelled {len(left)} points" + (f"; {ended} had ended before" if ended else ""))
    owner = holder(folder)
    if owner and not sweep.slurm:  # the sweep's own process stops its runs
        if not names and owner["host"] == socket.gethostname():
            os.kill(owner["pid"], signal.SIGINT)
        print(f"told process {owner['pid']} on {owner['host']} to stop them")
        return
    jobs = open_jobs(sweep) if sweep.slurm else set()
    wanted = jobs if not names else {s.job for s in states if s.state in BUSY} & jobs
    if wanted:
        subprocess.run(["scancel", *sorted(wanted)], check=False)
        print(f"cancelled {len(wanted)} jobs")
    for state in states:
        here = state.status.host == socket.gethostname()
        if not sweep.slurm and state.state == "running" and here:
            os.kill(state.status.pid, signal.SIGINT)
            print(f"told {state.name} to stop")


def _composed(plan: Plan) -> str:
    n_points = len(plan.configs)
    return f"{n_points} points composed and checked in {plan.seconds:.1f} s, {len(plan.new)} new"


def _carry_on(sweep: Sweep, names: Sequence[str], settled: Sequence[str] = SETTLED) -> None:
    """Run those points that need it, and say what became of the others."""
    states = [state for state in look(sweep) if state.name in set(names)]
    todo = [state.name for state in states if state.state not in (*BUSY, *settled)]
    counts: dict[str, int] = {}
    for state in states:
        if state.name not in todo:
            counts[state.state] = counts.get(state.state, 0) + 1
    if counts:
        print("left alone: " + ", ".join(f"{n} {state}" for state, n in counts.items()), flush=True)
    if "failed" in counts:
        print(f"start the failed ones anew by `escaip sweep retry {sweep.folder}`")
    if not todo:
        return
    if sweep.slurm:
        print("\n".join(submit(sweep, todo)))
        print(f"escaip sweep status {sweep.folder}")
        return
    run_locally(sweep, todo)
    sweep = load_sweep(sweep.folder)  # points may have been cancelled
    print("\n".join(status_lines(sweep)))
    good = ("finished", "eliminated", "canceled")
    bad = [state for state in look(sweep) if state.name in todo and state.state not in good]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(todo)} points did not finish; `escaip sweep retry {sweep.folder}` "
            "starts failed ones anew"
        )
