"""LMDB files of fairchem 1 as a data set of fairchem 2, without converting them."""

from __future__ import annotations

import contextlib
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from fairchem.core.datasets.ase_datasets import AseAtomsDataset
from tqdm import tqdm

from escaip_fairchem.data.energies import with_exact_energy
from escaip_fairchem.data.formats.legacy_lmdb import (
    fields_of,
    files_of,
    open_lmdb,
    read_references,
)
from escaip_fairchem.data.formats.legacy_record import to_atoms
from escaip_fairchem.errors import UserError
from escaip_fairchem.files import whole_file

if TYPE_CHECKING:
    from pathlib import Path

    from ase import Atoms

    from escaip_fairchem.data.formats.lmdb_pages import NumberedEntries

NATOMS_SUFFIX = ".natoms.npz"  # beside an LMDB file: its atom counts


class LegacyLmdbDataset(AseAtomsDataset):
    """OC20 and OC22 as downloaded, for ``format: escaip_fairchem.LegacyLmdbDataset``.

    It gives the ``AtomicData`` that the converted data set gives. Pickles are read by names on a
    list only, so files need not be trusted. To convert once (``escaip convert``) loads faster.

    Args:
        config: As of fairchem's ``AseDBDataset``: ``src`` (LMDB files or folders of them),
            ``a2g_args``, ``key_mapping``, ``transforms``, ``metadata_path``; and
            ``oc20_references``, the file that makes adsorption energies of OC20 total energies.

    Raises:
        UserError: If a file is damaged, or a folder has none.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.a2g = partial(with_exact_energy, self.a2g)

    def _load_dataset_get_ids(self, config: dict[str, Any]) -> range:
        """List the files and the keys in them."""
        self._files = files_of(self.paths)
        self._entries = [open_lmdb(file) for file in self._files]
        for entries in self._entries:
            if entries.damaged:
                raise UserError(
                    f"{entries.path}: the {entries.damaged[0]} of the LMDB file is damaged; "
                    "download it again, or convert what is whole (`escaip convert`)"
                )
        self._ends = np.cumsum([len(entries.keys) for entries in self._entries])
        return range(int(self._ends[-1]))

    def get_atoms(self, idx: int) -> Atoms:
        """Read structure ``idx``, with its labels if it has any.

        Raises:
            UserError: Naming the file and the key of a damaged or refused structure.
        """
        where = int(np.searchsorted(self._ends, idx, side="right"))
        entries = self._entries[where]
        key = int(entries.keys[idx - self._ends[where]])  # counted from the file's end
        path = self.config.get("oc20_references")
        try:
            atoms = to_atoms(
                fields_of(entries, key),
                references=read_references(path) if path else None,
            )
        except UserError as error:
            raise UserError(f"{self._files[where]}, key {key}: {error}") from None
        atoms.info.setdefault("sid", str(idx))
        if (self.config.get("a2g_args") or {}).get("r_stress") and atoms.calc is not None:
            atoms.calc.results.setdefault("stress", np.full(6, np.inf))  # left out of losses
        return atoms

    @cached_property
    def _metadata(self) -> dict[str, np.ndarray]:
        """``metadata.npz`` of the publisher, or atom counts, kept beside each file."""
        if self.config.get("metadata_path") or all(path.is_dir() for path in self.paths):
            with contextlib.suppress(AssertionError, KeyError):  # of other data, or without natoms
                if published := super()._metadata:
                    return published
        counts = [self._count_atoms(where) for where in range(len(self._files))]
        return {"natoms": np.concatenate(counts)}

    def _count_atoms(self, where: int) -> np.ndarray:
        """Atoms of each structure of a file, (N,) int64, from the file beside it if it is newer."""
        file, entries = self._files[where], self._entries[where]
        keys = entries.keys
        beside = file.with_name(file.name + NATOMS_SUFFIX)
        with contextlib.suppress(OSError, ValueError, KeyError):
            if beside.stat().st_mtime_ns >= file.stat().st_mtime_ns:
                natoms = np.load(beside)["natoms"]
                if natoms.shape == keys.shape:
                    return natoms
        counting = tqdm(keys.tolist(), desc=f"count atoms of {file.name}", disable=None)
        natoms = np.array([self._natoms(entries, file, key) for key in counting], np.int64)
        # on a read-only medium they are counted again next time
        with (
            contextlib.suppress(OSError),
            whole_file(beside) as partial,
            partial.open("wb") as file,
        ):
            np.savez(file, natoms=natoms)
        return natoms

    @staticmethod
    def _natoms(entries: NumberedEntries, file: Path, key: int) -> int:
        """Atoms of one structure."""
        try:
            return len(fields_of(entries, key)["pos"])
        except (UserError, KeyError, TypeError) as error:
            raise UserError(f"{file}, key {key}: {error}; convert the file without it") from None
