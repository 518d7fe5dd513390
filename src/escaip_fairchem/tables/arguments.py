"""The options of the tables under ``escaip bench``; imports the standard library only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_to(commands: argparse._SubParsersAction) -> None:
    """Declare a subcommand for each table."""
    for declare in (_equivariance, _scaling, _ablation, _parameters, _tradeoff, _domains):
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


def _tradeoff(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands, "tradeoff", _make_tradeoff,
        "errors against speed and memory of inference", "tradeoff.csv",
    )  # fmt: skip
    command.add_argument(
        "runs", nargs="+", metavar="RUN", help="checkpoint, run, or folder of a sweep"
    )
    command.add_argument("--data", required=True, help="labelled data set, or file that ASE reads")
    command.add_argument("--number", type=int, default=100, metavar="N", help="structures (100)")
    command.add_argument("--batch-size", type=int, default=8, metavar="N", help="that is timed (8)")
    command.add_argument("--repeats", type=int, default=5, metavar="N", help="turns (5)")
    command.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (1)")
    command.add_argument("--seed", type=int, default=0, help="of the structures (0)")
    command.add_argument("--device", choices=["cpu", "cuda"], help="(cuda if there is one)")
    command.add_argument("--task", help="data set of the checkpoints, if they know several")
    command.add_argument(
        "--published", action="store_true", help="add published errors on OC20 2M, val-ID"
    )


def _make_tradeoff(args: argparse.Namespace) -> None:
    from escaip_fairchem.tables import tradeoff

    tradeoff.run(
        args.runs, args.data, args.out,
        number=args.number, batch_size=args.batch_size, repeats=args.repeats,
        threads=args.threads, seed=args.seed, device=args.device, task=args.task,
        published=args.published,
    )  # fmt: skip


def _domains(commands: argparse._SubParsersAction) -> None:
    command = _command(
        commands, "domains", _make_domains,
        "one table of predictions for several domains", "domains.csv",
    )  # fmt: skip
    command.add_argument("dir", type=Path, metavar="DIR", help="of configs/oc20/evaluate_domains")
    command.add_argument("--all-atoms", action="store_true", help="forces on fixed ones too")


def _make_domains(args: argparse.Namespace) -> None:
    from escaip_fairchem.tables import domains

    domains.run(args.dir, args.out, free_atoms_only=not args.all_atoms)
