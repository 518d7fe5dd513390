"""Relax structures with a trained model, many at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from escaip_fairchem.simulate.arguments import (
    add_model,
    add_out,
    add_relaxation,
    open_model,
    relaxation_options,
)

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model(parser)
    parser.add_argument(
        "structures",
        nargs="+",
        metavar="FILE",
        help="structures in any format of ASE; FILE@INDEX takes a part of a file",
    )
    add_relaxation(parser, fmax=0.05, steps=500)
    parser.add_argument("--cell", action="store_true", help="relax the cells, too (needs stress)")
    add_out(parser, "relaxed")


def run(args: argparse.Namespace) -> None:
    """Relax them, and print a table."""
    from escaip_fairchem.simulate.relax import RelaxOptions, relax_structures, table
    from escaip_fairchem.simulate.structures import read_structures

    structures = read_structures(args.structures)
    options = RelaxOptions(cell=args.cell, **relaxation_options(args))
    records, _ = relax_structures(open_model(args), structures, args.out, options)
    print(table(records))
    print(f"table, ends and trajectories are in {args.out}")
