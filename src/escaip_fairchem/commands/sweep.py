"""Run many variants of a recipe, locally or on SLURM, and look at them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

EPILOG = """\
`escaip sweep CONFIG SWEEP.yml` is short for `escaip sweep run CONFIG SWEEP.yml`. The same command
again continues what is unfinished and leaves alone what is done or under way. docs/sweeps.md
explains the sweep file.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    run_parser = _action(actions, "run", _run, "compose and check all points, then run them")
    run_parser.add_argument("config", type=Path, metavar="CONFIG", help="recipe")
    run_parser.add_argument("sweep", type=Path, metavar="SWEEP.yml", help="sweep file")
    run_parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="for all points, as for fairchem"
    )
    run_parser.add_argument("--dir", type=Path, help="of the sweep (runs/NAME_OF_SWEEP_FILE)")
    run_parser.add_argument(
        "--dry-run", action="store_true", help="print the points and the cost, start nothing"
    )

    status = _action(actions, "status", _status, "how the points stand, and why some failed")
    _add_folder(status)
    status.add_argument("--watch", action="store_true", help="again every 5 s until all have ended")
    for name, function, text in (
        ("retry", _retry, "start failed and cancelled points anew"),
        ("cancel", _cancel, "stop points, and leave them alone until `retry`"),
    ):
        action = _action(actions, name, function, text)
        _add_folder(action)
        action.add_argument("names", nargs="*", metavar="NAME", help="points (all)")

    best = _action(actions, "best", _best, "best points: overrides and checkpoint")
    _add_folder(best)
    best.add_argument("--metric", metavar="COLUMN", help="of metrics.csv (val_forces_mae)")
    best.add_argument("-n", type=int, default=1, metavar="N", help="how many (1)")

    results = _action(actions, "results", _results, "all points and their metrics as CSV")
    _add_folder(results)
    results.add_argument("--csv", type=Path, metavar="FILE", help="(DIR/results.csv)")

    plot = _action(actions, "plot", _plot, "draw learning curves, and a metric by override")
    _add_folder(plot)
    plot.add_argument("--metric", metavar="COLUMN", help="of metrics.csv (val_forces_mae)")


def _action(actions: argparse._SubParsersAction, name: str, function, text: str):
    parser = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(action=function)
    return parser


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=Path, metavar="DIR", help="folder of the sweep")


def with_action(argv: Sequence[str]) -> list[str]:
    """Put in the action ``run`` where none is given, and options behind all other words.

    Args:
        argv: Arguments of the program, of any subcommand.
    """
    argv = list(argv)
    if argv[:1] != ["sweep"] or len(argv) < 2:
        return argv
    actions = ("run", "status", "retry", "cancel", "best", "results", "plot")
    if argv[1] not in (*actions, "-h", "--help"):
        argv.insert(1, "run")
    if argv[1] != "run":
        return argv
    # argparse takes positional arguments only while they stand together
    words: list[str] = []
    options: list[str] = []
    for word, before in zip(argv[2:], argv[1:], strict=False):
        (options if word.startswith("-") or before == "--dir" else words).append(word)
    return ["sweep", "run", *words, *options]


def run(args: argparse.Namespace) -> None:
    """Carry out the action."""
    args.action(args)


def _run(args: argparse.Namespace) -> None:
    from escaip_fairchem.sweep.run import start

    folder = args.dir or Path("runs") / args.sweep.stem
    start(args.config, args.sweep, folder, args.overrides, dry_run=args.dry_run)


def _status(args: argparse.Namespace) -> None:
    from escaip_fairchem.sweep.store import load_sweep
    from escaip_fairchem.sweep.table import status_lines, watch

    if args.watch:
        watch(args.dir)
    else:
        print("\n".join(status_lines(load_sweep(args.dir))))


def _retry(args: argparse.Namespace) -> None:
    from escaip_fairchem.sweep.run import retry

    retry(args.dir, args.names)


def _cancel(args: argparse.Namespace) -> None:
    from escaip_fairchem.sweep.run import cancel

    cancel(args.dir, args.names)


def _best(args: argparse.Namespace) -> None:
    from escaip_fairchem.sweep.store import load_sweep
    from escaip_fairchem.sweep.table import best

    print("\n".join(best(load_sweep(args.dir), args.metric, args.n)))


def _results(args: argparse.Namespace) -> None:
    from escaip_fairchem.sweep.store import load_sweep
    from escaip_fairchem.sweep.table import write_results

    path = args.csv or args.dir / "results.csv"
    write_results(load_sweep(args.dir), path)
    print(path)


def _plot(args: argparse.Namespace) -> None:
    from escaip_fairchem.sweep.plot import draw
    from escaip_fairchem.sweep.store import load_sweep

    for path in draw(load_sweep(args.dir), args.metric):
        print(path)
