"""The options of the tables under ``escaip bench``; imports the standard library only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_to(commands: argparse._SubParsersAction) -> None:
    """Declare a subcommand for each table."""
    for declare in (_equivariance, _scaling, _ablation, _parameters):
        declare(commands)


def _command(commands, name: str, make, text: str, out: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(make=make)
    command.add_argument(
        "--out", type=Path, default=Path(out), metavar="FILE.csv",
        help=f"table; the figure gets .png ({out})",
    )  # fmt: skip
    return command


def _equivariance(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands, "equivariance", _make_equivariance,
        "forces of rotated structures beside rotated forces", "equivariance.csv",
    )  # fmt: skip
    command.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="or folder of a run")
    command.add_argument("--data", required=True, help="data set, or file that ASE reads")
    command.add_argument("--batches", type=int, default=10, metavar="N", help="of 2 (10)")
    command.add_argument("--rotations", type=int, default=32, metavar="N", help="of each (32)")
    command.add_argument("--axis", choices=["any", "x", "y", "z"], default="any", help="(any)")
    command.add_argument("--seed", type=int, default=0, help="of structures and rotations (0)")
    command.add_argument("--all-atoms", action="store_true", help="fixed ones too")
    command.add_argument("--no-pbc", action="store_true", help="as molecules")
    command.add_argument("--double", action="store_true", help="compute in float64")
    command.add_argument("--device", choices=["cpu", "cuda"], help="(cuda if there is one)")
    command.add_argument("--task", help="data set of the checkpoint, if it knows several")


def _make_equivariance(args: argparse.Namespace) -> None:
    from escaip_fairchem.tables import equivariance

    equivariance.run(
        args.checkpoints, args.data, args.out,
        batches=args.batches, n_rotations=args.rotations, axis=args.axis, seed=args.seed,
        all_atoms=args.all_atoms, no_pbc=args.no_pbc, double=args.double, device=args.device,
        task=args.task,
    )  # fmt: skip


def _scaling(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands, "scaling", _make_scaling,
        "errors of a sweep against data and model size, with power laws", "scaling.csv",
    )  # fmt: skip
    command.add_argument("dir", type=Path, metavar="DIR", help="folder of the sweep")


def _make_scaling(args: argparse.Namespace) -> None:
    from escaip_fairchem.tables import scaling

    scaling.run(args.dir, args.out)


def _ablation(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands, "ablation", _make_ablation,
        "errors of a sweep over variants that are equally large", "ablation.csv",
    )  # fmt: skip
    command.add_argument("dir", type=Path, metavar="DIR", help="folder of the sweep")
    command.add_argument(
        "--within", type=float, default=2.0, metavar="PERCENT", help="of the parameters (2)"
    )


def _make_ablation(args: argparse.Namespace) -> None:
    from escaip_fairchem.tables import ablation

    ablation.run(args.dir, args.out, within=args.within)


def _parameters(commands: argparse._SubParsersAction) -> None:
    text = "parameters of the variants of a sweep file, before anything is trained"
    command = commands.add_parser("parameters", help=text, description=f"Count {text}.")
    command.set_defaults(make=_make_parameters)
    command.add_argument("config", type=Path, metavar="CONFIG", help="recipe")
    command.add_argument("sweep", type=Path, metavar="SWEEP.yml", help="sweep file")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for all points")
    command.add_argument(
        "--within", type=float, metavar="PERCENT", help="fail if they differ by more"
    )


def _make_parameters(args: argparse.Namespace) -> None:
    from escaip_fairchem.tables import ablation

    ablation.count(args.config, args.sweep, args.overrides, within=args.within)
