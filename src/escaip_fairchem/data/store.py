"""The folder that fairchem trains from: ASE-LMDB shards, ``metadata.npz``, a Hydra group file."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from escaip_fairchem.data.frames import free_atoms
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ase import Atoms

    from escaip_fairchem.data.references import References

# The writer searches the list of a shard's ids at every row, so shards stay small.
FRAMES_PER_SHARD = 5_000


def data_root() -> Path:
    """Folder of all data: environment variable ``ESCAIP_DATA``, or ``data``."""
    return Path(os.environ.get("ESCAIP_DATA") or "data")


class SplitWriter:
    """Writes frames as ``data.NNNN.aselmdb`` shards, and atom counts and mean forces for samplers.

    fairchem tries to open every file of the folder, so nothing else is left in it.
    """

    def __init__(self, folder: Path) -> None:
        """Start a new folder."""
        folder.mkdir(parents=True)
        self._folder = folder
        self._natoms: list[int] = []
        self._mean_forces: list[float] = []
        self._shard: list[Atoms] = []
        self._n_shards = 0

    def __len__(self) -> int:
        """Number of frames added."""
        return len(self._natoms)

    def add(self, atoms: Atoms) -> None:
        """Add a frame.

        Args:
            atoms: Labels in a ``SinglePointCalculator``; ``info`` is stored as row data, which
                fairchem puts back into ``info``.
        """
        self._natoms.append(len(atoms))
        self._mean_forces.append(_mean_force(atoms))
        self._shard.append(atoms)
        if len(self._shard) == FRAMES_PER_SHARD:
            self._write_shard()

    def close(self) -> None:
        """Write what is held, and ``metadata.npz``."""
        if self._shard:
            self._write_shard()
        np.savez(
            self._folder / "metadata.npz",
            natoms=np.array(self._natoms, dtype=np.int64),
            mean_force=np.array(self._mean_forces),
        )

    def _write_shard(self) -> None:
        """Write the frames held in a single transaction."""
        from ase.db import connect
        from ase.db.row import AtomsRow

        path = self._folder / f"data.{self._n_shards:04d}.aselmdb"
        with connect(path, type="aselmdb", use_lock_file=False) as database:
            for atoms in self._shard:
                # A row, not the atoms: the writer would add the name of the user to it.
                database.write(AtomsRow(atoms), data=atoms.info)
        path.with_name(path.name + "-lock").unlink(missing_ok=True)
        self._shard = []
        self._n_shards += 1


def _mean_force(atoms: Atoms) -> float:
    """Mean length of the forces on free atoms, eV/A."""
    forces = atoms.get_forces(apply_constraint=False)[free_atoms(atoms)]
    return float(np.linalg.norm(forces, axis=1).mean()) if len(forces) else 0.0


@contextmanager
def new_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder that becomes ``target`` when the block ends without an error.

    After an error, or a kill while the block runs, ``target`` is what it was before. Replacing an
    existing one takes two renames; a kill between them leaves it as ``old`` in the hidden
    ``.NAME.partial-*`` folder beside ``target``.

    Args:
        target: The folder to make.
        overwrite: Whether an existing one may be replaced.

    Yields:
        The temporary folder, beside ``target``.

    Raises:
        UserError: If ``target`` exists and may not be replaced.
    """
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; choose another folder or pass --overwrite")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        partial = scratch / "new"
        partial.mkdir()
        yield partial
        replaces = target.exists()
        if replaces:
            os.replace(target, scratch / "old")
        try:
            os.replace(partial, target)
        except BaseException:
            if replaces:
                os.replace(scratch / "old", target)
            raise
    finally:
        shutil.rmtree(scratch)


def write_dataset_group(
    path: Path,
    *,
    label: str,
    train: str,
    val: str,
    references: References,
    force_rms: float,
    stress_rms: float | None,
    comment: str,
) -> None:
    """Write the Hydra group file that a recipe selects with ``dataset=NAME``.

    Args:
        path: The ``.yaml`` file.
        label: fairchem's name of the data set, which checkpoints store.
        train: Folder of the training frames.
        val: Folder of the validation frames.
        references: Element references, eV.
        force_rms: Force scale, eV/A.
        stress_rms: Stress scale, eV/A^3, if the data has stress.
        comment: One line that says where the numbers come from.
    """
    from ase.data import chemical_symbols

    # Fixed-point numbers, because YAML reads 1e-05 as a string and 1 as an integer, and
    # fairchem's normalizer takes floats only.
    energies = [
        f"    - {value:.10f}" + (f"  # {chemical_symbols[z]}" if z in references.elements else "")
        for z, value in enumerate(references.values)
    ]
    lines = [
        "# @package _global_",
        f"# {comment}",
        "dataset:",
        f"  name: {json.dumps(label)}",
        f"  train: {json.dumps(train)}",
        f"  val: {json.dumps(val)}",
        "element_refs:  # eV, index = atomic number",
        "  energy:",
        *energies,
        "normalizer:",
        f"  rmsd: {force_rms:.10f}  # eV/A, force components of free training atoms",
        f"  energy_residual: {references.scale:.10f}  # eV, rms above the element references",
    ]
    if stress_rms is not None:
        lines.append(f"  stress_rmsd: {stress_rms:.10f}  # eV/A^3, the nine components")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file in one step, so that a reader never sees a part of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.copyfile(source, partial)
    os.replace(partial, target)
