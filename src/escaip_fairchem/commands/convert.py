"""Convert structures that ASE reads (extxyz, db, traj, aselmdb ...) into a training set."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
Writes OUT/train and OUT/val (ASE-LMDB with metadata.npz), OUT/dataset.yaml with element
references and force scale fitted on train, and a copy of it as
$ESCAIP_DATA/configs/dataset/NAME.yaml, so that `fairchem -c RECIPE dataset=NAME` trains on it.
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

    split = parser.add_argument_group("split (frames at random, unless a key is given)")
    split.add_argument(
        "--val-fraction", type=float, default=0.1, metavar="X", help="part held out (0.1)"
    )
    how = split.add_mutually_exclusive_group()
    how.add_argument("--split-by", metavar="KEY", help="hold out whole groups of this info key")
    how.add_argument(
        "--val-within", metavar="KEY", help="hold out frames inside every group of this info key"
    )
    split.add_argument("--seed", type=int, default=0, help="random seed (0)")

    labels = parser.add_argument_group("labels that ASE does not find by itself")
    labels.add_argument("--energy-key", metavar="KEY", help="info key, eV")
    labels.add_argument("--forces-key", metavar="KEY", help="arrays key, eV/A")
    labels.add_argument("--stress-key", metavar="KEY", help="info key, eV/A^3, 6 or 9 numbers")

    parser.add_argument(
        "--skip-unit-checks",
        action="store_true",
        help="accept distances and forces of a size that suggests other units",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT and NAME if they exist"
    )


def run(args: argparse.Namespace) -> None:
    """Convert and say what was written."""
    from escaip_fairchem.data.convert import SplitOptions, convert
    from escaip_fairchem.data.frames import LabelKeys

    summary, group = convert(
        args.inputs,
        args.out,
        name=args.name,
        label=args.label,
        split=SplitOptions(args.val_fraction, args.split_by, args.val_within, args.seed),
        keys=LabelKeys(args.energy_key, args.forces_key, args.stress_key),
        check_units=not args.skip_unit_checks,
        overwrite=args.overwrite,
    )
    print(summary.describe())
    print(f"train on it with: fairchem -c RECIPE dataset={group.stem}  ({group})")
