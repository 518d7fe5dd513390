"""What is known of a training step whose loss or gradient is not finite."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io import write
from fairchem.core.common import distutils

from escaip_fairchem.data.corruption import LABELLED, NOISE
from escaip_fairchem.data.energies import exact_energy
from escaip_fairchem.errors import UserError
from escaip_fairchem.train.checkpoints import gathered
from escaip_fairchem.train.later import Later

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fairchem.core.datasets.atomic_data import AtomicData
    from torch import Tensor

#: Steps left out in a row that end a run, with ``on_nan: skip``.
MOST_SKIPPED = 10


class FiniteCheck:
    """Looks whether gradients are finite, as they are not where a loss is not.

    Ranks see the same gradient, so they agree without a word. On a GPU the norm of a step is
    looked at when the next step, an evaluation or a checkpoint begins, so that the GPU need not
    wait; weights that a step spoilt are then thrown away, and the newest checkpoint is without
    it. To leave a step out it must be looked at before the weights move, which makes the GPU wait
    at each step.

    Args:
        run: Folder of the run, for what is known of such a step.
        on_nan: ``stop`` the run there, or ``skip`` the step.

    Raises:
        UserError: `on_nan` is something else.
    """

    def __init__(self, run: Path, on_nan: str) -> None:
        if on_nan not in ("stop", "skip"):
            raise UserError(f"on_nan must be stop or skip, got {on_nan}")
        self._run, self._on_nan = run, on_nan
        self._skipped = 0  # steps in a row
        self._norm = Later()

    def put(
        self,
        norm: Tensor,
        batches: Sequence[AtomicData],
        losses: Sequence[dict[str, Tensor]],
        *,
        step: int,
        rate: float,
    ) -> bool:
        """Hand over a step before the weights move; whether they may.

        Args:
            norm: Of the gradient.
            batches: Those of this rank.
            losses: Loss of each task, for each batch.
            step: Steps completed before it.
            rate: The learning rate.
        """
        self._step = step, batches, losses, rate
        self._norm.put(norm)
        return True if norm.is_cuda and self._on_nan == "stop" else self.look()

    def look(self) -> bool:
        """Whether the last step was finite; each is looked at once.

        Raises:
            UserError: It was not, and `on_nan` is ``stop`` or too many steps were left out.
        """
        norm = self._norm.take()
        if norm is None:
            return True
        if norm.isfinite():
            self._skipped = 0
            return True
        step, batches, losses, rate = self._step
        path = report(self._run, step, batches, losses, lr=rate, grad_norm=float(norm))
        self._skipped += 1
        what = f"step {step}: the loss or its gradient is not finite; its structures are in {path}"
        if self._on_nan == "stop":
            raise UserError(
                f"{what}; look at their labels and distances, lower lr or optim.clip_grad_norm, or "
                "set on_nan=skip to leave such steps out"
            )
        if self._skipped >= MOST_SKIPPED:
            raise UserError(f"{what}; {self._skipped} steps in a row were left out; lower lr")
        if distutils.is_master():
            logging.warning(f"{what}; it was left out")
        return False


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
    """The structures of a batch as the model saw them, with their labels in eV and eV/A.

    With denoising the array ``noise`` says how far atoms were moved, A; forces are those before.
    fairchem's own conversion refuses energies in float64.
    """
    batch = batch.to("cpu")
    labels = {"energy": exact_energy(batch)} if "energy" in batch else {}
    labels |= {name: batch[name] for name in ("forces", "stress") if name in batch}
    if LABELLED in batch:
        labels["forces"] = batch[LABELLED]
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
        if NOISE in batch:
            atoms.set_array("noise", batch[NOISE][mine].nan_to_num(posinf=0.0).numpy())
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
