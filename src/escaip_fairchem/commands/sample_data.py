"""Make a small labelled data set of the shape of a public one, in seconds."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
`fairchem -c RECIPE dataset=sample` trains on $ESCAIP_DATA/NAME/sample with element references and
scales fitted to the default sample (240 frames, seed 0), whatever --frames and --seed are.
For references of your own frames, use `escaip convert`.

oc20   metal slabs with adsorbates, ASE EMT
oc22   slabs of metals and oxygen in rocksalt's shape, with adsorbates, ASE EMT
mptrj  strained and rattled alloys with stress, ASE EMT
spice  molecules, GFN2-xTB with the extra [xtb] (tblite), ASE EMT without it
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", choices=["oc20", "oc22", "mptrj", "spice"], help="which shape")
    parser.add_argument(
        "--frames", type=int, default=240, metavar="N", help="frames in all, train and val (240)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to make ($ESCAIP_DATA/NAME/sample)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")


def run(args: argparse.Namespace) -> None:
    """Write the sample and say what was written."""
    from escaip_fairchem.data.sample import make_sample
    from escaip_fairchem.data.store import data_root

    summary, note = make_sample(
        args.name, args.out, n_frames=args.frames, seed=args.seed, overwrite=args.overwrite
    )
    # Hydra warns about a search path that does not exist, and recipes name this one
    (data_root() / "configs").mkdir(parents=True, exist_ok=True)
    print(summary.describe())
    if note:
        print(note)
