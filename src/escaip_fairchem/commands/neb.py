"""The barrier between two structures with a trained model (nudged elastic band)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from escaip_fairchem.simulate.arguments import add_model, add_out, open_model

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model(parser)
    parser.add_argument("initial", metavar="INITIAL", help="first end, in any format of ASE")
    parser.add_argument("final", metavar="FINAL", help="last end, atoms in the same order")
    parser.add_argument("--images", type=int, default=5, metavar="N", help="between them (5)")
    parser.add_argument("--fmax", type=float, default=0.05, help="largest force, eV/A (0.05)")
    parser.add_argument("--steps", type=int, default=500, help="most steps, all together (500)")
    parser.add_argument(
        "--optimizer", choices=("FIRE", "BFGS", "LBFGS"), default="FIRE", help="of ASE (FIRE)"
    )
    parser.add_argument("--k", type=float, default=0.1, help="spring constant, eV/A^2 (0.1)")
    parser.add_argument("--climb", action="store_true", help="climb to the saddle point")
    parser.add_argument("--relax-ends", action="store_true", help="relax the ends before")
    add_out(parser, "neb")


def run(args: argparse.Namespace) -> None:
    """Relax the band, and print its energies."""
    from dataclasses import fields

    from escaip_fairchem.simulate.neb import NEBOptions, run_neb, table
    from escaip_fairchem.simulate.structures import read_one

    ends = [read_one(path)[1] for path in (args.initial, args.final)]
    options = NEBOptions(**{field.name: getattr(args, field.name) for field in fields(NEBOptions)})
    barrier = run_neb(open_model(args), *ends, args.out, options)
    print(table(args.out, barrier))
    print(f"neb.csv, neb.png and band.traj are in {args.out}")
