"""What is known of a training step whose loss or gradient is not finite."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io import write
from fairchem.core.common import distutils

from escaip_fairchem.data.energies import exact_energy
from escaip_fairchem.train.checkpoints import gathered

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fairchem.core.datasets.atomic_data import AtomicData
    from torch import Tensor

#: Steps left out in a row that end a run, with ``on_nan: skip``.
MOST_SKIPPED = 10


def report(
    run: Path, step: int, batches: Sequence[AtomicData], losses: Sequence[dict[str, Tensor]],
    **numbers: float,
) -> Path:  # fmt: skip
    """Save the batches of a step, with what was computed of them; all ranks do this together.

    Args:
        run: Folder of the run.
        step: Steps completed before it.
        batches: Those of this rank.
        losses: Loss of each task, for each batch.
        **numbers: More about the step, such as the learning rate.

    Returns:
        ``nan_step_{step}.json`` in the folder, beside which lies an extxyz file of the structures.
    """
    mine = []
    for index, (batch, loss) in enumerate(zip(batches, losses, strict=True)):
        about = {
            "rank": distutils.get_rank(),
            "batch": index,
            "loss": {name: float(value) for name, value in loss.items()},
            "sid": [str(sid) for sid in batch.get("sid", [])],
            "dataset": list(batch.dataset),
            "natoms": batch.natoms.tolist(),
        }
        mine.append((about, structures(batch)))
    path = run / f"nan_step_{step}.json"
    found = [pair for part in gathered(mine) for pair in part]
    if distutils.is_master():
        content = {"step": step, **numbers, "batches": [about for about, _ in found]}
        path.write_text(json.dumps(content, indent=1) + "\n")  # NaN, as Python reads it
        frames = [atoms for _, part in found for atoms in part]
        write(path.with_suffix(".extxyz"), frames, write_results=True)
    return path


def structures(batch: AtomicData) -> list[Atoms]:
    """The structures of a batch with their labels in eV and eV/A.

    fairchem's own conversion refuses energies in float64.
    """
    batch = batch.to("cpu")
    labels = {"energy": exact_energy(batch)} if "energy" in batch else {}
    labels |= {name: batch[name] for name in ("forces", "stress") if name in batch}
    sids = batch.get("sid", [])
    frames = []
    for index in range(len(batch.natoms)):
        mine = batch.batch == index
        atoms = Atoms(
            batch.atomic_numbers[mine].numpy(),
            batch.pos[mine].detach().numpy(),
            cell=batch.cell[index].detach().numpy(),
            pbc=batch.pbc[index].numpy(),
            tags=batch.tags[mine].numpy(),
            constraint=FixAtoms(mask=batch.fixed[mine].bool().numpy()),
            info={"sid": str(sids[index])} if len(sids) else {},
        )
        results: dict[str, Any] = {}
        for name, value in labels.items():
            if name == "forces":
                results[name] = value[mine].numpy()
            elif name == "energy":
                results[name] = float(value[index])
            else:
                results[name] = value[index].reshape(3, 3).numpy()
        atoms.calc = SinglePointCalculator(atoms, **results)
        frames.append(atoms)
    return frames
