"""Adsorption energies with a trained model."""

from __future__ import annotations

import argparse

from escaip_fairchem.simulate.arguments import (
    add_model,
    add_out,
    add_relaxation,
    open_model,
    relaxation_options,
)

EPILOG = """\
A model of total energies (one with element references) needs the slab and the gas:
  E_ads = E(adslab) - E(slab) - sum of N x E(gas)
The slab is the structure without its atoms of tag 2 if --slab is not given. A model that was
trained on OC20's adsorption energies gives E_ads by itself.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model(parser)
    parser.add_argument(
        "adslabs", nargs="+", metavar="ADSLAB", help="adsorbate on slab, in any format of ASE"
    )
    parser.add_argument("--slab", metavar="FILE", help="the slab alone (by tags)")
    parser.add_argument(
        "--gas",
        action="append",
        default=[],
        metavar="FILE[*N]",
        help="molecule of the gas reference, and how many; may be given several times",
    )
    parser.add_argument(
        "--relax", choices=("all", "adslab", "none"), default="all", help="what is relaxed (all)"
    )
    parser.add_argument(
        "--energies",
        choices=("total", "adsorption"),
        help="what the model predicts (by its element references)",
    )
    add_relaxation(parser, fmax=0.05, steps=300)
    add_out(parser, "adsorption")


def run(args: argparse.Namespace) -> None:
    """Relax what is asked for, and print the terms."""
    from escaip_fairchem.simulate.adsorption import Gas, adsorption, table
    from escaip_fairchem.simulate.relax import RelaxOptions
    from escaip_fairchem.simulate.structures import read_one, read_structures

    adslabs = read_structures(args.adslabs)
    slab = read_one(args.slab)[1] if args.slab else None
    gas = [Gas.read(term) for term in args.gas]
    results = adsorption(
        open_model(args),
        adslabs,
        slab,
        gas,
        args.out,
        RelaxOptions(**relaxation_options(args)),
        relax=args.relax,
        energies=args.energies,
    )
    print(table(results, gas))
    print(f"adsorption.csv and the relaxations are in {args.out}")
