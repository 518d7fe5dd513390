"""Arguments that say how files are read, of several subcommands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

KEYS = {
    "energy": "info key, eV",
    "forces": "arrays key, eV/A",
    "stress": "info key, eV/A^3, 6 or 9 numbers",
    "charge": "info key, e",
    "spin": "info key, multiplicity",
}
LABELS = ("energy", "forces", "stress")


def add_source(parser: argparse._ActionsContainer, keys: Iterable[str] = LABELS) -> None:
    """Declare the arguments.

    Args:
        parser: Or a group of one.
        keys: Some of `KEYS`.
    """
    parser.add_argument(
        "--format", metavar="NAME", help="layout of the files (found by a look at them)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of the format; may be repeated, a wrong name lists them",
    )
    for name in keys:
        parser.add_argument(
            f"--{name}-key", metavar="KEY", help=f"{name}, if ASE does not find it: {KEYS[name]}"
        )


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the format, those that say where labels are among them.

    Raises:
        UserError: What follows ``--set`` is no KEY=VALUE.
    """
    named = {f"{name}_key": getattr(args, f"{name}_key") for name in LABELS}
    return settings_of(args) | {name: key for name, key in named.items() if key is not None}


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What follows ``--set``, the values read as YAML.

    Raises:
        UserError: It is no KEY=VALUE.
    """
    import yaml

    from escaip_fairchem.errors import UserError

    settings = {}
    for pair in args.set:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair}: give KEY=VALUE")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {pair}: the value is no YAML; put text in quotes") from None
    return settings
