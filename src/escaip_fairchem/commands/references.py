"""Fit element references, force, energy and stress scales to a data set."""

from __future__ import annotations

import argparse
from pathlib import Path

from escaip_fairchem.data.arguments import add_source, options_of

EPILOG = """\
DATA is a folder that `escaip convert` made (its train part is used), or what it reads. Energies of
elements are fitted by least squares over compositions, in float64. `--isolated
H=-13.587,C=-1029.49`, or a YAML file of such pairs, sets elements, and the others are fitted to
what is left.

--name NAME writes $ESCAIP_DATA/configs/element_refs/NAME.yaml, for `element_refs=NAME` with any
data (in place of references that the data brings), and of a folder of `escaip convert` also
$ESCAIP_DATA/configs/dataset/NAME.yaml, for `dataset=NAME`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("data", nargs="+", metavar="DATA", help="folder, files or patterns")
    parser.add_argument("--isolated", metavar="X", help="energies of elements that are not fitted")
    parser.add_argument("--name", help="write group files of this name")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the element_refs group here"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (1)")
    add_source(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


def run(args: argparse.Namespace) -> None:
    """Fit, print, and write what is asked for."""
    from escaip_fairchem.data.groups import fit_references

    for line in fit_references(
        args.data,
        isolated=args.isolated,
        name=args.name,
        out=args.out,
        format_name=args.format,
        options=options_of(args),
        workers=args.workers,
        overwrite=args.overwrite,
    ):
        print(line)
