"""Say what a checkpoint is: model, tasks, data, training, versions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "path", type=Path, metavar="CHECKPOINT", help="inference checkpoint, or folder of a run"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, references included")


def run(args: argparse.Namespace) -> None:
    """Print the description."""
    import json

    from escaip_fairchem.describe import describe, text

    found = describe(args.path)
    print(json.dumps(found, indent=1) if args.json else text(found))
