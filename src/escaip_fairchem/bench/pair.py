"""fairchem's built-in EScAIP beside this package's, on the same weights and batches."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.models.base import HydraModel

from escaip_fairchem.checkpoint import convert_state_dict
from escaip_fairchem.model import EScAIP

if TYPE_CHECKING:
    from ase import Atoms
    from torch import Tensor

BUILTIN = "fairchem.core.models.escaip.EScAIP."

#: Standard deviation of what is added to the initial weights, so that none is zero.
PERTURBATION = 0.02


def builtin_config(
    *, direct: bool, stress: bool = False, use_pbc: bool = True, **changes: Any
) -> dict[str, Any]:
    """Backbone keys of the built-in model as shipped, but without padding and compilation.

    Args:
        direct: Forces by a head of their own instead of by differentiation.
        stress: Stress as well, by differentiation.
        use_pbc: False treats every structure as a molecule, in both models.
        **changes: Keys that replace or add to those of the result.

    Returns:
        The keys, which this package's backbone reads too.
    """
    config = {
        "regress_forces": True,
        "direct_forces": direct,
        "regress_stress": stress,
        "use_pbc": use_pbc,
        "hidden_size": 512,
        "num_layers": 10,
        "atten_num_heads": 8,
        "atten_name": "memory_efficient" if direct else "math",
        "max_num_elements": 110,
        "max_atoms": 300,
        "max_batch_size": 64,
        "max_radius": 6.0,
        "knn_k": 30,
        "knn_soft": True,
        "knn_sigmoid_scale": 0.2,
        "knn_lse_scale": 0.1,
        "knn_use_low_mem": True,
        "knn_pad_size": 45,
        "use_compile": False,
        "use_padding": False,
    }
    return config | changes


def model_pair(config: dict[str, Any], seed: int = 0, **own_keys: Any) -> tuple[HydraModel, EScAIP]:
    """The built-in model with random weights away from their start, and ours with the same.

    Args:
        config: Backbone keys, from `builtin_config`.
        seed: Of the weights.
        **own_keys: Backbone keys that only ours has.

    Returns:
        The built-in model and ours, in eval mode.
    """
    torch.manual_seed(seed)
    direct = config["direct_forces"]
    if direct:
        heads = {"energy": "EScAIPEnergyHead", "forces": "EScAIPDirectForceHead"}
        heads = {name: {"module": BUILTIN + cls} for name, cls in heads.items()}
    else:
        # wrap_property: True crashes upstream (a dict is taken for a tensor)
        cls = BUILTIN + "EScAIPGradientEnergyForceStressHead"
        heads = {"efs": {"module": cls, "wrap_property": False}}
    reference = HydraModel(
        backbone={"model": BUILTIN + "EScAIPBackbone", **copy.deepcopy(config)},
        heads=heads,
        pass_through_head_outputs=not direct,
    )
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(PERTURBATION * torch.randn_like(parameter))
    own = own_model(config | own_keys)
    own.load_state_dict(convert_state_dict(reference.state_dict(), conservative=not direct))
    return reference.eval(), own.eval()


def own_model(config: dict[str, Any]) -> EScAIP:
    """This package's model with the built-in's keys; its weights are random."""
    return EScAIP(**own_model_config(config))


def own_model_config(config: dict[str, Any]) -> dict[str, Any]:
    """Backbone and heads of `own_model`, as a checkpoint stores them."""
    direct = config["direct_forces"]
    if direct:
        heads = {
            "energy": {"module": "escaip_fairchem.EnergyHead"},
            "forces": {"module": "escaip_fairchem.DirectForceHead"},
        }
    else:
        heads = {"efs": {"module": "escaip_fairchem.ConservativeHead"}}
    backbone = {"model": "escaip_fairchem.EScAIPBackbone", "preset": "v2"}
    return {"backbone": backbone | {"energy_head_norm": direct} | config, "heads": heads}


def batch_of(structures: list[Atoms]) -> AtomicData:
    """Fairchem's batch of the structures."""
    return atomicdata_list_to_batch([AtomicData.from_ase(a, task_name="oc20") for a in structures])


def outputs(model: torch.nn.Module, batch: AtomicData) -> dict[str, Tensor]:
    """{property: tensor} of either model, computed on a copy of the batch."""
    return plain_outputs(model(batch.clone()))


def plain_outputs(result: dict[str, Any]) -> dict[str, Tensor]:
    """{property: tensor} from either model's result."""
    return {k: v[k] if isinstance(v, dict) else v for k, v in result.items()}
