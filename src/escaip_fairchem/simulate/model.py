"""The model of a simulation: its calculator, and what must be known of it."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from escaip_fairchem.describe import describe_task, find_checkpoint, load_safely
from escaip_fairchem.inference import calculator
from escaip_fairchem.predict.data import sha256_of
from escaip_fairchem.predict.references import choose_task

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ase.calculators.calculator import Calculator


@dataclass
class Model:
    """What a simulation evaluates structures with.

    Attributes:
        calculator: ASE's.
        name: For messages.
        conservative: Whether forces are the gradient of the energy.
        references: Reference energy of each atomic number, eV; none where the labels were not
            total energies.
        settings: What results depend on, as plain values.
    """

    calculator: Calculator
    name: str
    conservative: bool = True
    references: dict[int, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        checkpoint: Path,
        *,
        task: str | None = None,
        device: str | None = None,
        float64: bool = False,
        remove_net_force: bool = False,
        d3: str | None = None,
        compile: bool | str = False,  # noqa: A002
    ) -> Model:
        """Load a checkpoint.

        Args:
            checkpoint: Inference checkpoint, its folder, or the folder of a run.
            task: As of `escaip_fairchem.calculator`.
            device: As there.
            float64: Evaluate in double precision.
            remove_net_force: As there.
            d3: As there.
            compile: As there.

        Raises:
            UserError: As there, or nothing to load.
        """
        import torch

        path = find_checkpoint(checkpoint)
        tasks = [describe_task(each) for each in load_safely(path).tasks_config]
        task = choose_task(tasks, task)
        with _without_notes():
            used = calculator(
                path,
                task=task,
                device=device,
                dtype=torch.float64 if float64 else torch.float32,
                remove_net_force=remove_net_force,
                d3=d3,
                compile=compile,
            )
        (energy,) = (t for t in tasks if t["property"] == "energy" and task in t["datasets"])
        settings = {
            "checkpoint": str(path),
            "checkpoint_sha256": sha256_of(path),
            "task": task,
            "float64": float64,
            "remove_net_force": remove_net_force,
            "d3": d3,
        }
        if compile:  # rounds differently
            settings["compile"] = compile
        return cls(used, str(path), used.conservative, energy["references"], settings)

    @property
    def has_stress(self) -> bool:
        """Whether stress is predicted."""
        return "stress" in self.calculator.implemented_properties

    def warn_if_direct(self, consequence: str) -> None:
        """Print a line if forces are not the gradient of the energy."""
        if not self.conservative:
            warn(f"{self.name} has direct forces, not the gradient of its energy: {consequence}")


def warn(line: str) -> None:
    """Print a warning."""
    print(f"escaip: warning: {line}", file=sys.stderr)


@contextmanager
def _without_notes() -> Iterator[None]:
    """Hold back what fairchem notes of every model; what matters is said by the commands."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
