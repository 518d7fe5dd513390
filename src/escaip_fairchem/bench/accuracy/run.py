"""Train what is not trained yet, then say how it came out."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from escaip_fairchem.bench.accuracy.figure import draw
from escaip_fairchem.bench.accuracy.plan import make_plan, trainings
from escaip_fairchem.bench.accuracy.results import collect, tables, write_tables
from escaip_fairchem.errors import UserError
from escaip_fairchem.sweep.local import run_locally
from escaip_fairchem.sweep.states import BUSY, look
from escaip_fairchem.train.lock import RunLock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from escaip_fairchem.bench.accuracy.options import Options


def run(options: Options) -> None:
    """Train, print tables, and write them with the curves into the folder ``--out``.

    Trainings that have finished are left alone, those that were interrupted or failed go on.

    Args:
        options: Of the command line.

    Raises:
        UserError: Another process works in the folder, a setting does not fit, or a training
            failed; the tables are there all the same.
    """
    with RunLock(options.out, "wait for it or stop it, or give another --out"):
        sweep = make_plan(options)
        names = [training.name for training in trainings(options)]
        states = {state.name: state.state for state in look(sweep)}
        todo = [name for name in names if states[name] not in ("finished", *BUSY)]
        if len(todo) < len(names):
            print(f"{len(names) - len(todo)} of {len(names)} had finished", flush=True)
        with _threads(options.threads):
            run_locally(sweep, todo)
        found = collect(sweep)
    files = write_tables(found, options.out)
    figure = draw(found, options.out / "curves.png")
    print("\n".join([tables(found), *map(str, [*files, *([figure] if figure else [])])]))
    failed = [outcome.name for outcome in found if outcome.state != "finished"]
    if failed:
        raise UserError(
            f"{', '.join(failed)} did not finish: see {options.out / 'points'}/NAME/output.log; "
            "the same command tries again"
        )


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Threads of each training."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(number)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
