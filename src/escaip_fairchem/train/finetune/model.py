"""What a fine-tuning recipe builds: a model from weights, with frozen parts, and its unit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.common import distutils

from escaip_fairchem.describe import describe_task, find_checkpoint, load_safely
from escaip_fairchem.errors import UserError
from escaip_fairchem.files import whole_file
from escaip_fairchem.model import EScAIP
from escaip_fairchem.train.denoising import fit_denoising
from escaip_fairchem.train.finetune.conservative import as_conservative, conservative_head
from escaip_fairchem.train.scales import require_scale_of_start
from escaip_fairchem.train.unit import TrainEvalUnit

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor, nn

#: Arguments of `build_model` that say how to train; the rest describes the model.
_TRAINING_KEYS = ("start", "freeze", "lora_rank")


def build_model(
    *, start: str | None, freeze: Sequence[str] = (), lora_rank: int = 0, **model: Any
) -> EScAIP:
    """The model of a checkpoint, ready to be trained further.

    A conservative model may begin with the weights of a direct one, see `as_conservative`.

    Args:
        start: Inference checkpoint whose weights (their average, if it has one) to begin with, or
            the folder of a run (its newest is taken).
        freeze: Parts that stay as they are, by the names of `part_names`.
        lora_rank: Rank of the updates to the weights of linear layers (Hu et al., arXiv
            2106.09685); 0 trains the weights themselves. The output heads are trained in full.
        **model: Arguments of `EScAIP`, which must be those of the checkpoint's model.

    Returns:
        The model. Parameters that are not trained have ``requires_grad`` False. Its ``start_tasks``
        are what the checkpoint was trained for, see `describe_task`.

    Raises:
        UserError: No checkpoint, weights that do not fit, an unknown part, nothing left to train,
            no peft.
    """
    if start is None:
        raise UserError("no checkpoint to begin with; add start=RUN, the folder of a training")
    checkpoint = load_safely(find_checkpoint(Path(start)))
    weights = average_weights(checkpoint)
    built = EScAIP(**model)
    weights = fit_denoising(weights, built)
    head = conservative_head(model["heads"])
    if head is not None and conservative_head(checkpoint.model_config["heads"]) is None:
        weights = as_conservative(weights, checkpoint.model_config, head)
    built.start_tasks = [describe_task(task) for task in checkpoint.tasks_config]
    try:
        built.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the weights of {start} do not fit the model: {reason}") from error
    frozen = tuple(prefix for name in freeze for prefix in part_prefixes(built, name))
    for name, parameter in built.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    if lora_rank:
        add_adapters(built, lora_rank, frozen)
    if not any(parameter.requires_grad for parameter in built.parameters()):
        raise UserError(f"freeze={','.join(freeze)} leaves nothing to train; freeze fewer parts")
    return built


def add_adapters(model: EScAIP, rank: int, frozen: tuple[str, ...]) -> None:
    """Give the backbone's linear layers low-rank updates, by peft."""
    try:
        from escaip_fairchem.train.finetune.lora import inject
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise UserError(
            "low-rank updates (--lora) need peft: pip install 'escaip-fairchem[finetune]'"
        ) from error
    inject(model, rank, frozen)


def average_weights(checkpoint: Any) -> dict[str, Tensor]:
    """Weights of an inference checkpoint by the model's own names; averaged ones if it has them."""
    weights = checkpoint.ema_state_dict or checkpoint.model_state_dict
    return {
        re.sub(r"^(module\.)+", "", name): value
        for name, value in weights.items()
        if name != "n_averaged"
    }


def part_names(model: EScAIP) -> list[str]:
    """Names of the parts that can be frozen."""
    blocks = [f"blocks.{index}" for index in range(len(model.backbone.blocks))]
    heads = [f"heads.{name}" for name in model.output_heads]
    return ["backbone", "embedding", "attributes", "blocks", *blocks, "readout", "heads", *heads]


