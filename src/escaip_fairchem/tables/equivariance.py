"""How far forces turn with a structure: the paper's rotational test.

A model is asked for the forces of a structure and of its rotated copies, cell included. Were it
equivariant, the second would be the first ones rotated. Rotations are uniform on SO(3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial.transform import Rotation

from escaip_fairchem.errors import UserError
from escaip_fairchem.tables import claims, writing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ase import Atoms

    from escaip_fairchem.tables.structures import Predict

#: Forces below this, eV/A, have no direction to speak of: their cosines are left out and counted.
SMALLEST_FORCE = 1e-3
#: Axes that rotations can be restricted to, as the authors' script does besides.
AXES = ("any", "x", "y", "z")
_FLOOR = 1e-9  # of 1 - cosine, for a logarithmic axis


@dataclass(frozen=True)
class Turned:
    """What rotations changed in one structure.

    Attributes:
        numbers: Atomic numbers of the atoms that count, (F,).
        cosine: Between forces turned and forces of the turned structure, (R, F); NaN for forces
            below `SMALLEST_FORCE`.
        change: Mean absolute difference of their components, eV/A, (R, F).
        size: Mean absolute component of the forces before rotation, eV/A, (F,).
        energy_change: |difference of energies| per atom, eV, (R,).
        error: Mean absolute error of the components before rotation, eV/A, (F,); NaN without
            labels.
    """

    numbers: np.ndarray
    cosine: np.ndarray
    change: np.ndarray
    size: np.ndarray
    energy_change: np.ndarray
    error: np.ndarray


def rotations(number: int, seed: int, axis: str = "any") -> np.ndarray:
    """Rotation matrices, (R, 3, 3).

    Args:
        number: R.
        seed: Of the draw.
        axis: ``any``: uniform on SO(3); ``x``, ``y`` or ``z``: uniform angles about one axis.
    """
    generator = np.random.default_rng(seed)
    if axis == "any":
        return Rotation.random(number, generator).as_matrix()
    return Rotation.from_euler(axis, generator.uniform(0, 2 * np.pi, (number, 1))).as_matrix()


def rotated(atoms: Atoms, rotation: np.ndarray) -> Atoms:
    """A copy with positions and cell rotated; its pbc belongs to the cell's vectors and stays."""
    turned = atoms.copy()
    turned.set_cell(atoms.cell.array @ rotation.T, scale_atoms=False, apply_constraint=False)
    turned.positions = atoms.positions @ rotation.T
    return turned


def turn(predict: Predict, atoms: Atoms, matrices: np.ndarray, counted: np.ndarray) -> Turned:
    """Compare a structure with its rotated copies.

    Args:
        predict: Energies and forces of a list of structures.
        atoms: The structure, with labels or without.
        matrices: Rotations, (R, 3, 3).
        counted: Atoms to evaluate, (N,) bool.
    """
    energies, forces = predict([atoms, *(rotated(atoms, matrix) for matrix in matrices)])
    before = forces[0][counted]
    expected = np.einsum("rij,aj->rai", matrices, before)
    found = np.stack(forces[1:])[:, counted]
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(found, axis=2)
    small = (np.linalg.norm(before, axis=1) < SMALLEST_FORCE) | (norms == 0)
    cosine = (expected * found).sum(2) / np.where(small, 1, norms)
    labels = atoms.calc.results.get("forces") if atoms.calc is not None else None
    none = np.full(len(before), np.nan)
    return Turned(
        numbers=atoms.numbers[counted],
        cosine=np.where(small, np.nan, cosine),
        change=np.abs(found - expected).mean(2),
        size=np.abs(before).mean(1),
        energy_change=np.abs(energies[1:] - energies[0]) / len(atoms),
        error=none if labels is None else np.abs(before - labels[counted]).mean(1),
    )


