"""Check files for Matbench Discovery, compute its metrics, write its model YAML."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

EPILOG = """\
The files are written by configs/mptrj/matbench_discovery.yml; docs/matbench.md explains them.
`check` ends with exit code 1 if there is a problem. Nothing is downloaded, and nothing is sent.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    check = actions.add_parser("check", help="check the files", description="Check the files.")
    check.set_defaults(action=_check)
    check.add_argument("folder", type=Path, metavar="DIR", help="folder of both files")
    check.add_argument(
        "--summary", type=Path, metavar="CSV", help="WBM's summary: all materials are there"
    )

    metrics = actions.add_parser(
        "metrics",
        help="F1, DAF, MAE and the others",
        description="Compute the discovery metrics of the three test sets.",
    )
    metrics.set_defaults(action=_metrics)
    metrics.add_argument("file", type=Path, metavar="FILE", help="<date>-discovery.csv.gz")
    metrics.add_argument(
        "--summary", type=Path, required=True, metavar="CSV", help="WBM's summary, as published"
    )
    metrics.add_argument("--out", type=Path, metavar="JSON", help="write them there, too")

    card = actions.add_parser(
        "card",
        help="write the model's YAML",
        description="Write models/FAMILY/KEY.yml and the files it names, as the benchmark wants.",
    )
    card.set_defaults(action=_card)
    card.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="as of the relaxations")
    card.add_argument(
        "--results", type=Path, required=True, metavar="DIR", help="folder of the recipe's files"
    )
    card.add_argument("--name", required=True, metavar="NAME", help="name of the model")
    card.add_argument(
        "--author",
        action="append",
        required=True,
        metavar="'NAME <EMAIL>; AFFILIATION'",
        help="once for each; the first needs an email address",
    )
    card.add_argument("--key", metavar="KEY", help="lowercase-with-hyphens (from the name)")
    card.add_argument("--family", default="escaip", metavar="NAME", help="folder (escaip)")
    card.add_argument("--license", default="MIT", metavar="ID", help="of the code (MIT)")
    card.add_argument(
        "--checkpoint-license", default="unreleased", metavar="ID", help="(unreleased)"
    )
    card.add_argument("--checkpoint-url", metavar="URL", help="direct download of the checkpoint")
    card.add_argument("--repository", metavar="URL", help="of the code")
    card.add_argument("--paper", metavar="URL")
    card.add_argument("--doi", metavar="URL")
    card.add_argument("--published", metavar="DATE", help="of the paper, yyyy-mm-dd")
    card.add_argument(
        "--training-sets", nargs="+", default=["MPtrj"], metavar="KEY", help="(MPtrj)"
    )
    card.add_argument("--fine-tuned", action="store_true", help="it began with another training")
    card.add_argument(
        "--openness",
        choices=["OSOD", "OSCD", "CSOD", "CSCD"],
        default="OSOD",
        help="open or closed source, open or closed data (OSOD)",
    )
    card.add_argument(
        "--schema", type=Path, metavar="YML", help="tests/model-schema.yml of the benchmark"
    )
    card.add_argument(
        "--out", type=Path, default=Path("matbench"), metavar="DIR", help="(matbench)"
    )


def run(args: argparse.Namespace) -> None:
    """Carry out the action."""
    args.action(args)


def _check(args: argparse.Namespace) -> None:
    from escaip_fairchem.matbench.check import check

    report = check(args.folder, args.summary)
    print(report)
    if report.problems:
        raise SystemExit(1)


def _metrics(args: argparse.Namespace) -> None:
    from escaip_fairchem.files import write_whole
    from escaip_fairchem.matbench.metrics import discovery_metrics, text

    table = discovery_metrics(args.file, args.summary)
    print(text(table))
    if args.out:
        write_whole(args.out, json.dumps(table, indent=1) + "\n")


def _card(args: argparse.Namespace) -> None:
    from escaip_fairchem.matbench.card import CardOptions, write_card

    options = CardOptions(
        name=args.name,
        authors=tuple(args.author),
        key=args.key,
        family=args.family,
        license=args.license,
        checkpoint_license=args.checkpoint_license,
        checkpoint_url=args.checkpoint_url,
        repository=args.repository,
        paper=args.paper,
        doi=args.doi,
        published=args.published,
        training_sets=tuple(args.training_sets),
        fine_tuned=args.fine_tuned,
        openness=args.openness,
    )
    for line in write_card(args.checkpoint, args.results, args.out, options, args.schema):
        print(line)
