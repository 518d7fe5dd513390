"""Files in the layouts in which OC20 and OC22 are published."""

from __future__ import annotations

import builtins
import io
import lzma
import os
import pickle
import sys
import tarfile
import types
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lmdb
import numpy as np
import pytest
import torch

from data_helpers import labelled_atoms

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from ase import Atoms

    from escaip_fairchem.data.formats.base import Format


def built(reader: Format, *paths: Path) -> list[Atoms]:
    """Read everything."""
    assert all(type(reader).claims(path) for path in paths)
    return [record.build() for part in reader.parts(paths) for record in reader.read(part)]


def slabs(n_frames: int = 6) -> list[Atoms]:
    """EMT-labelled frames with ids and tags, of 8 decimals as text stores them."""
    frames = labelled_atoms(n_frames, sid=[100 + i // 3 for i in range(n_frames)])
    for index, atoms in enumerate(frames):
        atoms.info["fid"] = 7 * (index % 3)
        atoms.set_tags(np.arange(len(atoms)) % 3)
        atoms.positions = atoms.positions.round(8)
        atoms.calc.results = {k: np.round(v, 8) for k, v in atoms.calc.results.items()}
    return frames


def assert_equal(got: Atoms, expected: Atoms, *, energy: float | None = None, rtol=0.0) -> None:
    """Compare structure, tags, fixed atoms and labels; to all digits by default."""
    np.testing.assert_array_equal(got.numbers, expected.numbers)
    np.testing.assert_allclose(got.positions, expected.positions, rtol=rtol)
    np.testing.assert_allclose(got.cell.array, expected.cell.array, rtol=rtol)
    np.testing.assert_array_equal(got.pbc, expected.pbc)
    np.testing.assert_array_equal(got.get_tags(), expected.get_tags())
    fixed = [[i for c in atoms.constraints for i in c.index] for atoms in (got, expected)]
    assert fixed[0] == fixed[1]
    labels = expected.calc.results
    forces = got.get_forces(apply_constraint=False)
    np.testing.assert_allclose(forces, labels["forces"], rtol=rtol)
    energy = labels["energy"] if energy is None else energy
    assert got.get_potential_energy() == pytest.approx(energy, rel=1e-12, abs=0)


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(canary: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that would make a file, and the names that they must be refused for."""
    shell, code = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    system = Call(os.system, shell)
    chain = Call(getattr, Call(builtins.__import__, "os"), "system")
    nested = pickle.dumps(system, protocol=2)
    inner = Call(torch.storage._load_from_bytes, nested)
    legacy = torch_file(torch.zeros(2), zipped=False)
    script = io.BytesIO()
    torch.jit.save(torch.jit.trace(lambda x: x + 1, torch.zeros(1)), script)
    return {
        "os.system": (pickle.dumps(system), "posix.system"),
        "protocol 0": (pickle.dumps(system, protocol=0), "posix.system"),
        "eval": (pickle.dumps(Call(eval, code)), "builtins.eval"),
        "getattr": (pickle.dumps(chain), "builtins.getattr"),
        "dotted": (b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.", "torch.os.system"),
        "as a field": (pickled({"pos": torch.zeros(1, 3), "x": system}, 2), "posix.system"),
        "old, as a field": (pickled({"pos": torch.zeros(1, 3), "x": system}, 1), "posix.system"),
        "in a tensor": (pickle.dumps(inner), "posix.system"),
        "pickle.loads": (pickle.dumps(Call(pickle.loads, nested)), "_pickle.loads"),
        "torch.load": (pickle.dumps(Call(torch.load, "x")), "torch.serialization.load"),
        "torch file": (torch_file({"a": system}, zipped=True), "posix.system"),
        "old torch file": (torch_file({"a": system}, zipped=False), "posix.system"),
        "behind a torch file": (legacy[:14] + nested + legacy, "posix.system"),
        "script": (script.getvalue(), "__torch__"),
        "numpy objects": (pickle.dumps(np.array([system], dtype=object)), "type O8"),
        "class of jit": (b"\x80\x02ctorch.jit._pickle\nbuild_intlist\n.", "torch.jit._pickle"),
        "copyreg": (b"\x80\x02ccopyreg\n_reconstructor\n.", "copyreg._reconstructor"),
    }


def oc20_frame(atoms: Atoms) -> str:
    """A frame as in the published files: one layout of columns and keys, 8 decimals."""
    results = atoms.calc.results
    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        fixed[constraint.index] = True
    lattice = " ".join(f"{x:.8f}" for x in atoms.cell.array.ravel())
    lines = [
        f"{len(atoms)}",
        f'Lattice="{lattice}" Properties=species:S:1:pos:R:3:move_mask:L:1:tags:I:1:forces:R:3 '
        f'energy={results["energy"]:.8f} free_energy={results["energy"] - 0.0125:.8f} pbc="T T T"',
    ]
    for symbol, place, is_fixed, tag, force in zip(
        atoms.symbols, atoms.positions, fixed, atoms.get_tags(), results["forces"], strict=True
    ):
        x, f = (" ".join(f"{value:16.8f}" for value in vector) for vector in (place, force))
        lines.append(f"{symbol:<8}{x} {'F' if is_fixed else 'T'} {tag:8d} {f}")
    return "\n".join(lines) + "\n"


def write_pair(
    folder: Path, stem: str, frames: Sequence[Atoms], references: Iterable[float], *, packed=True
) -> None:
    """Write ``stem.extxyz.xz`` and ``stem.txt.xz``, or both unpacked."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"random{atoms.info['sid']},frame{atoms.info['fid']},{reference!r}\n"
        for atoms, reference in zip(frames, references, strict=True)
    ]
    for end, text in (("extxyz", map(oc20_frame, frames)), ("txt", lines)):
        content = "".join(text).encode()
        path = folder / f"{stem}.{end}{'.xz' if packed else ''}"
        path.write_bytes(lzma.compress(content) if packed else content)


def write_trajectories(folder: Path, systems: dict[str, list[Atoms]], references: dict) -> None:
    """Write ``random<sid>.extxyz.xz`` for each system, and ``system.txt``."""
    folder.mkdir(parents=True)
    for sid, frames in systems.items():
        content = "".join(map(oc20_frame, frames)).encode()
        (folder / f"random{sid}.extxyz.xz").write_bytes(lzma.compress(content))
    lines = [f"random{sid},{references[sid]!r}\n" for sid in systems]
    (folder / "system.txt").write_text("".join(lines))


def pack(folder: Path, archive: Path) -> None:
    """Put a folder into a ``.tar``, under its own name."""
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, folder.name)


def legacy_fields(atoms: Atoms, **extra: Any) -> dict[str, Any]:
    """What fairchem 1 stored of a structure, as torch tensors of its types."""
    fixed = torch.zeros(len(atoms))
    for constraint in atoms.constraints:
        fixed[constraint.index] = 1.0
    return {
        "pos": torch.tensor(atoms.positions, dtype=torch.float32),
        "cell": torch.tensor(atoms.cell.array, dtype=torch.float32).view(1, 3, 3),
        "atomic_numbers": torch.tensor(atoms.numbers, dtype=torch.float32),
        "natoms": len(atoms),
        "tags": torch.tensor(atoms.get_tags(), dtype=torch.long),
        "fixed": fixed,
        **extra,
    }


def s2ef_fields(atoms: Atoms, **extra: Any) -> dict[str, Any]:
    """The same with labels and ids."""
    return legacy_fields(
        atoms,
        y=float(atoms.calc.results["energy"]),
        force=torch.tensor(atoms.calc.results["forces"], dtype=torch.float32),
        sid=atoms.info["sid"],
        fid=atoms.info["fid"],
        **extra,
    )


@contextmanager
def _pyg1() -> Iterator[type]:
    """``torch_geometric.data.data.Data`` as version 1 pickled it: attributes, unset ones None."""

    class Data:
        def __init__(self, fields: dict[str, Any]) -> None:
            unset = ("x", "edge_index", "edge_attr", "y", "pos", "normal", "face")
            self.__dict__.update(dict.fromkeys(unset), **fields)

    Data.__module__, Data.__qualname__ = "torch_geometric.data.data", "Data"
    names = ("torch_geometric", "torch_geometric.data", "torch_geometric.data.data")
    kept = {name: sys.modules.pop(name, None) for name in names}
    try:
        for name in names:
            sys.modules[name] = types.ModuleType(name)
        sys.modules[names[-1]].Data = Data
        yield Data
    finally:
        for name, module in kept.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def pickled(fields: dict[str, Any], version: int) -> bytes:
    """Pickle a structure as a version of torch_geometric does."""
    if version == 1:
        with _pyg1() as data:
            return pickle.dumps(data(fields), protocol=-1)
    from torch_geometric.data import Data

    return pickle.dumps(Data(**fields), protocol=-1)


def write_lmdb(
    path: Path, values: Sequence[bytes] | dict[int, bytes], *, length: bool = True
) -> None:
    """Write an LMDB file as fairchem 1 does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    items = values.items() if isinstance(values, dict) else enumerate(values)
    database = lmdb.open(str(path), subdir=False, map_size=1 << 30, meminit=False)
    with database.begin(write=True) as transaction:
        for key, value in items:
            transaction.put(f"{key}".encode("ascii"), value)
        if length:
            transaction.put(b"length", pickle.dumps(len(values), protocol=-1))
    database.sync()
    database.close()
    path.with_name(path.name + "-lock").unlink(missing_ok=True)


def torch_file(content: Any, *, zipped: bool) -> bytes:
    """What ``torch.save`` writes, since or before torch 1.6."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()
