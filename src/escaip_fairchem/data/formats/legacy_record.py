"""The structures that fairchem 1 stored, as ``ase.Atoms``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.data.formats.safe_pickle import Fields
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from ase import Atoms

NAMES = {"y": "energy", "force": "forces"}  # older names, and what fairchem 1.10 calls them
NUMBERS_KEPT = ("fid", "nads", "oc22", "y_init", "y_relaxed", "charge", "spin")


def structures_of(stored: Any) -> list[dict[str, Any]]:
    """List the structures in what was unpickled: one, a batch, or a list of them.

    Args:
        stored: What `safe_pickle.loads` returned.

    Returns:
        The fields of each structure by the names of fairchem 1.10, those set to None left out.

    Raises:
        UserError: If it is something else.
    """
    if isinstance(stored, list | tuple):
        return [fields for item in stored for fields in structures_of(item)]
    if not isinstance(stored, Fields):
        raise UserError(f"a {type(stored).__name__} is stored where a structure is expected")
    holder = stored.state
    if isinstance(holder.get("_store"), Fields):  # torch_geometric 2
        holder = holder["_store"].state
    fields = holder.get("_mapping", holder)  # in torch_geometric 1, fields are attributes
    named = {NAMES.get(key, key): value for key, value in fields.items() if value is not None}
    slices = holder.get("_slice_dict") or holder.get("__slices__")
    return _parts_of_batch(named, slices) if slices else [named]


def _parts_of_batch(fields: dict[str, Any], slices: dict[str, Any]) -> list[dict[str, Any]]:
    """Cut a batch, whose slices give where each structure's values begin and end."""
    bounds = {NAMES.get(key, key): np.asarray(value) for key, value in slices.items()}
    # Edges lie along another axis; no reader needs them.
    keys = [key for key in bounds if key in fields and not key.startswith("edge_")]
    n_structures = len(bounds["pos"]) - 1
    return [
        {key: fields[key][int(bounds[key][i]) : int(bounds[key][i + 1])] for key in keys}
        for i in range(n_structures)
    ]


def identify(fields: dict[str, Any]) -> str | None:
    """Text that tells a structure from all others of OC20 and OC22, if it has a ``sid``."""
    if "sid" not in fields:
        return None
    prefix = "oc22-" if "oc22" in fields and number(fields, "oc22") else ""
    frame = f"_{number(fields, 'fid')}" if "fid" in fields else ""
    return f"{prefix}{number(fields, 'sid')}{frame}"


def to_atoms(
    fields: dict[str, Any],
    *,
    relaxed: bool = False,
    label_initial: bool = False,
    references: dict[str, float] | None = None,
) -> Atoms:
    """Turn the fields of a structure of N atoms into atoms.

    Args:
        fields: As `structures_of` gives them: ``pos`` (N, 3), A; ``atomic_numbers`` (N,), of any
            type; ``cell`` (1, 3, 3), A; ``energy``, eV; ``forces`` (N, 3), eV/A; ``tags`` and
            ``fixed`` (N,); ``sid``, ``fid``.
        relaxed: Take the relaxed positions instead of the initial ones.
        label_initial: Label an initial structure with its own energy and forces.
        references: Energies, eV, by ``random<sid>``, to be added to those of OC20 structures.

    Returns:
        The atoms; with a calculator if there are labels. Without ``pbc``, a structure is periodic
        in all directions if it has a cell.

    Raises:
        UserError: If a field is missing or does not fit the others.
    """
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.constraints import FixAtoms

    numbers = np.rint(_array(fields, "atomic_numbers", (-1,))).astype(int)
    n_atoms = len(numbers)
    positions = _array(fields, "pos_relaxed" if relaxed else "pos", (n_atoms, 3))
    cell = _array(fields, "cell", (3, 3)) if "cell" in fields else np.zeros((3, 3))
    pbc = _array(fields, "pbc", (3,)).astype(bool) if "pbc" in fields else cell.any()
    atoms = Atoms(numbers=numbers, positions=positions, cell=cell, pbc=pbc)
    if "tags" in fields:
        atoms.set_tags(_array(fields, "tags", (n_atoms,)).astype(int))
    if "fixed" in fields and (fixed := _array(fields, "fixed", (n_atoms,)) > 0).any():
        atoms.set_constraint(FixAtoms(mask=fixed))

    atoms.info = {key: number(fields, key) for key in NUMBERS_KEPT if key in fields}
    if "sid" in fields:
        atoms.info["sid"] = str(number(fields, "sid"))
    shift = _reference(atoms.info, references)
    for key in ("y_init", "y_relaxed"):
        if key in atoms.info:
            atoms.info[key] += shift

    labels: dict[str, Any] = {}
    of_initial = "y_init" in fields or "y_relaxed" in fields
    if not of_initial and "energy" in fields:
        labels["energy"] = number(fields, "energy") + shift
    elif label_initial and not relaxed and "y_init" in atoms.info:
        labels["energy"] = atoms.info["y_init"]
    if "forces" in fields and (labels or not of_initial):
        labels["forces"] = _array(fields, "forces", (n_atoms, 3))
    if "stress" in fields and labels and atoms.pbc.any():
        labels["stress"] = _voigt(_array(fields, "stress", (-1,)))
    if labels:
        atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


def _reference(info: dict[str, Any], references: dict[str, float] | None) -> float:
    """Reference energy of an OC20 structure, eV; 0 if none is asked for."""
    if references is None or info.get("oc22"):
        return 0.0
    key = f"random{info.get('sid')}"
    if key not in references:
        raise UserError(f"oc20_references has no energy of {key}; take the file of this data set")
    return float(references[key])


def number(fields: dict[str, Any], key: str) -> Any:
    """A plain number, however it was stored; text and what is no single number as they are."""
    value = fields[key]
    if isinstance(value, str | int | float):
        return value
    array = np.asarray(value)
    if array.size != 1:
        raise UserError(f"field {key} has {array.size} values instead of one")
    return array.reshape(()).item()


def _array(fields: dict[str, Any], key: str, shape: tuple[int, ...]) -> np.ndarray:
    """A field as float64 of a shape."""
    if key not in fields:
        raise UserError(f"no field {key}; the structure has {', '.join(sorted(fields))}")
    array = np.asarray(fields[key], dtype=float)
    try:
        return array.reshape(shape)
    except ValueError:
        raise UserError(f"field {key} has shape {array.shape} instead of {shape}") from None


def _voigt(stress: np.ndarray) -> np.ndarray:
    """Stress of 6 or 9 numbers in ASE's order."""
    from ase.stress import full_3x3_to_voigt_6_stress

    if stress.size not in (6, 9):
        raise UserError(f"field stress has {stress.size} values instead of 6 or 9")
    return stress if stress.size == 6 else full_3x3_to_voigt_6_stress(stress.reshape(3, 3))