def rows_of(name: str, turned: Sequence[Turned], names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for all structures together, then one for each element and each structure.

    Args:
        name: Of the model.
        turned: Each structure.
        names: Of the structures.
    """
    from ase.data import chemical_symbols

    rows = [_row(name, "all", "", turned)]
    for number in np.unique(np.concatenate([each.numbers for each in turned])):
        only = [_of(each, each.numbers == number) for each in turned]
        of_element = [each for each in only if len(each.numbers)]
        rows.append(_row(name, "element", chemical_symbols[number], of_element) | _NO_ENERGY)
    rows += [_row(name, "structure", n, [t]) for n, t in zip(names, turned, strict=True)]
    return rows


_NO_ENERGY = {"energy_change_per_atom": None}


def _of(turned: Turned, which: np.ndarray) -> Turned:
    return Turned(
        turned.numbers[which], turned.cosine[:, which], turned.change[:, which],
        turned.size[which], turned.energy_change, turned.error[which],
    )  # fmt: skip


def _row(model: str, group: str, name: str, turned: Sequence[Turned]) -> dict[str, Any]:
    cosine = np.concatenate([each.cosine.ravel() for each in turned])
    known = cosine[np.isfinite(cosine)]
    change = np.concatenate([each.change.ravel() for each in turned])
    size = np.concatenate([np.repeat(each.size, len(each.change)) for each in turned])
    error = np.concatenate([each.error for each in turned])
    return {
        "model": model,
        "group": group,
        "name": name,
        "structures": len(turned),
        "rotations": len(turned[0].cosine),
        "atoms": sum(len(each.numbers) for each in turned),
        "atoms_without_direction": sum(int(np.isnan(each.cosine[0]).sum()) for each in turned),
        "cosine": float(known.mean()) if len(known) else None,
        "cosine_5_percent_below": float(np.quantile(known, 0.05)) if len(known) else None,
        "cosine_min": float(known.min()) if len(known) else None,
        "force_change_mae": float(change.mean()),
        "force_change_relative": float(change.sum() / size.sum()) if size.any() else None,
        "energy_change_per_atom": float(np.mean([each.energy_change.mean() for each in turned])),
        "force_mae": float(error.mean()) if np.isfinite(error).all() else None,
    }


def draw(turned: dict[str, list[Turned]], rows: list[dict[str, Any]], out: Path) -> Path:
    """Distribution of 1 - cosine of each model, and its mean by element."""
    made, (left, right) = writing.figure(2)
    symbols = [row["name"] for row in rows if row["group"] == "element"]
    places = {symbol: place for place, symbol in enumerate(dict.fromkeys(symbols))}
    for name, structures in turned.items():
        off = 1 - np.concatenate([each.cosine.ravel() for each in structures])
        off = np.sort(np.maximum(off[np.isfinite(off)], _FLOOR))
        if not len(off):
            continue
        left.plot(off, np.arange(1, len(off) + 1) / len(off), label=name)
        chosen = [
            (places[row["name"]], max(1 - row["cosine"], _FLOOR))
            for row in rows
            if (row["model"], row["group"]) == (name, "element") and row["cosine"] is not None
        ]
        right.plot(*zip(*chosen, strict=True), "o", markersize=4, label=name)
    left.axvline(1 - claims.COSINE, color="black", linestyle="--", label="paper: cosine 0.99")
    right.axhline(1 - claims.COSINE, color="black", linestyle="--")
    left.set(xscale="log", xlabel="1 - force cosine", ylabel="part of atoms and rotations below")
    right.set(yscale="log", ylabel="1 - mean force cosine")
    right.set_xticks(list(places.values()), list(places), fontsize=6)
    left.legend(fontsize="x-small")
    return writing.finish(made, out, claims.EQUIVARIANCE)


def run(
    checkpoints: Sequence[str],
    data: str,
    out: Path,
    *,
    batches: int = 10,
    batch_size: int = 2,
    n_rotations: int = 32,
    axis: str = "any",
    seed: int = 0,
    all_atoms: bool = False,
    no_pbc: bool = False,
    double: bool = False,
    device: str | None = None,
    task: str | None = None,
) -> list[dict[str, Any]]:
    """Test models on the same structures and rotations; write the table and the figure.

    Args:
        checkpoints: Inference checkpoints or folders of runs.
        data: Structures, as `structures.draw_structures` takes them.
        out: The table.
        batches: Batches of structures.
        batch_size: Structures of a batch; the authors' script has 2.
        n_rotations: Rotations of each structure.
        axis: Of the rotations, see `rotations`.
        seed: Of structures and rotations.
        all_atoms: Evaluate fixed atoms too.
        no_pbc: Take every structure as a molecule, as the authors' script does.
        double: Compute in float64.
        device: ``cpu`` or ``cuda``.
        task: Data set of the checkpoints, if they know several.

    Returns:
        The rows.

    Raises:
        UserError: A number is not positive, or there is no checkpoint, data or free atom.
    """
    from escaip_fairchem.tables.structures import (
        draw_structures,
        free_atoms,
        predictor,
        short_names,
    )
    from escaip_fairchem.train.evaluation import device_type

    writing.require_writable(out)
    for option, value in (("batches", batches), ("rotations", n_rotations)):
        if value < 1:
            raise UserError(f"--{option} is {value}; give a positive number")
    chosen = draw_structures(data, batches * batch_size, seed)
    if no_pbc:
        for atoms in chosen:
            atoms.pbc = False
    counted = [np.ones(len(a), bool) if all_atoms else free_atoms(a) for a in chosen]
    pairs = [pair for pair in zip(chosen, counted, strict=True) if pair[1].any()]
    if not pairs:
        raise UserError(f"no structure of {data} has a free atom; take --all-atoms")
    # every structure has rotations of its own
    matrices = [rotations(n_rotations, seed + 1 + i, axis) for i in range(len(pairs))]
    names = [str(atoms.info.get("sid", i)) for i, (atoms, _) in enumerate(pairs)]
    turned, rows = {}, []
    for checkpoint, name in zip(checkpoints, short_names(checkpoints), strict=True):
        predict = predictor(checkpoint, task=task, device=device, double=double)
        turned[name] = [
            turn(predict, atoms, turns, free)
            for (atoms, free), turns in zip(pairs, matrices, strict=True)
        ]
        rows += rows_of(name, turned[name], names)
    writing.write_rows(rows, out, device=device or device_type())
    shown = ("model", "structures", "rotations", "atoms", "cosine", "cosine_5_percent_below",
             "cosine_min", "force_change_mae", "force_mae", "energy_change_per_atom")  # fmt: skip
    print(writing.text_table([row for row in rows if row["group"] == "all"], shown))
    print(claims.EQUIVARIANCE, f"written: {out}, {draw(turned, rows, out)}", sep="\n")
    return rows
