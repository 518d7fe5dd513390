"""Plot a training run: learning curve, parity, errors by element."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="folder of the run")


def run(args: argparse.Namespace) -> None:
    """Draw the figures, write the table, and name the files."""
    from escaip_fairchem.train.plot import plot_run

    for path in plot_run(args.run_dir):
        print(path)
