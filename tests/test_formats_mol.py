"""Readers of MPtrj, SPICE, MD17 and VASP: what they give against files that other code reads."""

from __future__ import annotations

import gzip
import itertools
import json
import pickle
import shutil

import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.db import connect
from ase.io import iread
from ase.units import Bohr, Hartree, kcal, mol

from data_helpers import labelled_atoms, read_sample, stored
from escaip_fairchem.data import store
from escaip_fairchem.data.formats import json_frames, mptrj_json, npz, spice_hdf5
from escaip_fairchem.data.formats.md_units import work_slope
from escaip_fairchem.data.formats.mptrj_json import MPtrjJson
from escaip_fairchem.data.formats.npz import Npz
from escaip_fairchem.data.formats.spice_hdf5 import SpiceHdf5
from escaip_fairchem.data.formats.spice_molecules import formal_charge
from escaip_fairchem.data.formats.vasp import VaspFolders
from escaip_fairchem.errors import UserError
from mol_files import (
    mptrj_frame,
    pymatgen_dict,
    write_md22,
    write_mptrj,
    write_rmd17,
    write_spice,
)
from vasp_files import outcar, vasprun

TIGHT = {"rtol": 1e-12, "atol": 1e-15}


def records(format_, path):
    """All records of an input with their structures, part by part as workers read them."""
    assert type(format_).claims(path)
    parts = pickle.loads(pickle.dumps(format_.parts([path])))
    workers = [type(format_)(**format_.options) for _ in parts]
    found = [list(worker.read(part)) for worker, part in zip(workers, parts, strict=True)]
    return [(record, record.build()) for some in found for record in some]


def structures(format_, path):
    return [atoms for _, atoms in records(format_, path)]


def assert_same_labels(atoms: Atoms, expected: Atoms, tolerance: dict = TIGHT) -> None:
    np.testing.assert_array_equal(atoms.numbers, expected.numbers)
    np.testing.assert_array_equal(atoms.pbc, expected.pbc)
    np.testing.assert_allclose(atoms.positions, expected.positions, **tolerance)
    np.testing.assert_allclose(atoms.cell.array, expected.cell.array, **tolerance)
    np.testing.assert_allclose(
        atoms.calc.results["energy"], expected.get_potential_energy(), rtol=tolerance["rtol"]
    )
    forces = expected.get_forces(apply_constraint=False)
    np.testing.assert_allclose(atoms.calc.results["forces"], forces, **tolerance)


# --- MPtrj -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def materials(test_data):
    """Genuine MPtrj frames as (mp id, frame id, atoms, corrected energy), read by ASE."""
    database = connect(test_data / "formats/mptrj_11frames_ase.db")
    frames = [(row.toatoms(), row.data) for row in database.select()]
    small = iread(test_data / "formats/mptrj_small_materials.extxyz")
    frames += [(atoms, atoms.info) for atoms in small]
    names = "{task_id}-{calc_id}-{ionic_step}"
    return [
        (info["mp_id"], names.format(**info), atoms, info["corrected_total_energy"])
        for atoms, info in frames
    ]


def mptrj_frames(materials):
    return [(mp, name, mptrj_frame(atoms, corrected)) for mp, name, atoms, corrected in materials]


@pytest.mark.parametrize("style", [{}, {"indent": 1}, {"separators": (",", ":")}])
@pytest.mark.parametrize("part_bytes, n_parts", [(1, 3), (20_000, 2), (2**26, 1)])
def test_mptrj_gives_the_labels_of_the_genuine_frames(
    materials, style, part_bytes, n_parts, tmp_path, monkeypatch
):
    monkeypatch.setattr(mptrj_json, "PART_BYTES", part_bytes)
    monkeypatch.setattr(json_frames, "CHUNK", 5_000)  # frames span several chunks
    path = tmp_path / "MPtrj_2022.9_full.json"
    write_mptrj(path, mptrj_frames(materials), **style)
    assert len(MPtrjJson().parts([path])) == n_parts
    found = records(MPtrjJson(), path)
    assert [record.id for record, _ in found] == [name for _, name, _, _ in materials]
    offsets = [record.index for record, _ in found]
    text = path.read_bytes()
    assert all(text[offset : offset + 1] == b"{" for offset in offsets)
    for (record, atoms), (mp, name, expected, corrected) in zip(found, materials, strict=True):
        assert_same_labels(atoms, expected)
        np.testing.assert_allclose(
            atoms.calc.results["stress"], expected.get_stress(), rtol=1e-12, atol=1e-18
        )
        magmoms = expected.calc.results.get("magmoms")
        if magmoms is None:
            assert "magmoms" not in atoms.calc.results
        else:
            np.testing.assert_array_equal(atoms.calc.results["magmoms"], magmoms)
        assert record.name == f"{mp}/{name}"
        assert (atoms.info["sid"], atoms.info["fid"]) == (mp, name)
        assert atoms.info["corrected_total_energy"] == corrected
        assert "bandgap" not in atoms.info  # null


def test_mptrj_forces_and_stress_are_the_slope_of_the_energy(materials, tmp_path):
    """Between frames of a relaxation with its cell: dE = -F.dx + V stress:strain."""
    path = tmp_path / "m.json"
    write_mptrj(path, [f for f in mptrj_frames(materials) if f[1].startswith("mp-1028232")])
    frames = structures(MPtrjJson(), path)
    assert len(frames) == 6
    rows = []
    for first, second in itertools.combinations(frames, 2):
        cell = (first.cell.array + second.cell.array) / 2
        strain = np.linalg.solve(first.cell.array, second.cell.array) - np.eye(3)
        step = np.diff([a.get_scaled_positions(wrap=False) for a in (first, second)], axis=0)[0]
        forces = (first.get_forces() + second.get_forces()) / 2
        stress = (first.get_stress(voigt=False) + second.get_stress(voigt=False)) / 2
        rows.append(
            (
                -np.sum(forces * ((step - step.round()) @ cell)),
                first.get_volume() * np.sum(stress * (strain + strain.T) / 2),
                second.get_potential_energy() - first.get_potential_energy(),
            )
        )
    work, strain_energy, change = np.array(rows).T

    def unexplained(predicted):
        return np.linalg.norm(change - predicted) / np.linalg.norm(change)

    assert unexplained(work + strain_energy) < 0.2
    assert unexplained(work - strain_energy) > 0.8
    assert unexplained(work) > 0.4


