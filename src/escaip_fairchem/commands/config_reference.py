"""Print the configuration reference (docs/configuration.md) as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> None:
    """Print the page."""
    from escaip_fairchem.reference import markdown

    print(markdown(), end="")