def part_prefixes(model: EScAIP, part: str) -> list[str]:
    """First parts of the names of the parameters that belong to a part.

    Args:
        model: The model.
        part: A name of `part_names`, or several blocks as ``blocks.0-3``.

    Raises:
        UserError: An unknown name.
    """
    total = len(model.backbone.blocks)
    fixed = {
        "backbone": ["backbone."],
        "embedding": ["backbone.input_block."],
        "attributes": [f"backbone.blocks.{i}.attention.attributes." for i in range(total)],
        "blocks": ["backbone.blocks."],
        "readout": ["backbone.node_readout.", "backbone.edge_readout."],
        "heads": ["output_heads."],
        **{f"heads.{name}": [f"output_heads.{name}."] for name in model.output_heads},
    }
    if part in fixed:
        return fixed[part]
    blocks = re.fullmatch(r"blocks\.(\d+)(?:-(\d+))?", part)
    if blocks:
        first, last = int(blocks[1]), int(blocks[2] or blocks[1])
        if first <= last < total:
            return [f"backbone.blocks.{index}." for index in range(first, last + 1)]
    raise UserError(
        f"no part {part!r} to freeze; the model has {', '.join(part_names(model))} "
        "(several blocks: blocks.0-1)"
    )


def depth_from_output(name: str, num_layers: int) -> int:
    """How many layers lie between a parameter and the output.

    Args:
        name: Of the parameter, with or without ``module.`` of DDP.
        num_layers: Blocks of the model, L.

    Returns:
        0 for heads and readouts, 1 for the last block, L for the first, L + 1 for the embedding.
    """
    block = re.search(r"backbone\.blocks\.(\d+)\.", name)
    if block:
        return num_layers - int(block[1])
    return num_layers + 1 if "backbone.input_block." in name else 0


def decay_rates_by_layer(
    optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[str, nn.Parameter]], decay: float
) -> None:
    """Multiply each parameter's learning rate by ``decay`` to the power of its depth.

    Args:
        optimizer: Its groups are split, so that each holds one depth.
        parameters: Names and parameters of the model.
        decay: Above 0, at most 1.

    Raises:
        UserError: `decay` is out of range.
    """
    if not 0 < decay <= 1:
        raise UserError(f"layer_decay must be above 0 and at most 1, got {decay}")
    named = list(parameters)
    blocks = {m[1] for name, _ in named if (m := re.search(r"backbone\.blocks\.(\d+)\.", name))}
    depth = {id(p): depth_from_output(name, len(blocks)) for name, p in named}
    groups = []
    for group in optimizer.param_groups:
        for level in sorted({depth[id(p)] for p in group["params"]}):
            members = [p for p in group["params"] if depth[id(p)] == level]
            groups.append({**group, "params": members, "lr": group["lr"] * decay**level})
    optimizer.param_groups = groups


class FineTuneUnit(TrainEvalUnit):
    """The package's training unit for `build_model`; its inference checkpoints are plain ones.

    Args:
        args: As for `TrainEvalUnit`.
        layer_decay: Factor on the learning rate for every layer further from the output.
        kwargs: As for `TrainEvalUnit`.
    """

    def __init__(self, *args: Any, layer_decay: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = getattr(self.model, "module", self.model)  # of DDP
        require_scale_of_start(self.tasks, getattr(model, "start_tasks", []))
        if layer_decay != 1.0:
            decay_rates_by_layer(self.optimizer, self.model.named_parameters(), layer_decay)

    def save_state(self, checkpoint_location: str) -> None:
        """Save what resumes the run, and an inference checkpoint of a model like any other.

        Args:
            checkpoint_location: Folder to write.
        """
        super().save_state(checkpoint_location)
        path = Path(checkpoint_location) / "inference_ckpt.pt"
        if self.save_inference_ckpt and distutils.is_master() and path.exists():
            make_plain(path)


def make_plain(path: Path) -> None:
    """Rewrite a checkpoint of `build_model` as one of `EScAIP`, low-rank updates added up.

    Args:
        path: The inference checkpoint.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    model = {k: v for k, v in checkpoint.model_config.items() if k not in _TRAINING_KEYS}
    checkpoint.model_config = {**model, "_target_": "escaip_fairchem.EScAIP"}
    for name in ("model_state_dict", "ema_state_dict"):
        setattr(checkpoint, name, merged(getattr(checkpoint, name)))
    with whole_file(path) as partial:
        torch.save(checkpoint, partial)


def merged(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights without peft's names: each W with its update B A (scale 1) added.

    Args:
        weights: State of a model with or without low-rank updates.

    Returns:
        State of the model without.
    """
    plain = {}
    for name, value in weights.items():
        if ".lora_" in name:
            continue
        stem, found, kind = name.rpartition(".base_layer.")
        if not found:
            plain[name] = value
            continue
        plain[f"{stem}.{kind}"] = value
        if kind == "weight":
            a, b = (weights[f"{stem}.lora_{which}.default.weight"] for which in "AB")
            plain[f"{stem}.{kind}"] = value + b @ a
    return plain
