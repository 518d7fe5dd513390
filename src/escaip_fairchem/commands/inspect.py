"""Say and draw what is in a data set, and whether it fits a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
DATA is a folder that `escaip convert` made, a folder of ASE-LMDB files, or files that ASE reads.
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
    parser.add_argument("--energy-key", metavar="KEY", help="info key of the energy, eV")
    parser.add_argument("--forces-key", metavar="KEY", help="arrays key of the forces, eV/A")
    parser.add_argument("--stress-key", metavar="KEY", help="info key of the stress, eV/A^3")


def run(args: argparse.Namespace) -> None:
    """Print the report and write the figure."""
    from escaip_fairchem.data.frames import LabelKeys
    from escaip_fairchem.data.inspection import inspect_data

    name = Path(args.data[0]).resolve().name.partition(".")[0]
    for line in inspect_data(
        args.data,
        recipe=args.recipe,
        sample=args.sample,
        cutoff=args.cutoff,
        max_neighbors=args.max_neighbors,
        plot=args.plot or Path(f"inspect_{name}.png"),
        keys=LabelKeys(args.energy_key, args.forces_key, args.stress_key),
        workers=args.workers,
    ):
        print(line)
