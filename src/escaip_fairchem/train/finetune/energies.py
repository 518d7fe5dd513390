"""Whether the energies of new data mean what those of a model mean, and the shift between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from escaip_fairchem.data.references import ReferenceFit
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Energies smaller than this, eV per atom, are taken for differences (adsorption energies): OC20's
#: are below 0.15, and total energies usually above 1.
TOTAL_FROM = 0.5
#: A difference between data and model, eV per atom, that no training should have to make up for.
OFF = 0.05
#: One that is no error of a model: the energies mean different things.
FAR_OFF = 0.5


@dataclass(frozen=True)
class Comparison:
    """Energies of S frames beside those of the model.

    Attributes:
        numbers: Atomic numbers of each frame.
        data: Labels, eV, (S,).
        model: Predictions, eV, (S,).
    """

    numbers: Sequence[np.ndarray]
    data: np.ndarray
    model: np.ndarray

    @property
    def atoms(self) -> np.ndarray:
        """Atoms of each frame, (S,)."""
        return np.array([len(numbers) for numbers in self.numbers])

    @property
    def offset(self) -> float:
        """Median of data - model, eV per atom."""
        return float(np.median((self.data - self.model) / self.atoms))

    @property
    def rms(self) -> float:
        """Root mean square of data - model, eV per atom."""
        return float(np.sqrt(np.mean(np.square((self.data - self.model) / self.atoms))))

    def kind(self, energies: np.ndarray) -> str:
        """Total or adsorption, by the size of the energies."""
        return "total" if np.median(np.abs(energies) / self.atoms) >= TOTAL_FROM else "adsorption"

    def correction(self) -> np.ndarray:
        """Energies of elements that bring the model nearest to the data, eV, (120,)."""
        return fit_elements(self.numbers, self.data - self.model)

    def shifted(self, correction: np.ndarray) -> Comparison:
        """The same with energies of elements, eV, (120,), added to the model."""
        shift = sum_elements(self.numbers, correction)
        return Comparison(self.numbers, self.data, self.model + shift)


def fit_elements(numbers: Sequence[np.ndarray], energies: np.ndarray) -> np.ndarray:
    """Energies of elements by least squares over compositions, eV, (120,).

    The smallest solution where the compositions leave it open.
    """
    fit = ReferenceFit()
    for structure, energy in zip(numbers, energies, strict=True):
        fit.add(structure, energy)
    return fit.solve().values


def sum_elements(numbers: Sequence[np.ndarray], values: np.ndarray) -> np.ndarray:
    """Sum of energies of elements, eV, (120,), over each structure, (S,)."""
    return np.array([values[structure].sum() for structure in numbers])


def settle_references(
    comparison: Comparison, energy: str = "auto", references: str = "auto"
) -> tuple[np.ndarray | None, str]:
    """Decide about the element references of the fine-tuned model.

    Args:
        comparison: Frames of the training set.
        energy: What the data holds: ``total``, ``adsorption``, or ``auto`` to go by size.
        references: ``keep`` those of the checkpoint, ``refit`` them, or ``auto``: refit if the
            model is off by more than `OFF`.

    Returns:
        What to add to the references, eV, (120,), or None to keep them; and what was done, in
        words.

    Raises:
        UserError: Energies of one kind against a model of the other, unless `energy` says so;
            energies that are far off with ``keep``.
    """
    looks, model = comparison.kind(comparison.data), comparison.kind(comparison.model)
    size = float(np.median(comparison.data / comparison.atoms))
    if energy == "adsorption" and looks == "total":
        raise UserError(
            f"energies of {size:.2f} eV per atom are total energies, not adsorption energies: "
            "subtract those of the clean slab and the gas first, or pass --energy total"
        )
    kind = looks if energy == "auto" else energy
    off = abs(comparison.offset)
    if energy == "auto" and looks != model and off > FAR_OFF:
        raise UserError(
            f"the data holds {looks} energies by their size ({size:.2f} eV per atom), the "
            f"checkpoint gives {model} energies ({comparison.offset:+.2f} eV per atom off): make "
            f"the data {model} energies, or pass --energy {looks} to fit element references anew"
        )
    if references == "keep" and off > FAR_OFF:
        raise UserError(
            f"the data is {comparison.offset:+.2f} eV per atom off the model with the references "
            "of the checkpoint; pass --references refit (another functional, pseudopotential or "
            "zero of energy is absorbed by it)"
        )
    lines = [
        f"energies of the data: {kind} ({size:.3f} eV per atom); the checkpoint's: {model}",
        f"data - model: {comparison.offset:+.4f} eV per atom, rms {comparison.rms:.4f}",
    ]
    if energy == "total" and (looks, model) == ("adsorption", "total") and off > FAR_OFF:
        lines.append(
            "warning: by their size these are adsorption energies; with --energy total the "
            "difference is put down to elements all the same"
        )
    if references == "keep" or (references == "auto" and off <= OFF):
        lines.append("element references: those of the checkpoint (--references refit fits them)")
        return None, "\n".join(lines)
    correction = comparison.correction()
    after = comparison.shifted(correction)
    lines.append(
        "element references: refitted to data - model by least squares, "
        f"rms {comparison.rms:.4f} -> {after.rms:.4f} eV per atom"
    )
    return correction, "\n".join(lines)
