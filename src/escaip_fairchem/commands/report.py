"""Compare runs on one HTML page: settings, learning curves, metrics, parity, speed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="RUN",
        help="folder of a run, a sweep, an evaluation, or of several of these",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="(report.html)"
    )
    parser.add_argument(
        "--plot", action="store_true",
        help="first evaluate runs that have no parity figure, as `escaip plot` does",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Write the page, name it, and what is damaged."""
    import sys

    from escaip_fairchem.report.page import all_problems, write_report

    found = write_report(args.folders, args.out, plot=args.plot)
    for problem in all_problems(found):
        print(f"escaip: damaged: {problem}", file=sys.stderr)
    parts = {"run": len(found.runs), "evaluation": len(found.evaluations)}
    what = ", ".join(f"{n} {name}{'s'[: n != 1]}" for name, n in parts.items() if n)
    print(f"{args.out} ({what}; {args.out.stat().st_size / 1e6:.2f} MB)")
