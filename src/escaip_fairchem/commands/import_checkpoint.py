"""Turn a checkpoint of fairchem's built-in EScAIP into one of this package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("source", type=Path, metavar="IN", help="inference checkpoint of fairchem")
    parser.add_argument("target", type=Path, metavar="OUT", help="file to write")


def run(args: argparse.Namespace) -> None:
    """Convert the checkpoint."""
    from escaip_fairchem.checkpoint import import_checkpoint

    import_checkpoint(args.source, args.target)
    print(f"wrote {args.target}")
