"""Models that are measured in turn on the same batches: time, saved bytes, peak memory."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from escaip_fairchem.bench.measure import (
    Call,
    Spread,
    interleaved,
    kept_attention_switches,
    peak_bytes,
    precision,
    saved_bytes,
)
from escaip_fairchem.bench.pair import batch_of, plain_outputs
from escaip_fairchem.bench.report import Row

if TYPE_CHECKING:
    from collections.abc import Callable

    from ase import Atoms
    from fairchem.core.datasets.atomic_data import AtomicData

    from escaip_fairchem.bench.settings import Settings

#: Unit of a row -> how many of it a second or a byte is.
SCALES = {"ms": 1e3, "MiB": 1 / 2**20}

#: What can be measured -> its unit.
QUANTITIES = {
    "forward": "ms",
    "train": "ms",
    "peak of inference": "MiB",
    "saved for backward": "MiB",
    "peak of training": "MiB",
}


class Models:
    """Models that are measured in turn on the same batches.

    Args:
        settings: Kind, device, precision, repeats, and the columns of the rows.
        models: Name -> model; fairchem's batch -> outputs.
        reference: Name of the model that the column ``ratio`` refers to.
        note: Added to the column ``config``.
    """

    def __init__(
        self,
        settings: Settings,
        models: dict[str, torch.nn.Module],
        reference: str,
        note: str = "",
    ) -> None:
        self.settings, self.reference, self.note = settings, reference, note
        self.device = settings.torch_device
        self.models = {name: model.to(self.device) for name, model in models.items()}

    def rows(
        self,
        quantities: tuple[str, ...],
        structures: list[Atoms],
        names: tuple[str, ...] | None = None,
    ) -> list[Row]:
        """Measure one batch.

        Args:
            quantities: Names from `QUANTITIES`.
            structures: The batch.
            names: The models to measure; all by default.

        Returns:
            A row of each quantity and model.

        Raises:
            UserError: The models differ, if they should agree.
        """
        names = names or tuple(self.models)
        errors = self.errors(structures) if len(names) == len(self.models) else {}
        rows = []
        for quantity in quantities:
            spreads = self._measured(quantity, structures, names)
            rows += [self._row(n, quantity, spreads, structures, errors.get(n)) for n in spreads]
        return rows

    def errors(self, structures: list[Atoms]) -> dict[str, float]:
        """Differences that go into the rows; different models have none."""
        return {}

    def _row(
        self,
        name: str,
        quantity: str,
        spreads: dict[str, Spread],
        structures: list[Atoms],
        error: float | None,
    ) -> Row:
        unit = QUANTITIES[quantity]
        spread, scale = spreads[name], SCALES[unit]
        compared = name != self.reference and self.reference in spreads
        common = self.settings.columns()
        return Row(
            model=name,
            quantity=quantity,
            unit=unit,
            systems=len(structures),
            atoms=sum(map(len, structures)),
            min=scale * spread.min,
            median=scale * spread.median,
            max=scale * spread.max,
            repeats=spread.repeats,
            ratio=spreads[self.reference].min / spread.min if compared else None,
            error=error,
            common=common | {"config": common["config"] + self.note},
        )

    def _measured(
        self, quantity: str, structures: list[Atoms], names: tuple[str, ...]
    ) -> dict[str, Spread]:
        """Seconds or bytes of each model."""
        self.set_training(quantity not in ("forward", "peak of inference"))
        batch = batch_of(structures).to(self.device)
        step = {
            "forward": self._forward,
            "train": self._train_step,
            "peak of inference": self._forward,
            "peak of training": self._train_step,
            "saved for backward": lambda model, batch: model(batch),
        }[quantity]
        steps = {name: partial(step, self.models[name]) for name in names}
        with precision(self.settings.precision, self.device):
            if QUANTITIES[quantity] == "ms":
                calls = {name: Call(batch.clone, step) for name, step in steps.items()}
                return interleaved(calls, self.settings.repeats, self.device)
            return {
                name: Spread.of([self._bytes(quantity, partial(step, batch.clone()), name)])
                for name, step in steps.items()
            }

    def _bytes(self, quantity: str, run: Callable[[], Any], name: str) -> int:
        model = self.models[name]
        with kept_attention_switches():
            if quantity == "saved for backward":
                return saved_bytes(run, model)
            if self.device.type == "cuda":
                run()  # what a first call sets up for good is not of the call
            peak = peak_bytes(run, self.device)
            model.zero_grad(set_to_none=True)
            return peak

    def _forward(self, model: torch.nn.Module, batch: AtomicData) -> None:
        with self.gradients():
            model(batch)

    def _train_step(self, model: torch.nn.Module, batch: AtomicData) -> None:
        """Forward, a loss of energy and forces, backward; without the optimizer's step."""
        model.zero_grad(set_to_none=True)
        result = plain_outputs(model(batch))
        labelled = [result[key] for key in ("energy", "forces", "stress") if key in result]
        loss = sum(value.float().square().mean() for value in labelled)
        with torch.autocast(self.device.type, enabled=False):  # it is for forwards only
            loss.backward()

    def set_training(self, training: bool) -> None:
        """Train or eval; as in inference, weights need no gradient unless training."""
        for model in self.models.values():
            model.train(training).requires_grad_(training)

    def gradients(self) -> torch.autograd.grad_mode.set_grad_enabled:
        """Gradients off for direct forces, as fairchem's inference does."""
        return torch.set_grad_enabled(not self.settings.direct)
