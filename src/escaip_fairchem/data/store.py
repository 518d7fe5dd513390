"""The folder that fairchem trains from: ASE-LMDB shards, ``metadata.npz``, a Hydra group file."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from escaip_fairchem.data.facts import mean_force
from escaip_fairchem.data.frames import free_atoms
from escaip_fairchem.data.rows import RowFile, encode_row, write_rows
from escaip_fairchem.errors import UserError
from escaip_fairchem.files import whole_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ase import Atoms

    from escaip_fairchem.data.references import References

DATASET_FILE = "dataset.yaml"
# fairchem keeps every shard of a set open, and processes may have a thousand files.
FRAMES_PER_SHARD = 100_000
MAX_SHARDS = 200


def data_root() -> Path:
    """Folder of all data: environment variable ``ESCAIP_DATA``, or ``data``."""
    return Path(os.environ.get("ESCAIP_DATA") or "data")


def shard_name(number: int) -> str:
    """File name of a shard; fairchem takes them in the order of their names."""
    return f"data.{number:04d}.aselmdb"


def shard_bounds(n_frames: int) -> list[tuple[int, int]]:
    """First frame, and frame after the last one, of each shard."""
    size = max(FRAMES_PER_SHARD, -(-n_frames // MAX_SHARDS))
    return [(start, min(start + size, n_frames)) for start in range(0, n_frames, size)]


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
        self._shard: list[bytes] = []
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
        self._mean_forces.append(mean_force(atoms.calc.results["forces"][free_atoms(atoms)]))
        self._shard.append(encode_row(atoms))
        if len(self._shard) == FRAMES_PER_SHARD:
            self._write_shard()

    def close(self) -> None:
        """Write what is held, and ``metadata.npz``."""
        if self._shard:
            self._write_shard()
        write_metadata(self._folder, self._natoms, mean_force=self._mean_forces)

    def _write_shard(self) -> None:
        """Write the rows held."""
        path = self._folder / shard_name(self._n_shards)
        write_rows(path, self._shard, len(self._shard), sum(map(len, self._shard)))
        self._shard = []
        self._n_shards += 1


def write_metadata(folder: Path, natoms: Sequence[int], **per_frame: Sequence[float]) -> None:
    """Write ``metadata.npz``: what samplers need of every frame, in the order of the rows."""
    values = {name: np.asarray(value, dtype=float) for name, value in per_frame.items()}
    with whole_file(folder / "metadata.npz") as partial, partial.open("wb") as file:
        np.savez(file, natoms=np.asarray(natoms, dtype=np.int64), **values)


def copy_rows(sources: Sequence[Path], target: Path, indices: np.ndarray) -> None:
    """Copy frames of converted folders into a new one, without decoding them.

    Args:
        sources: Folders with ``data.NNNN.aselmdb`` and ``metadata.npz``; their frames are numbered
            through in this order.
        target: The folder to make.
        indices: Frames to copy, in the order wanted, (M,).

    Raises:
        UserError: If a source is damaged, or its metadata does not fit.
    """
    with ExitStack() as stack:
        files = [RowFile(path) for source in sources for path in sorted_shards(source)]
        for file in files:
            stack.callback(file.close)
        starts = np.cumsum([0, *map(len, files)])
        metadata = _joint_metadata(sources, int(starts[-1]))
        target.mkdir(parents=True)
        owner = np.searchsorted(starts, indices, side="right") - 1
        local = indices - starts[owner]
        for number, (begin, end) in enumerate(shard_bounds(len(indices))):
            places = list(zip(owner[begin:end], local[begin:end], strict=True))
            n_bytes = sum(len(files[k][i]) for k, i in places)
            rows = (files[k][i] for k, i in places)
            write_rows(target / shard_name(number), rows, end - begin, n_bytes)
    chosen = {name: values[indices] for name, values in metadata.items()}
    write_metadata(target, chosen.pop("natoms"), **chosen)


def sorted_shards(folder: Path) -> list[Path]:
    """The ASE-LMDB files of a folder, in the order in which fairchem takes them."""
    return sorted(folder.glob("*.aselmdb"))


def _joint_metadata(sources: Sequence[Path], n_frames: int) -> dict[str, np.ndarray]:
    """Metadata of several folders, as far as all of them have it."""
    parts = []
    for source in sources:
        if not (source / "metadata.npz").is_file():
            raise UserError(f"{source} has no metadata.npz; make it again with `escaip convert`")
        parts.append(dict(np.load(source / "metadata.npz")))
    common = [name for name in parts[0] if all(name in part for part in parts)]
    joint = {name: np.concatenate([part[name] for part in parts]) for name in common}
    if any(len(values) != n_frames for values in joint.values()):
        raise UserError(
            f"metadata.npz of {', '.join(map(str, sources))} does not belong to the {n_frames} "
            "frames; make them again with `escaip convert`"
        )
    return joint


def check_replaceable(target: Path) -> None:
    """Refuse to replace what is no data set, such as an input given in the place of OUT.

    Raises:
        UserError: If ``target`` is a file, or a folder with something else in it.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file; name the folder to make last")
    known = [target / name for name in ("train", "val", "test")]
    if any(target.iterdir()) and not any((path / "metadata.npz").is_file() for path in known):
        raise UserError(f"{target} is no converted data set, so it is not replaced; name another")


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
    # Fixed-point numbers, because YAML reads 1e-05 as a string.
    lines = [
        "# @package _global_",
        f"# {comment}",
        "dataset:",
        f"  name: {json.dumps(label)}",
        f"  train: {json.dumps(train)}",
        f"  val: {json.dumps(val)}",
        "element_refs:  # eV, index = atomic number",
        "  energy:",
        *(f"    {line}" for line in energy_lines(references)),
        "normalizer:",
        f"  rmsd: {force_rms:.10f}  # eV/A, force components of free training atoms",
        f"  energy_residual: {references.scale:.10f}  # eV, rms above the element references",
    ]
    if stress_rms is not None:
        lines.append(f"  stress_rmsd: {stress_rms:.10f}  # eV/A^3, the nine components")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def energy_lines(references: References) -> list[str]:
    """Items of a YAML list, one for each atomic number, with the symbols of elements that occur."""
    from ase.data import chemical_symbols

    return [
        f"- {value:.10f}" + (f"  # {chemical_symbols[z]}" if z in references.elements else "")
        for z, value in enumerate(references.values)
    ]


def copy_file(source: Path, target: Path) -> None:
    """Copy a file in one step, so that a reader never sees a part of it."""
    with whole_file(target) as partial:
        shutil.copyfile(source, partial)
