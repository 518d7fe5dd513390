"""Reader of MPtrj: what it gives against files that other code reads."""

from __future__ import annotations

import gzip
import itertools
import json

import numpy as np
import pytest
from ase.db import connect
from ase.io import iread

from data_helpers import stored
from escaip_fairchem.data import store
from escaip_fairchem.data.formats import json_frames, mptrj_json
from escaip_fairchem.data.formats.mptrj_json import MPtrjJson
from escaip_fairchem.errors import UserError
from mol_files import (
    assert_same_labels,
    mptrj_frame,
    pymatgen_dict,
    records,
    structures,
    write_mptrj,
)


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
