"""The recipe of a fine-tuning: everything that the ``fairchem`` command needs to repeat it."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from escaip_fairchem.train.finetune.start import Start

_HEADER = """\
# Written by `escaip finetune` from {source}.
#
#   {repeat}
#
# repeats it, in a folder of its own beside this one, and
#
#   {resume}
#
# takes the run up again where it stopped. Weights to start from, tasks and element references:
# {start}.
"""

_DEFAULTS = """
hydra:
  searchpath: ["pkg://escaip_fairchem.configs"]

defaults:
  - training: finetune
  - cluster: {cluster}
  - optimizer: {optimizer}
  - logger: none
  - _self_

"""


@dataclass(frozen=True)
class Options:
    """How to train.

    Attributes:
        steps: Steps; None for `SHORTEST` or 10 passes over the data, whichever is longer.
        lr: Learning rate; None for `default_lr`.
        max_atoms: Atoms per batch; None for about eight structures.
        freeze: Parts that stay as they are.
        layer_decay: Factor on the learning rate for every layer further from the output.
        lora_rank: Rank of low-rank updates; 0 trains the weights themselves.
        optimizer: ``adamw`` or ``muon``.
        cluster: Group that says where to run.
        seed: Random seed.
        settings: Further values of the recipe, as ``key=value``.
    """

    steps: int | None = None
    lr: float | None = None
    max_atoms: int | None = None
    freeze: tuple[str, ...] = ()
    layer_decay: float = 1.0
    lora_rank: int = 0
    optimizer: str = "adamw"
    cluster: str = "cpu"
    seed: int = 0
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"--layer-decay is {self.layer_decay}; give a number in (0, 1]")
        if self.lora_rank < 0:
            raise UserError(f"--lora is {self.lora_rank}; give a rank of 1 or more")
        if self.lora_rank and self.optimizer == "muon":
            raise UserError("--lora goes with --optimizer adamw: Muon would turn thin matrices")
        for name in ("steps", "lr", "max_atoms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} is {value}; give a number above 0")
        for setting in self.settings:
            if "=" not in setting:
                raise UserError(
                    f"--set {setting}: give KEY=VALUE, for example optim.ema_decay=0.999"
                )


#: Steps of a short run.
SHORTEST = 1000
#: Learning rates of a model of width 64, by what is trained.
RATES = {"adamw": 2e-3, "muon": 2e-3, "lora": 5e-3}


def write_recipe(
    path: Path,
    start: Start,
    options: Options,
    *,
    run: Path,
    source: str,
    folders: tuple[Path, Path],
    natoms: tuple[np.ndarray, np.ndarray],
) -> dict[str, Any]:
    """Write ``recipe.yml``.

    Args:
        path: File to write.
        start: What the run starts from; lies as ``start.pt`` in `run`.
        options: How to train.
        run: Folder of the run.
        source: Checkpoint and data as the user named them.
        folders: Training and validation frames.
        natoms: Atoms of each training frame and of each validation frame.

    Returns:
        What it sets.
    """
    from omegaconf import OmegaConf

    values = _values(start, options, run=run, folders=folders, natoms=natoms)
    config = OmegaConf.create(values)
    for setting in options.settings:
        key, _, _ = setting.partition("=")
        value = OmegaConf.select(OmegaConf.from_dotlist([setting]), key)
        OmegaConf.update(config, key, value, force_add=True)
    command = ["fairchem", "-c", str(run / path.name)]
    header = _HEADER.format(
        source=source,
        repeat=shlex.join(command),
        resume=shlex.join([*command, run_name(run)]),
        start=run / "start.pt",
    )
    groups = {"cluster": options.cluster, "optimizer": options.optimizer}
    path.write_text(header + _DEFAULTS.format(**groups) + OmegaConf.to_yaml(config))
    return OmegaConf.to_container(config)


def _values(
    start: Start,
    options: Options,
    *,
    run: Path,
    folders: tuple[Path, Path],
    natoms: tuple[np.ndarray, np.ndarray],
) -> dict[str, Any]:
    train, largest = natoms[0], int(max(numbers.max() for numbers in natoms))
    max_atoms = options.max_atoms or max(largest, min(8 * round(train.mean()), train.sum() // 4))
    if max_atoms < largest:
        raise UserError(
            f"--max-atoms {max_atoms} is less than the largest structure has ({largest} atoms), "
            "which would be left out; raise it"
        )
    epoch = steps_per_epoch(train, int(max_atoms), options)
    steps = options.steps or max(SHORTEST, 10 * epoch)
    stress = {"dataset": {"stress": start.trains_stress}}
    return {
        "job": {
            "run_dir": str(run.parent),
            "run_name": "finetune",
            "timestamp_id": "${now:%Y%m%d-%H%M%S-%f}",
            "seed": "${seed}",
        },
        "seed": options.seed,
        "epochs": None,
        "steps": steps,
        "lr": options.lr or default_lr(options, start.config.hidden_size),
        "max_atoms": int(max_atoms),
        "start": str(run / "start.pt"),
        "freeze": list(options.freeze),
        "layer_decay": options.layer_decay,
        "lora_rank": options.lora_rank,
        "optim": {
            "weight_decay": 1e-3,
            "warmup_factor": 0.02,
            "warmup_epochs": round(0.05 * steps / epoch, 3),
            "lr_min_factor": 0.01,
            "clip_grad_norm": 10,
            "ema_decay": 0.99,
        },
        "evaluate_every_n_steps": max(1, steps // 5),
        "checkpoint_every_n_steps": max(1, steps // 2),
        "dataset": {"name": start.label, "train": str(folders[0]), "val": str(folders[1])},
        "train_dataloader": stress,
        "eval_dataloader": stress,
        "backbone": start.model["backbone"],
        "heads": start.model["heads"],
        "properties": start.task,
        "tasks": [f"${{properties.{name}}}" for name in start.task],
    }


def steps_per_epoch(natoms: np.ndarray, max_atoms: int, options: Options) -> int:
    """Steps that take all ranks together once over the training frames, in the sampler's batches.

    Args:
        natoms: Atoms of each frame.
        max_atoms: Atoms per batch.
        options: Of the run: its cluster, seed and settings count.

    Raises:
        UserError: Ranks or batches per step are no whole numbers.
    """
    from fairchem.core.datasets.samplers.max_atom_distributed_sampler import get_batches
    from omegaconf import OmegaConf

    group = files("escaip_fairchem") / "configs" / "cluster" / f"{options.cluster}.yaml"
    given = OmegaConf.from_dotlist(list(options.settings))
    config = OmegaConf.merge(OmegaConf.load(str(group)), {"accumulate": 1}, given)
    scheduler, accumulate = config.job.scheduler, config.accumulate
    counts = (scheduler.num_nodes, scheduler.ranks_per_node, accumulate)
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise UserError(
            "num_nodes, ranks_per_node and accumulate must be whole numbers above 0, got "
            f"{', '.join(map(str, counts))}"
        )
    order = np.random.default_rng(options.seed).permutation(len(natoms))
    batches = len(get_batches(natoms[order], order, max_atoms, 0)[0])
    batches_per_rank = math.ceil(batches / (scheduler.num_nodes * scheduler.ranks_per_node))
    return math.ceil(batches_per_rank / accumulate)


def run_name(run: Path) -> str:
    """Hydra's override that names a run's folder; unquoted, 2026_11_21 would be a number."""
    name = run.name.replace('"', r"\"")
    return f'job.timestamp_id="{name}"'


def default_lr(options: Options, width: int) -> float:
    """A learning rate by what is trained, lower for a wider model by the root of its width.

    Of width 64 the rates were compared, see docs/finetuning.md; the rest is a rule of thumb,
    which gives 5e-4 at the width of 1024.
    """
    rate = RATES["lora" if options.lora_rank else options.optimizer]
    return float(f"{rate * (64 / width) ** 0.5:.1e}")
