"""Reader of VASP folders: what it gives against files that other code reads."""

from __future__ import annotations

import gzip
import shutil

import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from data_helpers import labelled_atoms, read_sample
from escaip_fairchem.data.formats.vasp import VaspFolders
from escaip_fairchem.errors import UserError
from mol_files import (
    assert_same_labels,
    records,
    structures,
)
from vasp_files import outcar, vasprun


@pytest.fixture
def calculations(tmp_path):
    """A tree of three calculations of copper, in all the forms that are read."""
    frames = labelled_atoms(9)
    for atoms in frames:
        results = atoms.calc.results
        atoms.wrap()  # as VASP does
        atoms.calc = SinglePointCalculator(atoms, **results)
    texts = {
        "a/relax/vasprun.xml": vasprun(frames[:3]),
        "a/relax/OUTCAR": outcar(frames[:1]),
        "a/static/OUTCAR": outcar(frames[3:5]),
        "b/vasprun.xml.gz": vasprun(frames[5:7]),
        "c/OUTCAR.gz": outcar(frames[7:9]),
    }
    root = tmp_path / "calcs"
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = text.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (root / "d").mkdir()
    return root, frames


def test_vasp_folders_give_every_ionic_step(calculations):
    root, frames = calculations
    found = records(VaspFolders(), root)
    ids = ["a/relax"] * 3 + ["a/static"] * 2 + ["b"] * 2 + ["c"] * 2
    steps = [0, 1, 2, 0, 1, 0, 1, 0, 1]
    assert [atoms.info["sid"] for _, atoms in found] == ids
    assert [atoms.info["fid"] for _, atoms in found] == steps
    assert len({record.id for record, _ in found}) == 9
    for (_, atoms), expected in zip(found, frames, strict=True):
        assert_same_labels(atoms, expected, {"rtol": 1e-8, "atol": 2e-8})  # digits of the files
    fixed = [c for _, atoms in found for c in atoms.constraints]
    assert len(fixed) == 5  # vasprun.xml has the flags, OUTCAR alone has not
    assert all(isinstance(c, FixAtoms) and list(c.index) == [0] for c in fixed)


def test_outcar_takes_fixed_atoms_from_the_poscar(calculations):
    root, frames = calculations
    frames[3].write(root / "a/static/POSCAR", format="vasp")
    found = structures(VaspFolders(), root / "a/static")
    assert [list(atoms.constraints[0].index) for atoms in found] == [[0], [0]]
    assert found[0].info["sid"] == "static"


def test_unfinished_calculations_give_their_whole_steps(calculations):
    root, frames = calculations
    relax = root / "a/relax/vasprun.xml"
    text = relax.read_text()
    (root / "a/relax/OUTCAR").unlink()
    relax.write_text(text[: text.rindex("<calculation>") + 60])
    found = structures(VaspFolders(), root / "a/relax")
    assert len(found) == 2
    assert_same_labels(found[1], frames[1], {"rtol": 1e-8, "atol": 2e-8})

    relax.write_text(text[: text.index("<calculation>") + 60])
    (part,) = VaspFolders().parts([root / "a/relax"])
    with pytest.raises(UserError, match=r"relax cannot be read \(vasprun.xml: no whole ionic step"):
        list(VaspFolders().read(part))
    shutil.copy(root / "a/static/OUTCAR", root / "a/relax/OUTCAR")
    assert len(structures(VaspFolders(), root / "a/relax")) == 2

    static = root / "a/static/OUTCAR"
    static.write_text(static.read_text()[: static.read_text().rindex("TOTAL-FORCE") + 100])
    assert len(structures(VaspFolders(), root / "a/static")) == 1


def test_vasp_energy_is_chosen(calculations):
    root, frames = calculations
    path = root / "b/vasprun.xml.gz"
    text = gzip.decompress(path.read_bytes()).decode()
    energy = frames[5].get_potential_energy()
    free = '<i name="e_fr_energy">{:.8f}'
    text = text.replace(free.format(energy), free.format(energy - 1))
    path.write_bytes(gzip.compress(text.encode()))
    assert structures(VaspFolders(), root / "b")[0].get_potential_energy() == pytest.approx(energy)
    chosen = structures(VaspFolders(energy="e_fr_energy"), root / "b")[0]
    assert chosen.get_potential_energy() == pytest.approx(energy - 1)


def test_genuine_vasp_forces_are_the_slope_of_the_energy(test_data, tmp_path):
    """A relaxation of OC20, written as VASP does and read back: units survive the way."""
    frames = read_sample(test_data / "oc20_sample.extxyz.gz", ":80")
    frames = [atoms for atoms in frames if atoms.info["sid"] == frames[0].info["sid"]]
    (tmp_path / "vasprun.xml").write_text(vasprun(frames))
    found = structures(VaspFolders(), tmp_path)
    assert len(found) == len(frames)
    positions = np.array([atoms.get_scaled_positions(wrap=False) for atoms in found])
    step = np.diff(positions, axis=0)
    step = (step - step.round()) @ found[0].cell.array
    forces = np.array([atoms.get_forces(apply_constraint=False) for atoms in found])
    work = -np.einsum("mij,mij->m", (forces[1:] + forces[:-1]) / 2, step)
    change = np.diff([atoms.get_potential_energy() for atoms in found])
    small = np.abs(step).max(axis=(1, 2)) < 0.1  # A
    assert small.sum() > 10
    work, change = work[small], change[small]
    assert np.corrcoef(work, change)[0, 1] > 0.95
    assert 0.85 < work @ change / (work @ work) < 1.15


def test_folders_without_vasp_output_are_left_to_others(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/INCAR").write_text("")
    assert not VaspFolders.claims(tmp_path)
    assert not VaspFolders.claims(tmp_path / "x/INCAR")
