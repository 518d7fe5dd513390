"""The checkpoint that a fine-tuning starts from, reduced to one data set's plain tasks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from escaip_fairchem.data.references import NUM_REFERENCES
from escaip_fairchem.describe import find_checkpoint, load_safely, read_config
from escaip_fairchem.errors import UserError
from escaip_fairchem.train.denoising import belongs_to_denoising
from escaip_fairchem.train.finetune.conservative import conservative_head, is_conservative
from escaip_fairchem.train.finetune.model import average_weights

if TYPE_CHECKING:
    from pathlib import Path

    from escaip_fairchem.config import EScAIPConfig

_PROPERTIES = ("energy", "forces", "stress")


@dataclass
class Start:
    """A model and the tasks it was trained for.

    Attributes:
        model: Arguments of `EScAIP` (backbone, heads), plain.
        tasks: Configurations of fairchem's tasks, named energy, forces and stress, plain.
        label: fairchem's name of the data set.
        references: Energies of elements that the model adds, eV, (120,).
        seen: Atomic numbers it was trained on, as far as its weights tell.
        checkpoint: fairchem's inference checkpoint, consistent with the above.
        config: Configuration of the backbone, its preset filled in.
        denoising: Number of parameters that stay behind because they served denoising.
    """

    model: dict[str, Any]
    tasks: list[dict[str, Any]]
    label: str
    references: np.ndarray
    seen: set[int]
    checkpoint: Any
    config: EScAIPConfig
    denoising: int

    @property
    def task(self) -> dict[str, dict[str, Any]]:
        """The tasks by property."""
        return {task["property"]: task for task in self.tasks}

    @property
    def conservative(self) -> bool:
        """Whether forces are derivatives of the energy."""
        return conservative_head(self.model["heads"]) is not None

    @property
    def trains_stress(self) -> bool:
        """Whether stress is among what is trained."""
        return "stress" in self.task and not self.task["stress"].get("inference_only")

    def set_references(self, values: np.ndarray) -> None:
        """Replace the energies of elements, eV, (120,)."""
        self.references = values
        self.task["energy"]["element_references"] = {
            "_target_": "fairchem.core.modules.normalization.element_references.ElementReferences",
            "element_references": {"_target_": "torch.DoubleTensor", "_args_": [values.tolist()]},
        }

    def without_stress(self) -> None:
        """Give up training stress: a derivative stays, a head of its own goes."""
        if self.conservative:
            self.task["stress"]["inference_only"] = True
            return
        self.tasks.remove(self.task["stress"])
        self.model["heads"].pop("stress")
        weights = self.checkpoint.ema_state_dict
        self.checkpoint.ema_state_dict = {
            name: value for name, value in weights.items() if "output_heads.stress." not in name
        }

    def save(self, path: Path) -> None:
        """Write it as an inference checkpoint of fairchem."""
        weights = self.checkpoint.ema_state_dict
        self.checkpoint.model_state_dict = average_weights(self.checkpoint)
        self.checkpoint.ema_state_dict = weights
        self.checkpoint.model_config = copy.deepcopy(self.model)
        self.checkpoint.tasks_config = copy.deepcopy(self.tasks)
        torch.save(self.checkpoint, path)


def read_start(path: Path, label: str | None = None) -> Start:
    """Read a checkpoint to fine-tune.

    Tasks and heads are renamed to energy, forces and stress, and everything that belongs to
    other data sets is left out.

    Args:
        path: Inference checkpoint of this package, or the folder of a run (its newest is taken).
        label: The data set whose tasks to take, if the checkpoint knows several.

    Raises:
        UserError: No such checkpoint, another model's, or `label` is needed or unknown.
    """
    path = find_checkpoint(path)
    checkpoint = load_safely(path)
    model = _plain(checkpoint.model_config)
    model["backbone"].pop("force_encoding", None)  # stays behind, like all that served denoising
    config = read_config(path, model["backbone"])
    if checkpoint.ema_state_dict is None:
        raise UserError(f"{path} has no averaged weights; train with ema_decay=0 or above")
    tasks, label = _tasks_of(_plain(list(checkpoint.tasks_config)), label, path)
    # read before the weights of other data sets are left out
    seen = _elements_seen(checkpoint)
    names = _rename(model, tasks)
    weights = checkpoint.ema_state_dict
    denoising = sum(weights[name].numel() for name in weights if belongs_to_denoising(name))
    checkpoint.ema_state_dict = _renamed(checkpoint.ema_state_dict, names)
    references = _references(next(task for task in tasks if task["property"] == "energy"))
    start = Start(model, tasks, label, references, seen, checkpoint, config, denoising)
    start.set_references(references)
    start.seen |= set(np.flatnonzero(references).tolist())
    return start


def _plain(value: Any) -> Any:
    """Plain dictionaries and lists, interpolations resolved."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.create(value), resolve=True)


def _tasks_of(tasks: list[dict], label: str | None, path: Path) -> tuple[list[dict], str]:
    """The tasks of one data set, and its label."""
    labels = sorted({name for task in tasks for name in task["datasets"]})
    if label is None and len(labels) == 1:
        label = labels[0]
    if label not in labels:
        raise UserError(f"--task {label}: {path} knows {', '.join(labels)}; name one with --task")
    chosen = [task for task in tasks if label in task["datasets"]]
    by_property = {task["property"]: task for task in chosen if task["property"] in _PROPERTIES}
    if not {"energy", "forces"} <= set(by_property):
        raise UserError(f"{path} has no energy and forces for {label}; it cannot be fine-tuned")
    return [dict(task, datasets=[label]) for task in by_property.values()], label


def _rename(model: dict, tasks: list[dict]) -> dict[str, str]:
    """Name tasks and heads after their property, in place; returns {old head: new head}."""
    properties = {task["name"]: task["property"] for task in tasks}
    names, heads = {}, {}
    for name, head in model["heads"].items():
        if is_conservative(head):
            head.pop("prefix", None)
            names[name] = name
        elif name in properties:
            names[name] = properties[name]
        else:
            continue
        heads[names[name]] = head
    model["heads"] = heads
    for task in tasks:
        task["name"] = task["property"]
    return names


def _renamed(weights: dict, names: dict[str, str]) -> dict:
    """Weights under the new names of the heads, without those of heads that are left out."""
    kept = {}
    for key, value in weights.items():
        before, found, rest = key.partition("output_heads.")
        head, _, inner = rest.partition(".")
        if belongs_to_denoising(key):
            continue
        if not found:
            kept[key] = value
        elif head in names:
            kept[f"{before}output_heads.{names[head]}.{inner}"] = value
    return kept


def _references(task: dict) -> np.ndarray:
    """Energies of elements that an energy task adds, eV, (120,)."""
    import hydra

    values = np.zeros(NUM_REFERENCES)
    if task.get("element_references"):
        stored = hydra.utils.instantiate(task["element_references"]).element_references.numpy()
        values[: len(stored)] = stored[:NUM_REFERENCES]
    return values


def _elements_seen(checkpoint: Any) -> set[int]:
    """Elements whose embedding was trained: its last value differs from its average.

    Without an average of its own (``ema_decay=0``) nothing differs, and the answer is empty.
    """
    last, average = checkpoint.model_state_dict, average_weights(checkpoint)
    name = "backbone.input_block.attributes.source_species.weight"
    value = next((tensor for key, tensor in last.items() if key.endswith(name)), None)
    if value is None:
        return set()
    return set(torch.nonzero((value != average[name]).any(1))[:, 0].tolist())
