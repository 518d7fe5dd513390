"""``escaip bench forward|train|memory``: ours against the built-in, agreement first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from escaip_fairchem.bench.measure import (
    differences,
    kept_attention_switches,
    precision,
    refuse_if_different,
)
from escaip_fairchem.bench.models import Models
from escaip_fairchem.bench.pair import batch_of, model_pair, outputs

if TYPE_CHECKING:
    import torch
    from ase import Atoms
    from fairchem.core.datasets.atomic_data import AtomicData

    from escaip_fairchem.bench.settings import Settings

BUILTIN, OURS = "built-in", "ours"


class Comparison(Models):
    """The built-in and this package's model on the same weights.

    Args:
        settings: Size, kind, device, precision, repeats.
        note: Added to the column ``config``.
        **changes: Keys of the built-in's configuration, e.g. to pad as shipped.
    """

    def __init__(self, settings: Settings, note: str = "", **changes: Any) -> None:
        with settings.chosen_kernels():
            builtin, ours = model_pair(settings.config(**changes), **settings.own_keys())
        super().__init__(settings, {BUILTIN: builtin, OURS: ours}, BUILTIN, note)

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
        self.set_training(False)
        batch = batch_of(structures).to(self.device)
        exact, reduced = (self._outputs(batch, p) for p in ("fp32", self.settings.precision))
        refuse_if_different(differences(exact[BUILTIN], exact[OURS]))
        return {
            name: max(differences(exact[BUILTIN], result).values())
            for name, result in reduced.items()
        }

    def _outputs(self, batch: AtomicData, numerics: str) -> dict[str, dict[str, torch.Tensor]]:
        with precision(numerics, self.device), kept_attention_switches(), self.gradients():
            return {name: outputs(model, batch) for name, model in self.models.items()}
