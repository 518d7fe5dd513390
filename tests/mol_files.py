"""Files in the layouts in which MPtrj, SPICE, rMD17 and MD22 are published."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING

import h5py
import numpy as np
from ase.units import Bohr, GPa, Hartree, kcal, mol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from ase import Atoms


TIGHT = {"rtol": 1e-12, "atol": 1e-15}


def records(format_, path):
    """All records of an input with their structures, part by part as workers read them."""
    assert type(format_).claims(path)
    parts = pickle.loads(pickle.dumps(format_.parts([path])))
    workers = [type(format_)(**format_.options) for _ in parts]
    found = [list(worker.read(part)) for worker, part in zip(workers, parts, strict=True)]
    return [(record, record.build()) for some in found for record in some]


def structures(format_, path):
    """All structures of an input."""
    return [atoms for _, atoms in records(format_, path)]


def assert_same_labels(atoms: Atoms, expected: Atoms, tolerance: dict = TIGHT) -> None:
    """Compare structure and labels; to all digits that are meant by default."""
    np.testing.assert_array_equal(atoms.numbers, expected.numbers)
    np.testing.assert_array_equal(atoms.pbc, expected.pbc)
    np.testing.assert_allclose(atoms.positions, expected.positions, **tolerance)
    np.testing.assert_allclose(atoms.cell.array, expected.cell.array, **tolerance)
    np.testing.assert_allclose(
        atoms.calc.results["energy"], expected.get_potential_energy(), rtol=tolerance["rtol"]
    )
    forces = expected.get_forces(apply_constraint=False)
    np.testing.assert_allclose(atoms.calc.results["forces"], forces, **tolerance)


def arrays_of(frames):
    return (
        np.array([atoms.positions for atoms in frames]),
        np.array([atoms.get_potential_energy() for atoms in frames]),
        np.array([atoms.get_forces() for atoms in frames]),
    )


def pymatgen_dict(atoms: Atoms, keys: Sequence[str] = ("abc", "xyz")) -> dict:
    """A crystal as ``pymatgen.core.Structure.as_dict`` describes it."""
    coordinates = {"abc": atoms.get_scaled_positions(wrap=False), "xyz": atoms.positions}
    cellpar = atoms.cell.cellpar().tolist()
    sites = [
        {
            "species": [{"element": symbol, "occu": 1}],
            **{key: coordinates[key][index].tolist() for key in keys},
            "label": symbol,
            "properties": {"magmom": 0.0},
        }
        for index, symbol in enumerate(atoms.symbols)
    ]
    return {
        "@module": "pymatgen.core.structure",
        "@class": "Structure",
        "charge": None,
        "lattice": {
            "matrix": atoms.cell.array.tolist(),
            "pbc": [True, True, True],
            **dict(zip(("a", "b", "c", "alpha", "beta", "gamma"), cellpar, strict=True)),
            "volume": atoms.get_volume(),
        },
        "sites": sites,
    }


def mptrj_frame(atoms: Atoms, corrected: float, **more) -> dict:
    """A frame of ``MPtrj_2022.9_full.json``, stress in VASP's kBar and sign."""
    n, results = len(atoms), atoms.calc.results
    magmoms = results.get("magmoms")
    frame = {
        "structure": pymatgen_dict(atoms),
        "uncorrected_total_energy": float(results["energy"]),
        "corrected_total_energy": float(corrected),
        "energy_per_atom": float(corrected) / n,
        "ef_per_atom": -1.5,
        "e_per_atom_relaxed": float(corrected) / n,
        "ef_per_atom_relaxed": -1.5,
        "force": np.asarray(results["forces"]).tolist(),
        "stress": (atoms.get_stress(voigt=False) / (-0.1 * GPa)).tolist(),
        "magmom": None if magmoms is None else np.asarray(magmoms).tolist(),
        "bandgap": None,
        "mp_id": None,
    }
    return {**frame, **more}


def write_mptrj(path: Path, frames: Iterable[tuple[str, str, dict]], **style) -> None:
    """Write ``(material, frame id, frame)``, frames of a material together."""
    materials: dict[str, dict] = {}
    for material, name, frame in frames:
        materials.setdefault(material, {})[name] = frame
    path.write_text(json.dumps(materials, **style))


def write_spice(path: Path, molecules: dict[str, dict], units: bool = True) -> None:
    """Write molecules of ``{name: {frames, smiles, subset, mbis}}`` as SPICE 1.1.4 has them."""
    with h5py.File(path, "w") as file:
        for name, molecule in molecules.items():
            frames = molecule["frames"]
            arrays = {
                "conformations": ("bohr", [a.positions / Bohr for a in frames], "f4"),
                "dft_total_energy": ("hartree", _energies(frames) / Hartree, "f8"),
                "formation_energy": ("hartree", _energies(frames) / Hartree + 99, "f8"),
                "dft_total_gradient": (
                    "hartree/bohr",
                    [-a.get_forces() / (Hartree / Bohr) for a in frames],
                    "f4",
                ),
            }
            if "mbis" in molecule:
                arrays["mbis_charges"] = ("elementary_charge", molecule["mbis"], "f4")
            group = file.create_group(name)
            group["atomic_numbers"] = frames[0].numbers.astype(np.int16)
            for key in ("smiles", "subset"):
                group.create_dataset(key, data=[molecule[key]], dtype=h5py.string_dtype())
            for key, (unit, values, dtype) in arrays.items():
                group.create_dataset(key, data=np.array(values), dtype=dtype)
                if units:
                    group[key].attrs["units"] = unit


def write_rmd17(path: Path, frames: Sequence[Atoms], compressed: bool = False, **more) -> None:
    """Write a trajectory as rMD17's archives have it."""
    unit = kcal / mol
    arrays = {
        "nuclear_charges": frames[0].numbers.astype(np.uint8),
        "coords": np.array([atoms.positions for atoms in frames]),
        "energies": _energies(frames) / unit,
        "forces": np.array([atoms.get_forces() for atoms in frames]) / unit,
        "old_indices": np.arange(len(frames)) * 2.0,
    }
    (np.savez_compressed if compressed else np.savez)(path, **{**arrays, **more})


def write_md22(path: Path, frames: Sequence[Atoms], **more) -> None:
    """Write a trajectory as the archives of sGDML (MD17, MD22) have it."""
    unit = kcal / mol
    arrays = {
        "type": "d",
        "name": "Aspirin",
        "theory": "PBE+MBD",
        "r_unit": "Ang",
        "e_unit": "kcal/mol",
        "z": frames[0].numbers.astype(np.uint8),
        "R": np.array([atoms.positions for atoms in frames]),
        "E": _energies(frames)[:, None] / unit,
        "F": np.array([atoms.get_forces() for atoms in frames]) / unit,
    }
    np.savez_compressed(path, **{**arrays, **more})


def _energies(frames: Sequence[Atoms]) -> np.ndarray:
    return np.array([atoms.get_potential_energy() for atoms in frames])
