"""Check a training before it waits in a queue: data, model, memory, time, SLURM."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
RECIPE and overrides are those of the `fairchem` command that you are about to give:
`escaip check configs/oc20/escaip_2m.yml cluster=slurm max_atoms=400`. Runs on a login node without
a GPU, in less than a minute for the size `small`. Exit code 1 if there is a problem.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a .yml file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for fairchem")
    parser.add_argument(
        "--gpu", default="h100", metavar="NAME", help="v100, a100, h100 and others (h100)"
    )
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="of that GPU, if it differs"
    )
    parser.add_argument(
        "--atoms-per-second", type=float, metavar="N", help="of a rank in training, if known"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead")


def run(args: argparse.Namespace) -> None:
    """Print the findings; exit with 1 if there is a problem."""
    import json
    import logging
    import os
    import warnings

    # of torch's profiler, which measures memory
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    from escaip_fairchem.check.report import Report
    from escaip_fairchem.check.run import Options, check

    options = Options(args.gpu, args.gpu_memory, args.atoms_per_second)
    report = Report(show=(lambda finding: None) if args.json else _show)
    logging.disable(logging.WARNING)  # fairchem's own talk, which the report replaces
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(args.recipe, args.overrides, options, report)
    finally:
        logging.disable(logging.NOTSET)
    problems = len(report.problems)
    if args.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        print(f"{problems} problems" if problems != 1 else "1 problem")
    if problems:
        raise SystemExit(1)


def _show(finding: object) -> None:
    print(finding, flush=True)
