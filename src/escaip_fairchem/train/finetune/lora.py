"""Low-rank updates of weights by peft, for layers whose weight is read as well as called."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from torch import nn

from escaip_fairchem.layers import ConcatLinear

if TYPE_CHECKING:
    from torch import Tensor

    from escaip_fairchem.model import EScAIP


class LoraLinear(lora.Linear):
    """peft's layer whose ``weight`` is W + B A.

    The model hardly ever calls its linear layers: it hands their weights to functions that keep
    less for the backward pass. peft's own ``weight`` is the frozen W, so that its update would
    be left out without a word.
    """

    @property
    def weight(self) -> Tensor:
        """[out, in], differentiable by the update."""
        weight = self.get_base_layer().weight
        return weight if self.merged else weight + self.get_delta_weight("default")

    def weights(self) -> tuple[Tensor, ...]:
        """As `ConcatLinear.weights`."""
        return self.weight.split(self.get_base_layer().sizes, dim=1)


def inject(model: EScAIP, rank: int, frozen: tuple[str, ...]) -> None:
    """Put an update on every linear layer of the backbone that is larger than it, in place.

    Trained afterwards: the updates, and the output heads unless they are frozen.

    Args:
        model: The model.
        rank: Of the updates.
        frozen: First parts of the names of parameters that get no update.
    """
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith("backbone.")
        and not f"{name}.".startswith(frozen)
        and rank < min(module.in_features, module.out_features)
    ]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if targets:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        config._register_custom_module({ConcatLinear: LoraLinear, nn.Linear: LoraLinear})
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        heads = name.startswith("output_heads.") and name in trained
        parameter.requires_grad_(".lora_" in name or heads)
