"""Convert published data sets, and structures that ASE reads, into a training set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from escaip_fairchem.data.arguments import KEYS, add_source, settings_of

EPILOG = """\
Writes OUT/train and OUT/val (ASE-LMDB with metadata.npz), OUT/dataset.yaml with element
references and force scale fitted on train, a copy of it as $ESCAIP_DATA/configs/dataset/NAME.yaml,
so that `fairchem -c RECIPE dataset=NAME` trains on it, and OUT/dataset.json, which says what the
set is made of and what is in it. Frames that cannot be learned from are listed in
OUT/rejected.csv.

A conversion that was interrupted goes on if the same command is given again. The result does not
depend on that, nor on --workers.

Energies are in eV, forces in eV/A, stresses in eV/A^3; forces are stored raw, those on fixed
atoms included. Kept: tags, FixAtoms, and the plain values of info (sid, fid, charge, spin ...).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("inputs", nargs="+", metavar="IN", help="file, glob pattern or folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--name", help="name for dataset=NAME (the name of OUT)")
    parser.add_argument("--label", help="fairchem's dataset label, stored in checkpoints (NAME)")

    source = parser.add_argument_group("source")
    add_source(source, KEYS)
    source.add_argument(
        "--unlabelled",
        action="store_true",
        help="structures without labels, such as test sets; all go to OUT/test",
    )

    split = parser.add_argument_group("split (frames at random, unless a key is given)")
    split.add_argument("--val-fraction", type=float, metavar="X", help="part held out (0.1)")
    how = split.add_mutually_exclusive_group()
    how.add_argument("--split-by", metavar="KEY", help="hold out whole groups of this info key")
    how.add_argument(
        "--val-within", metavar="KEY", help="hold out frames inside every group of this info key"
    )
    split.add_argument("--seed", type=int, metavar="N", help="random seed (0)")
    split.add_argument(
        "--val", nargs="+", default=[], metavar="PATH", help="official validation files; no split"
    )

    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes, one file each (1)"
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first frame that cannot be used"
    )
    parser.add_argument(
        "--skip-unit-checks",
        action="store_true",
        help="accept distances and forces of a size that suggests other units",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace OUT and NAME if they exist, and drop an interrupted conversion of other "
        "files or options",
    )


def run(args: argparse.Namespace) -> None:
    """Convert and say what was written."""
    from escaip_fairchem.data.convert import convert
    from escaip_fairchem.data.frames import LabelKeys
    from escaip_fairchem.errors import UserError

    try:
        summary, group = convert(
            args.inputs,
            args.out,
            name=args.name,
            label=args.label,
            overwrite=args.overwrite,
            split=_split(args),
            val=args.val,
            format=args.format,
            settings=settings_of(args),
            keys=LabelKeys(**{name: getattr(args, f"{name}_key") for name in KEYS}),
            check_units=not args.skip_unit_checks,
            unlabelled=args.unlabelled,
            strict=args.strict,
            workers=args.workers,
        )
    except KeyboardInterrupt:
        raise UserError("interrupted; the same command goes on from here") from None
    print(summary.describe())
    if group is not None:
        print(f"train on it with: fairchem -c RECIPE dataset={group.stem}  ({group})")


def _split(args: argparse.Namespace) -> Any:
    """The split as far as the user asked for one."""
    from escaip_fairchem.data.convert import SplitOptions

    given = {
        "val_fraction": args.val_fraction,
        "by": args.split_by,
        "within": args.val_within,
        "seed": args.seed,
    }
    given = {name: value for name, value in given.items() if value is not None}
    return SplitOptions(**given) if given else None
