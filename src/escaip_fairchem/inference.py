"""From a checkpoint to an ASE calculator."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    import torch
    from fairchem.core.units.mlip_unit import MLIPPredictUnit

    from escaip_fairchem.ase_calculator import EScAIPCalculator


def calculator(
    checkpoint: str | Path,
    *,
    task: str | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    remove_net_force: bool = False,
    d3: str | None = None,
    neighbor_search: str | None = None,
    hessian: bool = False,
    compile: bool | str = False,  # noqa: A002
) -> EScAIPCalculator:
    """An ASE calculator of a trained model.

    Args:
        checkpoint: Inference checkpoint (``inference_ckpt.pt``) of a run.
        task: Dataset whose tasks are evaluated; needed if the model knows several.
        device: ``cpu`` or ``cuda``; a GPU if there is one by default.
        dtype: ``torch.float32`` (default) or ``torch.float64``.
        remove_net_force: Subtract the mean force from the force of each atom: the forces of a
            direct model do not sum to zero.
        d3: Functional whose DFT-D3(BJ) dispersion is added, such as ``pbe``; needs ``dftd3``.
        neighbor_search: As the key of the model, in place of what it was trained with.
        hessian: Also compute second derivatives of the energy at each evaluation, a backward
            pass for each coordinate: ``get_property("hessian")``, (3 N, 3 N).
        compile: True compiles the model at the first evaluation, which takes minutes and pays on
            a GPU in long simulations; ``"cuda-graphs"`` also spares the launching of kernels,
            for systems of up to some thousand atoms.

    Returns:
        fairchem's calculator; energies in eV, forces in eV/A, stress in eV/A^3 (ASE's sign).

    Raises:
        UserError: The file is missing or no checkpoint, `task` is needed or unknown, D3 is not
            installed or does not know the functional, or a Hessian is wanted of direct forces.
    """
    import torch
    from fairchem.core.units.mlip_unit import InferenceSettings, load_predict_unit

    from escaip_fairchem.ase_calculator import EScAIPCalculator
    from escaip_fairchem.ase_calculator import d3 as dispersion

    path = Path(checkpoint)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; a run writes checkpoints/*/inference_ckpt.pt")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is no checkpoint; a run writes checkpoints/*/inference_ckpt.pt")
    if compile not in (False, True, "cuda-graphs"):
        raise UserError(f"compile: {compile!r} is not one of False, True, 'cuda-graphs'")
    precision = dtype or torch.float32
    keys: dict[str, str | bool] = {
        "compile": bool(compile),
        "cuda_graphs": compile == "cuda-graphs",
    }
    if compile:  # of training only, and "block" is refused there
        keys["checkpointing"] = "pointwise"
    if neighbor_search:
        keys["neighbor_search"] = neighbor_search

    def load(**untrained: set[str]) -> MLIPPredictUnit:
        return load_predict_unit(
            path,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            inference_settings=InferenceSettings(
                compile=False, base_precision_dtype=precision, **untrained
            ),
            overrides={"backbone": dict(keys)},
        )

    unit = load()
    known = sorted(unit.dataset_to_tasks)
    if task is None and len(known) == 1:
        task = known[0]
    if task not in known:
        raise UserError(f"task {task!r}: the checkpoint knows {', '.join(known)}; name one")
    if hessian:
        if unit.model.module.backbone.regress_config.direct_forces:
            raise UserError("a Hessian needs a conservative model; this one has direct forces")
        unit = load(predict_untrained_hessian={task})
    return EScAIPCalculator(
        unit,
        task,
        remove_net_force=remove_net_force,
        dispersion=dispersion(d3) if d3 else None,
    )
