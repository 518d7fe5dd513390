"""``escaip bench forward|train|memory``: ours against the built-in, agreement first."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from escaip_fairchem.bench.measure import (
    Call,
    Spread,
    differences,
    interleaved,
    kept_attention_switches,
    peak_bytes,
    precision,
    refuse_if_different,
    saved_bytes,
)
from escaip_fairchem.bench.pair import batch_of, model_pair, outputs, plain_outputs
from escaip_fairchem.bench.report import Row

if TYPE_CHECKING:
    from collections.abc import Callable

    from ase import Atoms
    from fairchem.core.datasets.atomic_data import AtomicData

    from escaip_fairchem.bench.settings import Settings

BUILTIN, OURS = "built-in", "ours"

#: What can be measured -> its unit.
QUANTITIES = {
    "forward": "ms",
    "train": "ms",
    "peak of inference": "MiB",
    "saved for backward": "MiB",
    "peak of training": "MiB",
}


class Comparison:
    """Both models on the same weights, and what is measured of them on one batch.

    Args:
        settings: Size, kind, device, precision, repeats.
        note: Added to the column ``config``.
        **changes: Keys of the built-in's configuration, e.g. to pad as shipped.
    """

    def __init__(self, settings: Settings, note: str = "", **changes: Any) -> None:
        self.settings, self.note = settings, note
        self.device = settings.torch_device
        reference, own = model_pair(settings.config(**changes))
        self.models = {BUILTIN: reference.to(self.device), OURS: own.to(self.device)}

    def errors(self, structures: list[Atoms]) -> dict[str, float]:
        """Check that the models agree in float32, then say how far each is off as measured.

        Args:
            structures: The batch.

        Returns:
            Name of the model -> largest difference from the built-in in float32, relative to
            the largest value, of the worst output.

        Raises:
            UserError: The models differ.
        """
        self._set_training(False)
        batch = batch_of(structures).to(self.device)
        exact, reduced = (self._outputs(batch, p) for p in ("fp32", self.settings.precision))
        refuse_if_different(differences(exact[BUILTIN], exact[OURS]))
        return {
            name: max(differences(exact[BUILTIN], result).values())
            for name, result in reduced.items()
        }

    def _outputs(self, batch: AtomicData, numerics: str) -> dict[str, dict[str, torch.Tensor]]:
        with precision(numerics, self.device), kept_attention_switches(), self._gradients():
            return {name: outputs(model, batch) for name, model in self.models.items()}

    def rows(
        self,
        quantities: tuple[str, ...],
        structures: list[Atoms],
        names: tuple[str, ...] = (BUILTIN, OURS),
    ) -> list[Row]:
        """Measure one batch.

        Args:
            quantities: Names from `QUANTITIES`.
            structures: The batch.
            names: The models to measure; agreement is checked if both are named.

        Returns:
            A row of each quantity and model.

        Raises:
            UserError: The models differ.
        """
        errors = self.errors(structures) if len(names) == 2 else {}
        rows = []
        for quantity in quantities:
            spreads = self._measured(quantity, structures, names)
            rows += [self._row(n, quantity, spreads, structures, errors.get(n)) for n in spreads]
        return rows

    def _row(
        self,
        name: str,
        quantity: str,
        spreads: dict[str, Spread],
        structures: list[Atoms],
        error: float | None,
    ) -> Row:
        unit = QUANTITIES[quantity]
        spread, scale = spreads[name], {"ms": 1e3, "MiB": 1 / 2**20}[unit]
        both = name == OURS and BUILTIN in spreads
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
            ratio=spreads[BUILTIN].min / spread.min if both else None,
            error=error,
            common=common | {"config": common["config"] + self.note},
        )

    def _measured(
        self, quantity: str, structures: list[Atoms], names: tuple[str, ...]
    ) -> dict[str, Spread]:
        """Seconds or bytes of each model."""
        self._set_training(quantity not in ("forward", "peak of inference"))
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
        with self._gradients():
            model(batch)

    def _train_step(self, model: torch.nn.Module, batch: AtomicData) -> None:
        """Forward, a loss of energy and forces, backward; without the optimizer's step."""
        model.zero_grad(set_to_none=True)
        result = plain_outputs(model(batch))
        sum(value.float().square().mean() for value in result.values()).backward()

    def _set_training(self, training: bool) -> None:
        """Train or eval; as in inference, weights need no gradient unless training."""
        for model in self.models.values():
            model.train(training).requires_grad_(training)

    def _gradients(self) -> torch.autograd.grad_mode.set_grad_enabled:
        """Gradients off for direct forces, as fairchem's inference does."""
        return torch.set_grad_enabled(not self.settings.direct)
