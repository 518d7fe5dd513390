"""From a checkpoint to an ASE calculator."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    import torch
    from fairchem.core import FAIRChemCalculator


def calculator(
    checkpoint: str | Path,
    *,
    task: str | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> FAIRChemCalculator:
    """An ASE calculator of a trained model.

    Args:
        checkpoint: Inference checkpoint (``inference_ckpt.pt``) of a run.
        task: Dataset whose tasks are evaluated; needed if the model knows several.
        device: ``cpu`` or ``cuda``; a GPU if there is one by default.
        dtype: ``torch.float32`` (default) or ``torch.float64``.

    Returns:
        fairchem's calculator; energies in eV, forces in eV/A, stress in eV/A^3 (ASE's sign).

    Raises:
        UserError: The file is missing or no checkpoint, or `task` is needed or unknown.
    """
    import torch
    from fairchem.core import FAIRChemCalculator
    from fairchem.core.units.mlip_unit import InferenceSettings, load_predict_unit

    path = Path(checkpoint)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; a run writes checkpoints/*/inference_ckpt.pt")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is no checkpoint; a run writes checkpoints/*/inference_ckpt.pt")
    settings = InferenceSettings(compile=False, base_precision_dtype=dtype or torch.float32)
    unit = load_predict_unit(
        path,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        inference_settings=settings,
    )
    known = sorted(unit.dataset_to_tasks)
    if task is None and len(known) == 1:
        task = known[0]
    if task not in known:
        raise UserError(f"task {task!r}: the checkpoint knows {', '.join(known)}; name one")
    return FAIRChemCalculator(unit, task_name=task)
