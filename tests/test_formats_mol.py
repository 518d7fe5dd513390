"""Readers of SPICE, MD17, rMD17 and MD22: what they give against files that other code reads."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import Bohr, Hartree, kcal, mol

from data_helpers import read_sample
from escaip_fairchem.data.formats import npz, spice_hdf5
from escaip_fairchem.data.formats.md_units import work_slope
from escaip_fairchem.data.formats.npz import Npz
from escaip_fairchem.data.formats.spice_hdf5 import SpiceHdf5
from escaip_fairchem.data.formats.spice_molecules import formal_charge
from escaip_fairchem.errors import UserError
from mol_files import (
    arrays_of,
    assert_same_labels,
    records,
    structures,
    write_md22,
    write_rmd17,
    write_spice,
)


@pytest.mark.parametrize(
    "energy, key", [("total", "dft_total_energy"), ("formation", "formation_energy")]
)
def test_spice_gives_what_the_genuine_file_holds(test_data, energy, key):
    path = test_data / "formats/SPICE-1.1.4_n2.hdf5"
    found = structures(SpiceHdf5(energy=energy), path)
    assert len(found) == 55
    with h5py.File(path) as file:
        expected = [(name, index) for name in file for index in range(len(file[name][key]))]
        for atoms, (name, index) in zip(found, expected, strict=True):
            group = file[name]
            assert (atoms.info["sid"], atoms.info["fid"]) == (name, index)
            np.testing.assert_array_equal(atoms.numbers, group["atomic_numbers"])
            positions = group["conformations"][index].astype(float)
            np.testing.assert_allclose(atoms.positions, positions * 0.52917721067, rtol=1e-9)
            assert atoms.get_potential_energy() == pytest.approx(
                group[key][index] * 27.21138602, rel=1e-9
            )
            gradient = group["dft_total_gradient"][index].astype(float)
            np.testing.assert_allclose(atoms.get_forces(), -gradient * 51.42206707, rtol=1e-9)
            assert not atoms.pbc.any()


def test_spice_agrees_with_the_frames_converted_elsewhere(test_data):
    """Charges and labels against the extended XYZ, which has other constants to seven digits."""
    expected = {
        (atoms.info["smiles"], atoms.info["conf"]): atoms
        for atoms in read_sample(test_data / "spice_sample.extxyz.gz")
        if "conf" in atoms.info
    }
    assert len(expected) >= 50
    found = structures(SpiceHdf5(), test_data / "formats/SPICE-1.1.4_n2.hdf5")
    for atoms in found:
        other = expected[atoms.info["smiles"], atoms.info["fid"]]
        assert atoms.info["charge"] == other.info["charge"] == 1
        assert atoms.info["spin"] == 1
        assert_same_labels(atoms, other, {"rtol": 1e-6, "atol": 2e-6})
    assert {atoms.info["subset"] for atoms in found} == {"PubChem", "DES370K Dimers"}


def test_spice_forces_are_minus_the_slope_of_the_energy(test_data):
    found = structures(SpiceHdf5(), test_data / "formats/SPICE-1.1.4_n2.hdf5")[:50]
    slope, correlation = work_slope(*arrays_of(found))
    assert correlation > 0.85
    assert 0.8 < slope < 1.2


def test_curated_spice_is_read_in_its_own_units(test_data):
    path = test_data / "formats/spice2-1000_429_md_0-1.hdf5"
    first, second = structures(SpiceHdf5(), path)
    assert first.info == {"sid": "spice2-1000_429_md", "fid": 0, "charge": -2, "spin": 1}
    assert second.info["fid"] == 1
    assert first.get_potential_energy() == -33533.58818835873
    with h5py.File(path) as file:
        np.testing.assert_array_equal(second.get_forces(), file["spice2-1000_429_md_1/forces"])
    (part,) = SpiceHdf5().parts([path])
    with pytest.raises(UserError, match="no formation energy; choose energy=total"):
        next(SpiceHdf5(energy="formation").read(part)).build()


@pytest.fixture
def ions():
    """Ammonium and acetylene with labels made up in eV and A."""
    rng = np.random.default_rng(0)

    def frames(symbols, count):
        made = []
        for _ in range(count):
            atoms = Atoms(symbols, positions=rng.normal(size=(len(symbols), 3)))
            forces = rng.normal(size=(len(atoms), 3))
            atoms.calc = SinglePointCalculator(atoms, energy=rng.normal(), forces=forces)
            made.append(atoms)
        return made

    return {
        "acetylene": {
            "frames": frames(["C", "C", "H", "H"], 4),
            "smiles": "[H:3][C:1]#[C:2][H:4]",
            "subset": "SPICE DES Monomers Single Points Dataset v1.1",
        },
        "ammonium": {
            "frames": frames(["N", "H", "H", "H", "H"], 3),
            "smiles": "[N+:1]([H:2])([H:3])([H:4])[H:5]",
            "subset": "Something New v1.0",
            "mbis": np.full((3, 5, 1), 0.2),
        },
    }


@pytest.mark.parametrize("units", [True, False], ids=["units", "no units"])
@pytest.mark.parametrize("part_records, n_parts", [(1, 2), (3, 2), (20_000, 1)])
def test_spice_parts_share_a_file(ions, units, part_records, n_parts, tmp_path, monkeypatch):
    monkeypatch.setattr(spice_hdf5, "PART_RECORDS", part_records)
    path = tmp_path / "SPICE.hdf5"
    write_spice(path, ions, units)
    found = records(SpiceHdf5(), path)
    assert len(SpiceHdf5().parts([path])) == n_parts
    assert [record.index for record, _ in found] == list(range(7))
    assert [record.id for record, _ in found][3:5] == ["acetylene/3", "ammonium/0"]
    expected = [atoms for molecule in ions.values() for atoms in molecule["frames"]]
    for (_, atoms), other in zip(found, expected, strict=True):
        assert_same_labels(atoms, other, {"rtol": 1e-6, "atol": 1e-6})  # float32
    assert [atoms.info["charge"] for _, atoms in found] == [0] * 4 + [1] * 3
    assert found[0][1].info["subset"] == "DES370K Monomers"
    assert found[-1][1].info["subset"] == "Something New v1.0"


def test_spice_refuses_what_contradicts_itself(ions, tmp_path):
    path = tmp_path / "SPICE.hdf5"
    ions["ammonium"]["mbis"][1] -= 0.2  # neutral
    write_spice(path, ions)
    with h5py.File(path, "a") as file:
        file["acetylene/conformations"].attrs["units"] = "nm"
    (part,) = SpiceHdf5().parts([path])
    reasons = []
    for record in SpiceHdf5().read(part):
        try:
            record.build()
        except UserError as error:
            reasons.append((record.name, str(error)))
    assert [name for name, _ in reasons] == [f"acetylene/{i}" for i in range(4)] + ["ammonium/1"]
    assert reasons[0][1] == "conformations is in 'nm'; SPICE gives bohr"
    assert "MBIS charges add up to +0.00 e" in reasons[4][1]

    ions["ammonium"]["smiles"] = "[N:1]([H:2])([H:3])([H:4])[H:5]"
    path = tmp_path / "odd.hdf5"
    write_spice(path, {"ammonium": ions["ammonium"]})
    (part,) = SpiceHdf5().parts([path])
    with pytest.raises(UserError, match="odd number of electrons"):
        next(SpiceHdf5().read(part)).build()


@pytest.mark.parametrize(
    "smiles, charge",
    [
        ("C#C.[Na+]", 1),
        ("[Ca+2:1]", 2),
        ("[Fe+++]", 3),
        ("[O-:2][S:1](=[O:3])(=[O:4])[O-:5]", -2),
        ("[C@@H:8]([N+:9]([H:25])([H:26])[H:27])[C:1](=[O:2])[O-:3]", 0),
        ("[13CH3-]", -1),
        ("C-C#N", 0),
    ],
)
def test_formal_charge(smiles, charge):
    assert formal_charge(smiles) == charge


@pytest.fixture(scope="module")
def aspirin(test_data):
    frames = read_sample(test_data / "rmd17_sample.extxyz.gz", ":300")
    return [atoms for atoms in frames if atoms.info["molecule"] == "aspirin"]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("part_records", [150, 100_000])
def test_rmd17_frames_keep_their_labels(aspirin, compressed, part_records, tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "PART_RECORDS", part_records)
    monkeypatch.setattr(npz, "BLOCK_BYTES", 10_000)
    path = tmp_path / "rmd17_aspirin.npz"
    write_rmd17(path, aspirin, compressed)
    assert len(Npz().parts([path])) == -(-len(aspirin) // part_records)
    found = records(Npz(), path)
    for index, ((record, atoms), expected) in enumerate(zip(found, aspirin, strict=True)):
        assert_same_labels(atoms, expected)
        assert record.index == index
        assert atoms.info == {
            "sid": "rmd17_aspirin", "fid": index, "charge": 0, "spin": 1, "old_index": 2 * index
        }  # fmt: skip


def test_md22_says_its_name_and_theory(aspirin, tmp_path):
    path = tmp_path / "md22.npz"
    write_md22(path, aspirin[:50])
    found = structures(Npz(), path)
    for atoms, expected in zip(found, aspirin, strict=False):
        assert_same_labels(atoms, expected)
    assert found[0].info["sid"] == "Aspirin"
    card = Npz().card([path])
    assert (card.data, card.theory) == ("MD17 or MD22", "PBE+MBD")
    assert card.units["energy"] == "kcal/mol"


@pytest.mark.parametrize(
    "units, factors, message",
    [
        (
            "kcal",
            (kcal / mol, kcal / mol),
            "is the total energy of this molecule in ev, not in kcal",
        ),
        ("ev", (1, 1), "is the total energy of this molecule in kcal, not in ev"),
        ("kcal", (kcal / mol / Hartree,) * 2, "molecule in hartree, not in kcal.* units=hartree"),
        ("kcal", (1, kcal / mol), "different units"),
        ("kcal", (1, Bohr), "different units"),
        ("kcal", (1, -1), "opposite sign"),
    ],
    ids=["eV as kcal", "kcal as eV", "hartree", "forces in eV", "forces per Bohr", "gradient"],
)
def test_npz_units_are_judged(aspirin, units, factors, message, tmp_path):
    path = tmp_path / "rmd17_aspirin.npz"
    write_rmd17(path, aspirin)
    arrays = dict(np.load(path))
    arrays["energies"] *= factors[0]
    arrays["forces"] *= factors[1]
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=message):
        Npz(units=units).parts([path])


def test_npz_in_ev_is_read_as_such_and_the_files_own_unit_counts(aspirin, tmp_path):
    path = tmp_path / "a.npz"
    in_ev = {
        "E": np.array([[atoms.get_potential_energy()] for atoms in aspirin]),
        "F": np.array([atoms.get_forces() for atoms in aspirin]),
    }
    write_md22(path, aspirin, **in_ev, e_unit="eV")
    with pytest.raises(UserError, match="the file says eV, not kcal; pass --set units=ev"):
        Npz().parts([path])
    for atoms, expected in zip(structures(Npz(units="ev"), path), aspirin, strict=True):
        assert_same_labels(atoms, expected)


def test_npz_defects_are_said(aspirin, tmp_path):
    path = tmp_path / "a.npz"
    write_rmd17(path, aspirin[:5], forces=np.asfortranarray(np.zeros((5, 21, 3))))
    with pytest.raises(UserError, match="stored by columns"):
        Npz().parts([path])
    np.savez(path, foo=1)
    assert not Npz.claims(path)
    path.write_bytes(b"PK")
    assert not Npz.claims(path)


@pytest.mark.parametrize("name", ["rmd17_sample", "3bpa_sample"])
def test_work_of_genuine_forces_is_the_change_of_energy(test_data, name):
    frames = read_sample(test_data / f"{name}.extxyz.gz", ":300")
    slope, correlation = work_slope(*arrays_of(frames))
    assert correlation > 0.9
    assert 0.85 < slope < 1.15
