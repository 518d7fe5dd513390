"""Check a file for a leaderboard, or write the model card."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
The files are written by the recipes configs/oc20/leaderboard_*.yml and
configs/oc22/leaderboard_s2ef_total.yml; docs/leaderboard.md explains them. `check` ends with exit
code 1 if there is a problem. Nothing is ever sent anywhere.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    check = actions.add_parser("check", help="check a file", description="Check a file.")
    check.set_defaults(action=_check)
    check.add_argument("file", type=Path, metavar="FILE", help="a .npz of all test splits")
    check.add_argument(
        "--dataset",
        nargs="+",
        default=[],
        metavar="DIR",
        help="test data: a folder of folders SPLIT or test_SPLIT, or SPLIT=PATH for each",
    )
    check.add_argument(
        "--board", metavar="NAME", help="oc20_s2ef, oc20_is2re or oc22_s2ef_total (by the arrays)"
    )
    check.add_argument(
        "--atoms", choices=("all", "free"), default="all", help="whose forces it has (all)"
    )
    check.add_argument(
        "--any-order", action="store_true", help="accept another order than that of the data"
    )
    check.add_argument("--max-gib", type=float, metavar="GIB", help="largest size of the file")

    card = actions.add_parser(
        "card",
        help="write a model card",
        description="Write a model card for the Hugging Face Hub.",
    )
    card.set_defaults(action=_card)
    card.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="inference checkpoint or folder of a run",
    )
    card.add_argument(
        "--metrics",
        type=Path,
        action="append",
        default=[],
        metavar="JSON",
        help="metrics.json of an evaluation; may be given several times",
    )
    card.add_argument("--name", required=True, metavar="NAME", help="name of the model")
    card.add_argument("--license", required=True, metavar="ID", help="such as mit or cc-by-4.0")
    card.add_argument("--authors", metavar="TEXT", help="who trained it")
    card.add_argument(
        "--repository", metavar="USER/NAME", help="on the Hub, for the commands (USER/NAME)"
    )
    card.add_argument(
        "--out", type=Path, default=Path("card"), metavar="DIR", help="folder to upload (card)"
    )


def run(args: argparse.Namespace) -> None:
    """Carry out the action."""
    args.action(args)


def _check(args: argparse.Namespace) -> None:
    from escaip_fairchem.submission.boards import find_board
    from escaip_fairchem.submission.check import Expectations, check

    board = find_board(args.board) if args.board else None
    expected = Expectations(board, args.dataset, args.atoms, args.any_order, args.max_gib)
    report = check(args.file, expected)
    print(report)
    if report.problems:
        raise SystemExit(1)


def _card(args: argparse.Namespace) -> None:
    from escaip_fairchem.submission.card import CardOptions, write_card

    options = CardOptions(args.name, args.license, args.authors, args.repository)
    for line in write_card(args.checkpoint, args.metrics, args.out, options):
        print(line)
