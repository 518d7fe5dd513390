"""Options that the commands of simulations share; imports the standard library only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from escaip_fairchem.simulate.model import Model


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declare the checkpoint, how it is evaluated, and the folder of the results."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="inference checkpoint or folder of a run",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--task", metavar="NAME", help="data set of the checkpoint, if it has more")
    model.add_argument("--device", choices=("cpu", "cuda"), help="(a GPU if there is one)")
    model.add_argument("--float64", action="store_true", help="evaluate in double precision")
    model.add_argument(
        "--remove-net-force", action="store_true", help="subtract the mean force from each"
    )
    model.add_argument("--d3", metavar="FUNCTIONAL", help="add DFT-D3(BJ), such as pbe")
    model.add_argument(
        "--compile",
        nargs="?",
        const=True,
        default=False,
        choices=(True, "cuda-graphs"),
        metavar="cuda-graphs",
        help="compile the model, for long simulations on a GPU; cuda-graphs: of few atoms",
    )


def add_out(parser: argparse.ArgumentParser, default: str) -> None:
    """Declare the folder of the results."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(default),
        metavar="DIR",
        help=f"folder of the results; the same command goes on there after a stop ({default})",
    )


def add_relaxation(parser: argparse.ArgumentParser, *, fmax: float, steps: int) -> None:
    """Declare how structures are relaxed."""
    parser.add_argument(
        "--fmax", type=float, default=fmax, help=f"largest force at the end, eV/A ({fmax})"
    )
    parser.add_argument("--steps", type=int, default=steps, help=f"most steps ({steps})")
    parser.add_argument(
        "--optimizer",
        choices=("LBFGS", "BFGS", "FIRE"),
        default="LBFGS",
        help="of ASE (LBFGS)",
    )
    parser.add_argument("--maxstep", type=float, metavar="A", help="longest move (ASE's, 0.2)")
    parser.add_argument(
        "--max-atoms", type=int, default=2000, metavar="N", help="atoms of a batch (2000)"
    )


def relaxation_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_relaxation` declared."""
    return {
        name: getattr(args, name) for name in ("fmax", "steps", "optimizer", "maxstep", "max_atoms")
    }


def open_model(args: argparse.Namespace) -> Model:
    """The model that `add_model` declared."""
    from escaip_fairchem.simulate.model import Model

    return Model.open(
        args.checkpoint,
        task=args.task,
        device=args.device,
        float64=args.float64,
        remove_net_force=args.remove_net_force,
        d3=args.d3,
        compile=args.compile,
    )
