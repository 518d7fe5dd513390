"""fairchem's ASE calculator, with what simulations need besides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from ase.stress import full_3x3_to_voigt_6_stress
from fairchem.core import FAIRChemCalculator
from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ase import Atoms
    from ase.calculators.calculator import Calculator
    from fairchem.core.units.mlip_unit import MLIPPredictUnit


class EScAIPCalculator(FAIRChemCalculator):
    """fairchem's calculator, of many structures at once where that is wanted.

    Args:
        predict_unit: fairchem's predict unit of the model.
        task_name: Data set whose tasks are evaluated.
        remove_net_force: Subtract the mean force from the force of each atom.
        dispersion: An ASE calculator whose energy, forces and stress are added.
    """

    def __init__(
        self,
        predict_unit: MLIPPredictUnit,
        task_name: str,
        *,
        remove_net_force: bool = False,
        dispersion: Calculator | None = None,
    ) -> None:
        super().__init__(predict_unit, task_name)
        self.remove_net_force = remove_net_force
        self.dispersion = dispersion

    @property
    def conservative(self) -> bool:
        """Whether forces are the gradient of the energy."""
        return not self.predictor.model.module.backbone.regress_config.direct_forces

    def calculate(self, atoms: Atoms, properties: list[str], system_changes: list[str]) -> None:
        """Evaluate a structure, as ASE asks for it."""
        super().calculate(atoms, properties, system_changes)
        self.results = self._finished(atoms, self.results)

    def calculate_many(self, structures: Sequence[Atoms]) -> list[dict[str, Any]]:
        """Evaluate structures in one batch; the calculator's own state stays as it is.

        Args:
            structures: Any number, of any sizes.

        Returns:
            ASE's results of each: energy (eV), forces (N, 3) (eV/A), and what else the model
            predicts of structures, such as stress (6,) (eV/A^3).
        """
        for atoms in structures:
            self.predictor.validate_atoms_data(atoms, self.task_name)
        predicted = self.predictor.predict(
            atomicdata_list_to_batch([self.a2g(atoms) for atoms in structures])
        )
        values = {name: value.detach().cpu().numpy() for name, value in predicted.items()}
        ends = np.cumsum([len(atoms) for atoms in structures])[:-1]
        forces = np.split(values["forces"], ends)
        many = []
        for index, atoms in enumerate(structures):
            energy = float(values["energy"][index])
            results = {"energy": energy, "free_energy": energy, "forces": forces[index]}
            if "stress" in values:
                stress = values["stress"][index].reshape(3, 3)
                results["stress"] = full_3x3_to_voigt_6_stress(stress)
            many.append(self._finished(atoms, results))
        return many

    def _finished(self, atoms: Atoms, results: dict[str, Any]) -> dict[str, Any]:
        """With what the options ask for."""
        if self.remove_net_force:
            results["forces"] = results["forces"] - results["forces"].mean(0)
        if self.dispersion is not None:
            # forces first: the library computes them and the energy together
            for name in ("forces", "energy", "stress"):
                if name in results and (name != "stress" or atoms.pbc.any()):
                    results[name] = results[name] + self.dispersion.get_property(name, atoms)
            results["free_energy"] = results["energy"]
        return results


def d3(functional: str) -> Calculator:
    """DFT-D3 dispersion with Becke-Johnson damping, by the library s-dftd3.

    Args:
        functional: The one that the model's labels were computed with, such as ``pbe``.

    Raises:
        UserError: The library is not installed, or has no parameters for the functional.
    """
    try:
        from dftd3.ase import DFTD3
        from dftd3.interface import RationalDampingParam
    except ImportError:
        raise UserError("D3 needs the package dftd3; pip install 'escaip-fairchem[d3]'") from None
    try:
        RationalDampingParam(method=functional)
    except RuntimeError:
        raise UserError(f"D3 has no parameters for {functional!r}; try pbe, rpbe, b3lyp") from None
    return DFTD3(method=functional, damping="d3bj")
