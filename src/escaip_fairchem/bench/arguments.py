"""The options of ``escaip bench``; imports the standard library only, as the command does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from escaip_fairchem.bench.accuracy.options import DOMAINS, MODELS, RECIPE
from escaip_fairchem.tables import arguments as tables

if TYPE_CHECKING:
    import argparse

#: Batch sizes and system sizes of the sweeps.
SYSTEMS = "1,2,4,8,16"
ATOMS = "100,300,1000,3000,10000,30000"
GRAPH = "100,300,1000,3000,10000,30000,100000"

PEERS = "esen_K2L2,esen_K4L2,esen_K10L4"

_HELP = {
    "forward": "energy and forces",
    "train": "forward, loss and backward of a training step",
    "memory": "bytes saved for backward, peaks of inference and of training",
    "graph": "the neighbour graph against the number of atoms",
    "md": "steps of molecular dynamics in ASE",
    "peers": "other models on the same structures, all with random weights",
    "accuracy": "errors of models trained on the same frames with the same budget",
    "gpu": "on a GPU: every precision and form of ours, dynamics, a million atoms, stages",
}


def add_to(parser: argparse.ArgumentParser) -> None:
    """Declare a subcommand for each question."""
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, text in _HELP.items():
        command = commands.add_parser(name, help=text, description=f"Measure {text}.")
        if name != "accuracy":
            _add_common(command)
        if name in _OPTIONS:
            _OPTIONS[name](command)
    tables.add_to(commands)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="append the rows to a table")
    parser.add_argument("--repeats", type=int, metavar="N", help="turns of each model (5)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (1)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hidden", type=int, metavar="H", help="hidden size (256)")
    parser.add_argument("--layers", type=int, metavar="L", help="layers (4)")
    parser.add_argument("--neighbors", type=int, metavar="K", help="soft nearest neighbours (30)")
    parser.add_argument("--kind", choices=["direct", "conservative"], help="forces (direct)")
    parser.add_argument("--seed", type=int, help="of the structures (0)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(cpu)")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], help="(fp32)")
    parser.add_argument("--compile", action="store_true", help="ours by torch.compile")
    parser.add_argument("--kernels", choices=["torch", "triton"], help="of ours (torch)")


def _add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--domain", choices=["slabs", "molecules", "crystals"], help="(slabs)")
    parser.add_argument("--atoms", type=int, metavar="N", help="about how many in the batch (150)")


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_batch(parser)
    parser.add_argument("--checkpointing", choices=["none", "pointwise", "block"], help="of ours")
    parser.add_argument("--inference-chunk", type=int, metavar="ATOMS", help="of ours (0: all)")
    parser.add_argument("--stress", action="store_true", help="conservative: stress as well")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--sweep-batch",
        nargs="?",
        const=SYSTEMS,
        metavar="SIZES",
        help=f"random batches of each size, time and memory, with a figure ({SYSTEMS})",
    )
    what.add_argument(
        "--sweep-atoms",
        nargs="?",
        const=ATOMS,
        metavar="SIZES",
        help=f"one crystal of each size, time and memory, with a figure ({ATOMS})",
    )
    what.add_argument(
        "--as-shipped", action="store_true", help="one slab, the built-in padded to 300 atoms"
    )
    what.add_argument(
        "--structures", type=Path, metavar="FILE", help="each structure of a file that ASE reads"
    )
    parser.add_argument("--index", default=":", metavar="I", help="which of FILE, as in ASE (:)")
    parser.add_argument(
        "--batches", type=int, default=16, metavar="N", help="batches of each size (16)"
    )
    parser.add_argument("--max-memory", type=float, metavar="GIB", help="where a model stops")


def _add_graph(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", default=GRAPH, metavar="N,N", help=f"atoms ({GRAPH})")
    parser.add_argument("--preset", default="v2,paper", metavar="P,P", help="(v2,paper)")
    parser.add_argument("--search", default="fairchem,vesin", metavar="S,S", help="(both)")
    parser.add_argument("--neighbors", type=int, metavar="K", help="of v2 (30)")
    parser.add_argument("--perfect", action="store_true", help="lattice sites, not rattled")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(cpu)")
    parser.add_argument(
        "--max-memory", type=float, default=4.0, metavar="GIB", help="where the built-in stops (4)"
    )


def _add_md(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--sizes", default="10,100,1000", metavar="N,N", help="(10,100,1000)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="of each turn (5)")
    parser.add_argument("--peers", default="", metavar="P,P", help=f"beside them, of {PEERS}")
    parser.add_argument(
        "--fits", type=float, metavar="GIB", help="estimate how many atoms each can have in them"
    )


def _add_peers(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_batch(parser)
    parser.add_argument("--list", action="store_true", help="peers, and how to install them")
    parser.add_argument("--peers", default=PEERS, metavar="P,P", help=f"({PEERS})")
    parser.add_argument("--max-neighbors", default="30,300", metavar="N,N", help="eSEN (30,300)")
    parser.add_argument(
        "--measure", choices=["forward", "train", "memory"], default="forward", help="(forward)"
    )
    parser.add_argument("--python", type=Path, metavar="PATH", help="of another environment")
    parser.add_argument("--authors", type=Path, metavar="DIR", help="the code of escaip_v1")


def _add_accuracy(parser: argparse.ArgumentParser) -> None:
    limit = parser.add_mutually_exclusive_group(required=True)
    limit.add_argument("--minutes", type=float, metavar="M", help="of each training")
    limit.add_argument("--samples", type=int, metavar="N", help="structures that each sees")
    parser.add_argument(
        "--clock", choices=["cpu", "wall"], help="of --minutes, training steps only (cpu)"
    )
    parser.add_argument("--seeds", type=int, metavar="S", help="trainings of each model (1)")
    parser.add_argument(
        "--data", metavar="NAME", help="data set of `escaip convert`, or its folder (sample)"
    )
    parser.add_argument("--domain", choices=list(DOMAINS), help="periodicity and batches (oc20)")
    parser.add_argument(
        "--models", default=",".join(MODELS), metavar="M,M", help=f"({','.join(MODELS)})"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="runs, tables and curves"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="trainings at a time (1)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of each (1)")
    parser.add_argument("--evaluations", type=int, metavar="N", help="points of a curve (10)")
    parser.add_argument("--recipe", type=Path, help=f"data, losses, EScAIP's settings ({RECIPE})")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[MODEL:]KEY=VALUE",
        help="as for fairchem, for all trainings or those of a model; may be repeated",
    )


_OPTIONS = {
    "accuracy": _add_accuracy,
    "forward": _add_comparison,
    "train": _add_comparison,
    "memory": _add_comparison,
    "graph": _add_graph,
    "md": _add_md,
    "peers": _add_peers,
}
