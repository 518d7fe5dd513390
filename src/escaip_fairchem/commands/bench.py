"""Measure speed, memory and accuracy against fairchem's built-in EScAIP and other models."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

from escaip_fairchem.bench import arguments
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    import argparse

    from escaip_fairchem.bench.report import Report
    from escaip_fairchem.bench.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare a subcommand for each question."""
    arguments.add_to(parser)


def run(args: argparse.Namespace) -> None:
    """Measure, print, and append to the table."""
    # torch's profiler, which counts memory on CPUs, is talkative
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if "make" in args:  # one of the paper's tables
        args.make(args)
        return
    if args.what == "accuracy":
        _accuracy(args)
        return
    import torch

    from escaip_fairchem.bench.report import Report
    from escaip_fairchem.bench.settings import Settings

    settings = Settings.from_args(args)
    report = Report(args.what, args.out)
    measure = {"graph": _graph, "md": _md, "peers": _peers, "gpu": _gpu}.get(args.what, _compare)
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        measure(args, settings, report)
    finally:
        torch.set_num_threads(before)
    if args.out is not None:
        print(f"appended {len(report.rows)} rows to {args.out}")


def _accuracy(args: argparse.Namespace) -> None:
    from escaip_fairchem.bench.accuracy.options import Options

    options = Options.from_args(args)
    from escaip_fairchem.bench.accuracy.run import run

    run(options)


def _compare(args: argparse.Namespace, settings: Settings, report: Report) -> None:
    from escaip_fairchem.bench import sweep
    from escaip_fairchem.bench.structures import from_file

    if args.sweep_batch:
        if args.batches < 1:
            raise UserError(f"--batches is {args.batches}; give a positive number")
        sizes = _numbers("--sweep-batch", args.sweep_batch)
        sweep.batch_sizes(args.what, settings, report, sizes, args.batches)
        _draw(args, report, "systems")
    elif args.sweep_atoms:
        sizes = _numbers("--sweep-atoms", args.sweep_atoms)
        sweep.system_sizes(args.what, settings, report, sizes, args.max_memory)
        _draw(args, report, "atoms")
    elif args.as_shipped:
        sweep.as_shipped(args.what, settings, report)
    elif args.structures:
        sweep.each(args.what, settings, report, from_file(args.structures, args.index))
    else:
        sweep.one_batch(args.what, settings, report)


def _graph(args: argparse.Namespace, settings: Settings, report: Report) -> None:
    from escaip_fairchem.bench import graph
    from escaip_fairchem.config import PRESETS

    graph.run(
        settings,
        report,
        _numbers("--sizes", args.sizes),
        _names("--preset", args.preset, tuple(PRESETS)),
        _names("--search", args.search, ("auto", "fairchem", "vesin", "nvidia")),
        perfect=args.perfect,
        limit=args.max_memory,
    )
    _draw(args, report, "atoms")


def _md(args: argparse.Namespace, settings: Settings, report: Report) -> None:
    from escaip_fairchem.bench import md

    if args.steps < 1:
        raise UserError(f"--steps is {args.steps}; give a positive number")
    known = tuple(arguments.PEERS.split(","))
    peers = _names("--peers", args.peers, known) if args.peers else []
    sizes = [name.removeprefix("esen_") for name in peers]
    md.run(settings, report, _numbers("--sizes", args.sizes), args.steps, sizes, args.fits)


def _peers(args: argparse.Namespace, settings: Settings, report: Report) -> None:
    from escaip_fairchem.bench import authors, peers
    from escaip_fairchem.bench.structures import batch_by_atoms
    from escaip_fairchem.bench.sweep import OF_ONE

    if args.list:
        print(peers.describe())
        return
    batch = batch_by_atoms(settings.domain, settings.atoms, settings.seed)
    names = [name for name in args.peers.split(",") if name]
    if authors.NAME in names:
        if names != [authors.NAME] or args.measure != "forward":
            raise UserError(f"{authors.NAME} is measured alone, without --measure")
        given = {key: getattr(args, key) for key in authors.SIZE if getattr(args, key) is not None}
        settings = dataclasses.replace(settings, **authors.SIZE | given)
        authors.run(settings, report, batch, args.authors, args.python)
        return
    limits = _numbers("--max-neighbors", args.max_neighbors)
    peers.run(settings, report, batch, OF_ONE[args.measure], names, limits, args.python)


def _gpu(args: argparse.Namespace, settings: Settings, report: Report) -> None:
    from escaip_fairchem.bench import gpu

    gpu.run(settings, report)


def _draw(args: argparse.Namespace, report: Report, against: str) -> None:
    """A figure beside the table, if there is one."""
    from escaip_fairchem.bench.figure import draw

    if args.out is not None:
        print(draw(report.rows, args.out.with_suffix(".png"), against=against))


def _numbers(option: str, text: str) -> list[int]:
    """Whole numbers separated by commas."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"{option}: {text!r}; give positive whole numbers separated by commas")
    return numbers


def _names(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    """Known names separated by commas."""
    names = text.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"{option}: {name!r} is not one of {', '.join(known)}")
    return names
