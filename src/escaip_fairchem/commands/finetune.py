"""Fine-tune a checkpoint on your own labelled structures (VASP output, extxyz, traj, db ...)."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
Writes RUN/data (converted frames), RUN/start.pt (the checkpoint with the element references that
were settled on), RUN/recipe.yml, trains it by `fairchem -c RUN/recipe.yml`, and prints the errors
on the validation frames before and after. The result is RUN/checkpoints/final/inference_ckpt.pt,
a checkpoint like any other. docs/finetuning.md shows it step by step.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="inference_ckpt.pt, or a run's folder"
    )
    parser.add_argument(
        "data", nargs="+", metavar="DATA", help="files ASE reads, or a folder of `escaip convert`"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/finetune"), metavar="RUN", help="(runs/finetune)"
    )
    parser.add_argument("--task", metavar="NAME", help="data set, if the checkpoint knows several")

    energy = parser.add_argument_group("meaning of the energies")
    energy.add_argument(
        "--energy",
        choices=("auto", "total", "adsorption"),
        default="auto",
        help="what the data holds; auto goes by size, and refuses what the checkpoint is not",
    )
    energy.add_argument(
        "--references",
        choices=("auto", "keep", "refit"),
        default="auto",
        help="element references: those of the checkpoint, or refitted to the difference between "
        "data and model (auto: if that is over 0.05 eV per atom)",
    )

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, metavar="N", help="(1000, or 10 epochs if longer)")
    training.add_argument("--lr", type=float, metavar="X", help="learning rate (by the width)")
    training.add_argument(
        "--max-atoms", type=int, metavar="N", help="atoms per batch (about 8 structures)"
    )
    training.add_argument(
        "--freeze",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="PARTS",
        help="parts that stay as they are, such as embedding,blocks.0-3; a wrong name lists them",
    )
    training.add_argument(
        "--layer-decay",
        type=float,
        default=1.0,
        metavar="X",
        help="learning rate of each layer over that of the next one (1)",
    )
    training.add_argument(
        "--lora",
        type=int,
        default=0,
        metavar="RANK",
        help="train updates of this rank, and the heads (needs peft); merged at the end",
    )
    training.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="(adamw)")
    training.add_argument(
        "--cluster", choices=("cpu", "gpu", "node", "slurm"), help="(gpu if there is one, else cpu)"
    )
    training.add_argument("--seed", type=int, default=0, help="of split and training (0)")
    training.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another value of the recipe, such as optim.ema_decay=0.999; may be repeated",
    )
    training.add_argument(
        "--dry-run", action="store_true", help="stop before the training, with the recipe written"
    )

    files = parser.add_argument_group("files (as for `escaip convert`)")
    files.add_argument("--val-fraction", type=float, default=0.1, metavar="X", help="(0.1)")
    how = files.add_mutually_exclusive_group()
    how.add_argument("--split-by", metavar="KEY", help="hold out whole groups of this info key")
    how.add_argument("--val-within", metavar="KEY", help="hold out frames inside every group")
    for label in ("energy", "forces", "stress"):
        files.add_argument(f"--{label}-key", metavar="KEY", help=f"where the {label} is")
    files.add_argument(
        "--skip-unit-checks", action="store_true", help="accept sizes of other units"
    )


def run(args: argparse.Namespace) -> None:
    """Prepare, train, compare."""
    import torch

    from escaip_fairchem.data.convert import SplitOptions
    from escaip_fairchem.data.frames import LabelKeys
    from escaip_fairchem.train.finetune.recipe import Options
    from escaip_fairchem.train.finetune.run import Source, finetune

    finetune(
        args.checkpoint,
        Source(
            args.data,
            SplitOptions(args.val_fraction, args.split_by, args.val_within, args.seed),
            LabelKeys(args.energy_key, args.forces_key, args.stress_key),
            not args.skip_unit_checks,
        ),
        args.out,
        Options(
            steps=args.steps,
            lr=args.lr,
            max_atoms=args.max_atoms,
            freeze=args.freeze,
            layer_decay=args.layer_decay,
            lora_rank=args.lora,
            optimizer=args.optimizer,
            cluster=args.cluster or ("gpu" if torch.cuda.is_available() else "cpu"),
            seed=args.seed,
            settings=tuple(args.set),
        ),
        task=args.task,
        energy=args.energy,
        references=args.references,
        train=not args.dry_run,
    )
