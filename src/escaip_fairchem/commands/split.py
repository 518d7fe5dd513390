"""Split a converted data set anew, and report what the sides share."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
DATA is a folder that `escaip convert` made; its train and val are merged and shared out again into
OUT/train, OUT/val and, with three ratios, OUT/test. Rows are copied as they are. Element references
and scales are fitted to the new train.

--by formula      whole compositions      --by sid     whole systems (any info key)
--by geometry     equal geometries stay together
--ordered fid     the last frames of each system are held out (--within KEY for another one)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of `escaip convert`")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.9, 0.1], metavar="X",
        help="parts of train, val (and test) (0.9 0.1)",
    )  # fmt: skip
    parser.add_argument("--by", metavar="KEY", help="what goes to one side as a whole")
    parser.add_argument("--ordered", metavar="KEY", help="info key of time, such as fid")
    parser.add_argument(
        "--within", default="sid", metavar="KEY", help="trajectory, for --ordered (sid)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    parser.add_argument("--name", help="name for dataset=NAME (the name of OUT)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (1)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> None:
    """Split and say what the sides share."""
    from escaip_fairchem.data.resplit import Rule, resplit

    rule = Rule(tuple(args.ratios), args.by, args.ordered, args.within, args.seed)
    for line in resplit(
        args.data,
        args.out,
        rule,
        name=args.name,
        workers=args.workers,
        overwrite=args.overwrite,
    ):
        print(line)
