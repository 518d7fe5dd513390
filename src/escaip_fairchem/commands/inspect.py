"""Say and draw what is in a data set, and whether it fits a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from escaip_fairchem.data.arguments import add_source, options_of

EPILOG = """\
DATA is a folder that `escaip convert` made, or what it reads.
With a recipe, what it assumes is compared with the data; further words are overrides as on
fairchem's command line: `--recipe configs/oc20/escaip_2m.yml dataset=mine max_atoms=400`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("data", nargs="+", metavar="DATA", help="folder, files or patterns")
    parser.add_argument(
        "--recipe", nargs="+", metavar=("FILE", "KEY=VALUE"), help="recipe to compare with"
    )
    parser.add_argument(
        "--sample", type=int, default=0, metavar="N", help="look at about N, evenly spaced (all)"
    )
    parser.add_argument("--cutoff", type=float, default=6.0, help="A, without a recipe (6)")
    parser.add_argument(
        "--max-neighbors", type=int, default=30, metavar="K", help="without a recipe (30)"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="figure (inspect_NAME.png)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (1)")
    add_source(parser)


def run(args: argparse.Namespace) -> None:
    """Print the report and write the figure."""
    from escaip_fairchem.data.inspection import inspect_data

    name = Path(args.data[0]).resolve().name.partition(".")[0]
    for line in inspect_data(
        args.data,
        recipe=args.recipe,
        sample=args.sample,
        cutoff=args.cutoff,
        max_neighbors=args.max_neighbors,
        plot=args.plot or Path(f"inspect_{name}.png"),
        format_name=args.format,
        options=options_of(args),
        workers=args.workers,
    ):
        print(line)
