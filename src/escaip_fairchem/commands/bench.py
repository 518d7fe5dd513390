"""Measure speed and memory against fairchem's built-in EScAIP and other models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    import argparse

#: Batch sizes and system sizes of the sweeps.
SYSTEMS = "1,2,4,8,16"
ATOMS = "100,300,1000,3000,10000,30000"

_HELP = {
    "forward": "energy and forces",
    "train": "forward, loss and backward of a training step",
    "memory": "bytes saved for backward, peaks of inference and of training",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare a subcommand for each question."""
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, text in _HELP.items():
        command = commands.add_parser(name, help=text, description=f"Measure {text}.")
        _add_common(command)
        _add_model(command)
        _add_sweeps(command)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="append the rows to a table")
    parser.add_argument("--repeats", type=int, metavar="N", help="turns of each model (5)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (1)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hidden", type=int, metavar="H", help="hidden size (256)")
    parser.add_argument("--layers", type=int, metavar="L", help="layers (4)")
    parser.add_argument("--neighbors", type=int, metavar="K", help="soft nearest neighbours (30)")
    parser.add_argument("--kind", choices=["direct", "conservative"], help="forces (direct)")
    parser.add_argument("--stress", action="store_true", help="conservative: stress as well")
    parser.add_argument("--domain", choices=["slabs", "molecules", "crystals"], help="(slabs)")
    parser.add_argument("--atoms", type=int, metavar="N", help="about how many in the batch (150)")
    parser.add_argument("--seed", type=int, help="of the structures (0)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(cpu)")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], help="(fp32)")


def _add_sweeps(parser: argparse.ArgumentParser) -> None:
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


def run(args: argparse.Namespace) -> None:
    """Measure, print, and append to the table."""
    # torch's profiler, which counts memory on CPUs, is talkative
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch

    from escaip_fairchem.bench.report import Report
    from escaip_fairchem.bench.settings import Settings

    settings = Settings.from_args(args)
    report = Report(args.what, args.out)
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        _measure(args, settings, report)
    finally:
        torch.set_num_threads(before)
    if args.out is not None:
        print(f"appended {len(report.rows)} rows to {args.out}")


def _measure(args: argparse.Namespace, settings, report) -> None:
    from escaip_fairchem.bench import sweep
    from escaip_fairchem.bench.figure import draw
    from escaip_fairchem.bench.structures import from_file

    figure = None if args.out is None else args.out.with_suffix(".png")
    if args.sweep_batch:
        if args.batches < 1:
            raise UserError(f"--batches is {args.batches}; give a positive number")
        sizes = _sizes("--sweep-batch", args.sweep_batch)
        sweep.batch_sizes(args.what, settings, report, sizes, args.batches)
        if figure:
            print(draw(report.rows, figure, against="systems"))
    elif args.sweep_atoms:
        sizes = _sizes("--sweep-atoms", args.sweep_atoms)
        sweep.system_sizes(args.what, settings, report, sizes, args.max_memory)
        if figure:
            print(draw(report.rows, figure, against="atoms"))
    elif args.as_shipped:
        sweep.as_shipped(args.what, settings, report)
    elif args.structures:
        sweep.each(args.what, settings, report, from_file(args.structures, args.index))
    else:
        sweep.one_batch(args.what, settings, report)


def _sizes(option: str, text: str) -> list[int]:
    """Whole numbers separated by commas."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UserError(f"{option}: {text!r}; give positive whole numbers separated by commas")
    return sizes
