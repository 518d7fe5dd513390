"""Molecular dynamics with a trained model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from escaip_fairchem.simulate.arguments import add_model, add_out, open_model

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model(parser)
    parser.add_argument(
        "structure", metavar="FILE", help="structure in any format of ASE (the last of several)"
    )
    parser.add_argument("--ensemble", choices=("nve", "nvt", "npt"), default="nvt", help="(nvt)")
    parser.add_argument("--temperature", type=float, metavar="K", help="of momenta and thermostat")
    parser.add_argument("--timestep", type=float, default=1.0, metavar="FS", help="fs (1)")
    parser.add_argument("--steps", type=int, metavar="N", help="from the start, all together")
    parser.add_argument("--ps", type=float, metavar="PS", help="the same as a time")
    parser.add_argument("--every", type=int, default=10, metavar="N", help="steps of a frame (10)")
    parser.add_argument("--seed", type=int, default=0, help="of momenta and thermostat (0)")
    parser.add_argument(
        "--thermostat", choices=("langevin", "bussi"), default="langevin", help="nvt (langevin)"
    )
    parser.add_argument(
        "--thermostat-time", type=float, default=100.0, metavar="FS", help="its time, fs (100)"
    )
    parser.add_argument(
        "--barostat", choices=("isotropic", "full"), default="isotropic", help="npt (isotropic)"
    )
    parser.add_argument(
        "--barostat-time", type=float, default=1000.0, metavar="FS", help="its time, fs (1000)"
    )
    parser.add_argument("--pressure", type=float, default=0.0, metavar="GPA", help="npt, GPa (0)")
    parser.add_argument(
        "--save-seconds", type=float, default=30.0, metavar="S", help="what a kill loses (30)"
    )
    add_out(parser, "md")


def run(args: argparse.Namespace) -> None:
    """Simulate, and say how well energy was conserved."""
    from dataclasses import fields

    from escaip_fairchem.simulate.md import MDOptions, run_md, steps_of
    from escaip_fairchem.simulate.structures import read_one

    steps = steps_of(args.steps, args.ps, args.timestep)
    _, atoms = read_one(args.structure)
    options = MDOptions(**{field.name: getattr(args, field.name) for field in fields(MDOptions)})
    model = open_model(args)
    print(run_md(model, atoms, steps, args.out, options, save_seconds=args.save_seconds))
    print(f"trajectory.extxyz and log.csv are in {args.out}; a larger --steps goes on there")
