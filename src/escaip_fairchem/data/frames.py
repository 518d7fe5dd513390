"""Labelled frames from structures that ASE read."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ase import Atoms


@dataclass(frozen=True)
class LabelKeys:
    """Names under which labels are stored when there is no calculator.

    Attributes:
        energy: Key of ``atoms.info``, eV.
        forces: Key of ``atoms.arrays``, (N, 3), eV/A.
        stress: Key of ``atoms.info``, 6 (Voigt), 9 or 3x3 numbers, eV/A^3.
        charge: Key of ``atoms.info``, total charge in e.
        spin: Key of ``atoms.info``, spin multiplicity.
    """

    energy: str | None = None
    forces: str | None = None
    stress: str | None = None
    charge: str | None = None
    spin: str | None = None


@dataclass(frozen=True)
class Frame:
    """A structure as it was read, and where it came from."""

    atoms: Atoms
    path: Path
    index: int


def expand_inputs(inputs: Sequence[str | Path]) -> list[Path]:
    """Resolve file names, glob patterns and folders, in order.

    Raises:
        UserError: If one of them names nothing.
    """
    paths: list[Path] = []
    for item in map(str, inputs):
        path = Path(item)
        found = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(item))]
        if not found:
            raise UserError(f"input {item} does not exist; give files, glob patterns or folders")
        paths += found
    return paths


def read_frames(paths: Sequence[Path]) -> Iterator[Frame]:
    """Read all frames of files that ASE reads and of folders of ASE-LMDB files, one at a time.

    Raises:
        UserError: If ASE cannot read a file.
    """
    from escaip_fairchem.data.formats.ase_files import AseFiles

    reader = AseFiles()
    for part in reader.parts(paths):
        for record in reader.raw(part):
            yield Frame(record.build(), part.paths[0], record.index)


def labelled(source: Atoms, keys: LabelKeys, sid: str, *, optional: bool = False) -> Atoms:
    """Reduce a structure to what fairchem trains on.

    Kept: species, positions, cell, pbc, tags, fixed atoms (``FixAtoms``), the plain values of
    ``info`` (``sid`` as text, because fairchem drops other types), energy, raw forces (those on
    fixed atoms too) and, of periodic structures, stress.

    Args:
        source: As ASE reads it.
        keys: Where labels are when there is no calculator.
        sid: Name of the structure if its ``info`` has none.
        optional: Whether a structure may have no labels, and so get no calculator.

    Returns:
        New ``ase.Atoms`` with a ``SinglePointCalculator``.

    Raises:
        UserError: If energy or forces are missing.
    """
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.constraints import FixAtoms

    fixed = [c for c in source.constraints if isinstance(c, FixAtoms)]
    atoms = Atoms(
        numbers=source.numbers,
        positions=source.positions,
        cell=source.cell,
        pbc=source.pbc,
        tags=source.get_tags(),
        constraint=fixed,
        info=_plain_info(source, keys, sid),
    )
    results = source.calc.results if source.calc is not None else {}
    # ASE drops the labels of positions that are not finite, so missing ones are not the defect.
    if not results and (optional or not np.isfinite(source.positions).all()):
        return atoms
    labels = {
        "energy": _label(source, "energy", keys.energy, source.info, results),
        "forces": _label(source, "forces", keys.forces, source.arrays, results),
    }
    # A molecule has no volume, so the zeros that some programs write for it are no stress.
    if source.pbc.any() and (keys.stress or results.get("stress") is not None):
        labels["stress"] = _label(source, "stress", keys.stress, source.info, results)
    atoms.calc = SinglePointCalculator(atoms, **_as_numbers(labels))
    return atoms


def _label(source: Atoms, name: str, key: str | None, values: dict, results: dict) -> Any:
    """Find a label under its key, or else in the calculator's results."""
    for place in (values, results):
        if key is not None and place.get(key) is not None:
            return place[key]
    if key is None and results.get(name) is not None:
        return results[name]
    missing = f"no {name}" if key is None else f"no {name} under {key!r}"
    where = "arrays" if name == "forces" else "info"
    raise UserError(
        f"{missing}; name the key that holds it with --{name}-key ({keys_of(source, where)})"
    )


def _as_numbers(labels: dict[str, Any]) -> dict[str, Any]:
    """Turn labels into float64, stress into Voigt order."""
    from ase.stress import full_3x3_to_voigt_6_stress

    try:
        numbers = {key: np.asarray(value, dtype=float) for key, value in labels.items()}
        numbers["energy"] = float(numbers["energy"].item())
        stress = numbers.get("stress")
        if stress is not None and stress.size == 9:
            numbers["stress"] = full_3x3_to_voigt_6_stress(stress.reshape(3, 3))
        elif stress is not None:
            numbers["stress"] = stress.reshape(6)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"a label is not of the right size ({error}); energy is one number, "
            "forces are (N, 3), stress has 6 or 9 numbers"
        ) from error
    return numbers


def _plain_info(source: Atoms, keys: LabelKeys, sid: str) -> dict[str, Any]:
    """Plain values of ``info``; labels are left out, because fairchem prefers them there."""
    taken = {"energy", "forces", "stress", keys.energy, keys.stress}
    info = {}
    for key, stored in source.info.items():
        value = stored.item() if isinstance(stored, np.generic) else stored
        if key not in taken and isinstance(value, str | int | float | bool):
            info[key] = value
    for key, other in (("charge", keys.charge), ("spin", keys.spin)):
        if other is not None and other not in info:
            raise UserError(f"no {key} under {other!r} ({keys_of(source, 'info')})")
        value = info.get(other or key)
        if other is not None:
            info[key] = value
        if isinstance(value, float) and value.is_integer():
            info[key] = int(value)  # whole numbers for fairchem's integer embeddings
    info["sid"] = str(info.get("sid", sid))
    return info


def keys_of(atoms: Atoms, where: str) -> str:
    """List the keys that a structure has, in ``info`` or ``arrays``."""
    return f"{where} has {', '.join(sorted(map(str, getattr(atoms, where)))) or 'no keys'}"


def free_atoms(atoms: Atoms) -> np.ndarray:
    """Mask of the atoms that ``FixAtoms`` leaves free, (N,) bool."""
    free = np.ones(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        free[constraint.index] = False
    return free
