"""Adsorption energies and barriers, against ASE alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import add_adsorbate, fcc100, molecule
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.mep import NEB
from ase.optimize import FIRE, LBFGS

from escaip_fairchem import UserError
from escaip_fairchem.cli import main
from escaip_fairchem.simulate.adsorption import Gas, adsorption
from escaip_fairchem.simulate.neb import BatchedNEB, NEBOptions, _start, run_neb
from escaip_fairchem.simulate.relax import RelaxOptions
from simulate_helpers import copper_slab, emt, save_small

if TYPE_CHECKING:
    from escaip_fairchem.simulate.model import Model

OPTIONS = RelaxOptions(fmax=0.02, steps=100)


def total() -> Model:
    """EMT as a model of total energies."""
    model = emt()
    model.references = {7: -1.0, 29: -2.0}
    return model


def relaxed_energy(atoms) -> float:
    atoms = atoms.copy()
    atoms.calc = EMT()
    LBFGS(atoms, logfile=None).run(fmax=0.02, steps=100)
    return atoms.get_potential_energy()


def test_adsorption_energy_is_the_difference(tmp_path):
    """The slab is cut out by tags, its constraint with it; half a molecule is the gas."""
    adslabs = [("a", copper_slab(0)), ("b", copper_slab(1))]
    nitrogen = molecule("N2")
    gas = [Gas("n2", nitrogen, 0.5)]
    found = adsorption(total(), adslabs, None, gas, tmp_path, OPTIONS)
    bare = copper_slab(0)[:-1]
    assert len(bare.constraints[0].index) == 8
    slab, half = relaxed_energy(bare), 0.5 * relaxed_energy(nitrogen)
    for (_, atoms), result in zip(adslabs, found, strict=True):
        adslab = relaxed_energy(atoms)
        assert result.converged
        assert result.adslab == pytest.approx(adslab, abs=1e-8)
        assert result.slab == pytest.approx(slab, abs=1e-8)
        assert result.gas == pytest.approx(half, abs=1e-8)
        assert result.adsorption == pytest.approx(adslab - slab - half, abs=1e-8)
    rows = (tmp_path / "adsorption.csv").read_text().splitlines()
    assert len(rows) == 3
    again = adsorption(total(), adslabs, None, gas, tmp_path, OPTIONS)
    assert again == found
    still = adsorption(total(), adslabs, bare, gas, tmp_path / "n", OPTIONS, relax="none")
    bare.calc = EMT()
    assert still[0].slab == pytest.approx(bare.get_potential_energy())


def test_slab_that_is_free_where_the_adslab_is_not_is_named(tmp_path, capsys):
    free = copper_slab()[:-1]
    free.set_constraint()
    adsorption(
        total(), [("a", copper_slab())], free, [Gas("n2", molecule("N2"), 0.5)], tmp_path,
        OPTIONS, relax="none",
    )  # fmt: skip
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "no atom is fixed in slab" in line


def test_terms_that_do_not_belong_together_are_refused(tmp_path):
    adslab, gas = ("a", copper_slab()), Gas("n2", molecule("N2"), 1.0)
    untagged = copper_slab()
    untagged.set_tags(0)
    larger = copper_slab()
    larger.set_cell(larger.cell * [1, 1, 2])
    oxygen = copper_slab()
    oxygen.symbols[-1] = "O"
    without = emt()
    # hydrogen cancels in the composition, its energies do not
    ammonia = [Gas("nh3", molecule("NH3"), 1.0), Gas("h2", molecule("H2"), -1.5)]
    for model, one, slab, terms, text in (
        (total(), adslab, None, [], "needs the gas reference"),
        (
            total(),
            adslab,
            None,
            [gas],
            r"gas reference \(N2\) is not what a has above its slab \(N1",
        ),
        (total(), ("u", untagged), None, [gas], "does not say by tags"),
        (total(), adslab, larger[:-1], [gas], "differ in cell"),
        (total(), adslab, oxygen, [gas], "has atoms that a"),
        (total(), ("o", oxygen), None, [gas], "no reference energy for O"),
        (total(), adslab, None, ammonia, "no reference energy for H"),
        (without, adslab, None, [gas], "predicts adsorption energies .*leave out --slab and --gas"),
    ):
        with pytest.raises(UserError, match=text):
            adsorption(model, [one], slab, terms, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()
    (alone,) = adsorption(without, [adslab], None, [], tmp_path / "out", OPTIONS)
    assert alone.adsorption == pytest.approx(relaxed_energy(adslab[1]), abs=1e-8)
    assert alone.slab is None


def test_adsorption_command_knows_both_kinds(tmp_path, capsys):
    ase.io.write(tmp_path / "a.traj", copper_slab())
    ase.io.write(tmp_path / "n2.xyz", molecule("N2"))
    gas = f"--gas={tmp_path / 'n2.xyz'}*0.5"

    def run(references, *arguments):
        name = f"{references}.pt"
        path = save_small(tmp_path / name, conservative=False, references=references)
        given = ["adsorption", str(path), str(tmp_path / "a.traj"), "--device=cpu", "--steps=1"]
        code = main([*given, f"--out={tmp_path / str(references)}", *arguments])
        return code, capsys.readouterr()

    code, printed = run(True, gas)
    assert code == 0
    row = printed.out.splitlines()[2].split()
    adsorbed, adslab, slab, of_gas = map(float, row[1:5])
    assert adsorbed == pytest.approx(adslab - slab - of_gas, abs=2e-4)
    assert "+0.5 E(n2)" in printed.out
    code, printed = run(False, gas)
    assert code == 2
    assert "predicts adsorption energies" in printed.err
    code, printed = run(False)
    assert code == 0
    assert "E_ads = E(adslab): the model predicts" in printed.out


def aluminium_ends():
    """Gold on Al(100), from hollow to hollow: the example of ASE's documentation of NEB."""
    ends = []
    for site in ((0.5, 0.5), (1.5, 0.5)):
        slab = fcc100("Al", (2, 2, 3), vacuum=8.0)
        slab.pbc = (True, True, False)
        add_adsorbate(slab, "Au", 1.7, (site[0] * 2.8638, site[1] * 2.8638))
        slab.set_constraint(FixAtoms(mask=slab.get_tags() > 1))
        slab.calc = EMT()
        LBFGS(slab, logfile=None).run(fmax=0.05)
        slab.calc = None
        ends.append(slab)
    return ends


