"""The command ``escaip``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from escaip_fairchem import __version__
from escaip_fairchem.commands import (
    adsorption,
    bench,
    check,
    config_reference,
    convert,
    finetune,
    import_checkpoint,
    info,
    inspect,
    matbench,
    md,
    neb,
    plot,
    references,
    relax,
    report,
    sample_data,
    split,
    submission,
    sweep,
)
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

# A new subcommand is a module of ``commands`` and its place in this list.
COMMANDS = (
    sample_data,
    convert,
    inspect,
    references,
    split,
    import_checkpoint,
    finetune,
    sweep,
    info,
    check,
    plot,
    report,
    submission,
    matbench,
    relax,
    md,
    neb,
    adsorption,
    bench,
    config_reference,
)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="escaip", description="Tools around training EScAIP with fairchem."
    )
    parser.add_argument("--version", action="version", version=f"escaip-fairchem {__version__}")
    subparsers = parser.add_subparsers(title="subcommands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2].replace("_", "-")
        subparser = subparsers.add_parser(name, help=module.__doc__, description=module.__doc__)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        0, or 2 after a mistake of the user, which is printed in one line.
    """
    args = build_parser().parse_args(sweep.with_action(sys.argv[1:] if argv is None else argv))
    try:
        args.run(args)
    except UserError as error:
        print(f"escaip: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