def test_mptrj_corrected_energies_and_gzip(materials, tmp_path):
    plain = tmp_path / "m.json"
    write_mptrj(plain, mptrj_frames(materials))
    path = tmp_path / "m.json.gz"
    path.write_bytes(gzip.compress(plain.read_bytes()))
    found = structures(MPtrjJson(energy="corrected"), path)
    assert [atoms.get_potential_energy() for atoms in found] == [m[3] for m in materials]
    assert "MP2020" in MPtrjJson(energy="corrected").card([path]).energy
    with pytest.raises(UserError, match="energy=raw: MPtrj has uncorrected and corrected"):
        MPtrjJson(energy="raw")


def test_mptrj_magmoms_and_stress_reach_the_stored_rows(materials, tmp_path):
    path = tmp_path / "m.json"
    write_mptrj(path, mptrj_frames(materials))
    writer = store.SplitWriter(tmp_path / "out")
    for atoms in structures(MPtrjJson(), path):
        writer.add(atoms)
    writer.close()
    for atoms, (_, _, expected, _) in zip(stored(tmp_path / "out"), materials, strict=True):
        np.testing.assert_allclose(atoms.get_stress(), expected.get_stress(), rtol=1e-12)
        if "magmoms" in expected.calc.results:
            np.testing.assert_array_equal(
                atoms.get_magnetic_moments(), expected.calc.results["magmoms"]
            )


def test_mptrj_fractional_coordinates_alone_are_enough(materials, tmp_path):
    mp, name, expected, corrected = materials[0]
    structure = pymatgen_dict(expected, keys=("abc",))
    path = tmp_path / "m.json"
    write_mptrj(path, [(mp, name, mptrj_frame(expected, corrected, structure=structure))])
    (atoms,) = structures(MPtrjJson(), path)
    np.testing.assert_allclose(atoms.positions, expected.positions, rtol=1e-12, atol=1e-12)


def test_a_defect_in_a_frame_costs_that_frame_only(materials, tmp_path):
    frames = mptrj_frames(materials)
    frames[1][2]["force"] = None
    frames[2][2]["force"][0][1] = float("nan")
    frames[6][2]["structure"]["sites"][0]["species"][0]["occu"] = 0.5
    frames[4][2]["note"] = 'braces } in { "quotes" \\'
    frames[5][2]["force"][0][0] = None
    path = tmp_path / "m.json"
    write_mptrj(path, frames)
    text = path.read_text().replace('"uncorrected_total_energy": -77.60922463', '"unc": -')
    path.write_text(text)
    (part,) = MPtrjJson().parts([path])
    found = list(MPtrjJson().read(part))
    assert len(found) == len(frames)
    reasons = {}
    for record in found:
        try:
            atoms = record.build()
        except ValueError as error:
            reasons[record.id] = str(error)
        else:
            if np.isnan(atoms.calc.results["forces"]).any():
                reasons[record.id] = "nan"
    names = [name for _, name, _ in frames]
    broken = next(n for _, n, a, _ in materials if a.get_potential_energy() == -77.60922463)
    assert set(reasons) == {names[1], names[2], names[5], names[6], broken}
    assert "no force" in reasons[names[1]]
    assert reasons[names[2]] == reasons[names[5]] == "nan"
    assert "Li is disordered" in reasons[names[6]]


def test_a_truncated_mptrj_file_gives_its_whole_frames_and_says_so(materials, tmp_path):
    path = tmp_path / "m.json"
    write_mptrj(path, mptrj_frames(materials))
    text = path.read_bytes()
    path.write_bytes(text[: text.index(b'"force"', len(text) // 2)])
    (part,) = MPtrjJson().parts([path])
    found = []
    with pytest.raises(UserError, match=r"m\.json is cut off or damaged behind byte \d+"):
        found += MPtrjJson().read(part)
    stream = MPtrjJson().read(part)
    whole = [next(stream).build() for _ in range(text[: path.stat().st_size].count(b'"mp_id"'))]
    for atoms, (_, _, expected, _) in zip(whole, materials, strict=False):
        assert_same_labels(atoms, expected)
    assert len(whole) > 5


def test_other_json_is_not_taken_for_mptrj(test_data, tmp_path):
    assert not MPtrjJson.claims(test_data / "formats/oc22_like_ase.json")
    (tmp_path / "list.json").write_text(json.dumps([{"structure": {"lattice": 1}}]))
    assert not MPtrjJson.claims(tmp_path / "list.json")


# --- SPICE -----------------------------------------------------------------------------------


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
    slope, correlation = work_slope(*_arrays(found))
    assert correlation > 0.85
    assert 0.8 < slope < 1.2


def _arrays(frames):
    return (
        np.array([atoms.positions for atoms in frames]),
        np.array([atoms.get_potential_energy() for atoms in frames]),
        np.array([atoms.get_forces() for atoms in frames]),
    )


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


# --- MD17, rMD17, MD22 -----------------------------------------------------------------------


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
    slope, correlation = work_slope(*_arrays(frames))
    assert correlation > 0.9
    assert 0.85 < slope < 1.15


# --- VASP ------------------------------------------------------------------------------------


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
