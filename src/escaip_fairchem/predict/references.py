"""What a checkpoint knows before it has learnt anything: its tasks and their reference energies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Reference energy of each element, eV, (256,), and the mean above their sum, eV.
Trivial = tuple[np.ndarray, float]


def choose_task(tasks: Sequence[Mapping[str, Any]], wanted: str | None) -> str:
    """The data set of a checkpoint whose tasks are predicted.

    Args:
        tasks: As `escaip_fairchem.describe.describe_task` gives them.
        wanted: Its name; may be None if there is only one.

    Raises:
        UserError: If there are several, or none of this name.
    """
    known = sorted({name for task in tasks for name in task["datasets"]})
    if wanted is None and len(known) == 1:
        return known[0]
    if wanted not in known:
        raise UserError(f"task={wanted}: the checkpoint knows {', '.join(known)}; name one")
    return wanted


def energy_references(tasks: Sequence[Mapping[str, Any]], task: str) -> Trivial:
    """Energies before anything is learnt.

    Args:
        tasks: As `escaip_fairchem.describe.describe_task` gives them.
        task: Data set of the checkpoint.
    """
    references = np.zeros(256)
    (energy,) = (t for t in tasks if t["property"] == "energy" and task in t["datasets"])
    for number, value in energy["references"].items():
        references[number] = value
    return references, energy["mean"]


def require_known(
    references: np.ndarray, numbers: np.ndarray, natoms: np.ndarray, names: np.ndarray
) -> None:
    """Refuse elements without a reference energy, if any element has one.

    Args:
        references: Of each element, eV, (256,).
        numbers: Atomic numbers, (N,).
        natoms: Atoms of each structure, (n,).
        names: Of the structures, (n,).

    Raises:
        UserError: Naming the elements and a structure.
    """
    unknown = references[numbers] == 0
    if not unknown.any() or not references.any():
        return
    from ase.data import chemical_symbols

    symbols = ", ".join(chemical_symbols[number] for number in np.unique(numbers[unknown]))
    first = np.repeat(names, natoms)[unknown][0]
    raise UserError(
        f"the checkpoint has no reference energy for {symbols} (first in {first}), so it was not "
        "trained on them; leave these structures out, or set allow_unknown_elements=true"
    )