def test_barrier_is_that_of_ase(tmp_path, monkeypatch):
    """All images in one call a step; stopped, and gone on with, it has the same barrier."""
    ends = aluminium_ends()
    options = NEBOptions(images=3, climb=True)
    barrier = run_neb(emt(), *ends, tmp_path / "whole", options)

    images = [ends[0].copy() for _ in range(4)] + [ends[1].copy()]
    for image in images:
        image.calc = EMT()
    band = NEB(images, climb=True, k=0.1, method="improvedtangent")
    band.interpolate("idpp")
    FIRE(band, logfile=None).run(fmax=0.05, steps=500)
    energies = [image.get_potential_energy() for image in images]
    assert barrier.converged
    assert barrier.forward == pytest.approx(max(energies) - energies[0], abs=2e-3)
    # as ASE's documentation finds: 0.35 to 0.4 eV
    assert 0.3 < barrier.forward < 0.42
    assert barrier.reaction == pytest.approx(0, abs=0.01)
    rows = np.genfromtxt(tmp_path / "whole" / "neb.csv", delimiter=",", names=True)
    assert rows["relative_eV"].max() == pytest.approx(barrier.forward)
    assert (tmp_path / "whole" / "neb.png").stat().st_size > 5000
    fixed = ends[0].constraints[0].index
    for image in ase.io.read(tmp_path / "whole" / "band.traj", ":"):
        np.testing.assert_array_equal(image.positions[fixed], ends[0].positions[fixed])

    begun = run_neb(emt(), *ends, tmp_path / "parts", NEBOptions(images=3, climb=True, steps=4))
    assert (begun.steps, begun.converged) == (4, False)
    rest = run_neb(emt(), *ends, tmp_path / "parts", options)
    assert rest.converged
    assert rest.steps > 4
    assert rest.forward == pytest.approx(barrier.forward, abs=5e-3)


def test_images_are_evaluated_together():
    """One call for the band, none again where nothing has moved."""
    calls = []

    def evaluate(structures):
        calls.append(len(structures))
        return [{"energy": 0.0, "forces": np.zeros((13, 3))} for _ in structures]

    images = [copper_slab(seed) for seed in range(5)]
    band = BatchedNEB(images, evaluate)
    band.get_forces()
    band.get_forces()
    band.set_positions(band.get_positions() + 0.01)
    band.get_forces()
    assert calls == [5, 3]


def test_neb_refuses_and_runs_with_a_model(tmp_path, capsys):
    path = save_small(tmp_path / "model.pt", conservative=True)
    first, last = copper_slab(0), copper_slab(0)
    last.positions[-1] += [0.8, 0.3, 0.1]
    other = last.copy()
    other.symbols[-1] = "O"
    for name, atoms in (("first", first), ("last", last), ("other", other)):
        ase.io.write(tmp_path / f"{name}.traj", atoms)

    def run(end):
        given = ["neb", str(path), *(str(tmp_path / f"{e}.traj") for e in ("first", end))]
        return main([*given, "--device=cpu", "--images=2", "--steps=1", f"--out={tmp_path / 'o'}"])

    assert run("other") == 2
    assert "same atoms in the same order" in capsys.readouterr().err
    assert run("first") == 2
    assert "the same structure" in capsys.readouterr().err
    assert run("last") == 0
    assert "1 steps; not converged" in capsys.readouterr().out


def test_first_band_does_not_depend_on_where_the_cell_begins():
    """Past an atom in the middle of the cell, and past the same atom at its corner."""

    def closest(corner):
        ends = []
        for x in (2.0, 6.0):
            end = Atoms("AlAu", [(4, 4, 4), (x, 4.3, 4)], cell=(8, 8, 8), pbc=True)
            end.positions -= corner
            end.wrap(eps=0)
            ends.append(end)
        images, _ = _start(Path("absent"), *ends, NEBOptions(images=3))
        return [image.get_distance(0, 1, mic=True) for image in images]

    found = closest(0.0)
    assert min(found) > 1.5  # a straight line comes as near as 0.3 A
    np.testing.assert_allclose(closest(4.0), found, atol=1e-3)
