"""Relaxation and dynamics against ASE alone, and stopped at any moment."""

from __future__ import annotations

import os
import signal
import time
from itertools import count

import ase.io
import numpy as np
import pytest
from ase import units
from ase.build import bulk, molecule
from ase.calculators.calculator import all_changes
from ase.calculators.emt import EMT
from ase.filters import FrechetCellFilter
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS, FIRE, LBFGS
from fairchem.core import FAIRChemCalculator
from fairchem.core.units.mlip_unit import InferenceSettings, load_predict_unit

from escaip_fairchem import UserError, calculator
from escaip_fairchem.cli import main
from escaip_fairchem.simulate.md import MDOptions, run_md, steps_of
from escaip_fairchem.simulate.md_files import COLUMNS, drift
from escaip_fairchem.simulate.model import Model
from escaip_fairchem.simulate.relax import RelaxOptions, relax_structures
from escaip_fairchem.simulate.relaxation import OPTIMIZERS
from escaip_fairchem.simulate.structures import read_structures
from helpers import gas, one_thread, slab, triclinic
from simulate_helpers import copper, copper_slab, emt, save_small

CLASSES = {"LBFGS": LBFGS, "BFGS": BFGS, "FIRE": FIRE}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "conservative": save_small(folder / "conservative.pt", conservative=True),
        "direct": save_small(folder / "direct.pt", conservative=False),
        "adsorption": save_small(folder / "a.pt", conservative=False, references=False),
    }


class Stop(Exception):
    """In place of a kill."""


class Stopping(EMT):
    """EMT that stops at an evaluation; it begins anew each time, so no past shows in the sums."""

    stop_at = None

    def calculate(self, atoms, properties, _changes):
        self.evaluations = getattr(self, "evaluations", -1) + 1
        if self.evaluations == self.stop_at:
            raise Stop
        super().calculate(atoms, properties, all_changes)


def stopping(stop_at=None) -> Model:
    calc = Stopping()
    calc.stop_at = stop_at
    return Model(calc, "EMT", settings={"checkpoint": "EMT"})


# the calculator


def test_many_at_once_are_as_one_by_one(checkpoints):
    own = calculator(checkpoints["conservative"], device="cpu")
    unit = load_predict_unit(
        checkpoints["conservative"],
        device="cpu",
        inference_settings=InferenceSettings(compile=False),
    )
    theirs = FAIRChemCalculator(unit, task_name="oc20")
    structures = [slab(), triclinic(), gas()]
    for atoms, found in zip(structures, own.calculate_many(structures), strict=True):
        atoms.calc = theirs
        assert found["energy"] == pytest.approx(atoms.get_potential_energy(), rel=1e-5)
        forces = atoms.get_forces()
        np.testing.assert_allclose(found["forces"], forces, atol=2e-4 * abs(forces).max())
        if atoms.pbc.all():
            np.testing.assert_allclose(found["stress"], atoms.get_stress(), atol=1e-4)
        else:
            assert np.isnan(found["stress"]).all()


def test_options_of_the_calculator(checkpoints):
    """Net force, dispersion (by a call of the library itself), another search."""
    from dftd3.ase import DFTD3

    path = checkpoints["conservative"]
    plain = calculator(path, device="cpu")
    dispersed = calculator(path, device="cpu", d3="pbe", neighbor_search="vesin")
    for atoms in (triclinic(), gas()):
        (without,), (with_d3,) = plain.calculate_many([atoms]), dispersed.calculate_many([atoms])
        alone = atoms.copy()
        alone.calc = DFTD3(method="PBE", damping="d3bj")
        energy, forces = alone.get_potential_energy(), alone.get_forces()
        assert with_d3["energy"] - without["energy"] == pytest.approx(energy, abs=2e-4)
        np.testing.assert_allclose(with_d3["forces"] - without["forces"], forces, atol=5e-3)
        assert abs(energy) > 0.01
        if atoms.pbc.all():
            stress = with_d3["stress"] - without["stress"]
            np.testing.assert_allclose(stress, alone.get_stress(), atol=2e-4)
        alone.calc = dispersed  # the way that ASE takes
        assert alone.get_potential_energy() == pytest.approx(with_d3["energy"], abs=1e-4)
    direct = calculator(checkpoints["direct"], device="cpu").calculate_many([gas()])[0]["forces"]
    balanced = calculator(checkpoints["direct"], device="cpu", remove_net_force=True)
    forces = balanced.calculate_many([gas()])[0]["forces"]
    assert abs(direct.sum(0)).max() > 0.1
    assert abs(forces.sum(0)).max() < 1e-4
    np.testing.assert_allclose(direct - forces, np.tile(direct.mean(0), (9, 1)), atol=1e-5)
    with pytest.raises(UserError, match="no parameters for 'nonsense'"):
        calculator(path, device="cpu", d3="nonsense")


# relaxation


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(name, marks=[pytest.mark.full] * (name != "LBFGS")) for name in OPTIMIZERS],
)
def test_relaxation_is_that_of_ase(tmp_path, optimizer):
    """Side by side, in little batches, as one by one in ASE; fixed atoms and tags stay."""
    options = RelaxOptions(fmax=0.03, steps=60, optimizer=optimizer, max_atoms=30)
    starts = [copper_slab(seed) for seed in range(4)]
    named = [(str(i), atoms) for i, atoms in enumerate(starts)]
    records, ends = relax_structures(emt(), named, tmp_path, options)
    for start, record, end in zip(starts, records, ends, strict=True):
        expected = start.copy()
        expected.calc = EMT()
        relaxing = CLASSES[optimizer](expected, logfile=None)
        relaxing.run(fmax=0.03, steps=60)
        assert record.steps == relaxing.nsteps
        np.testing.assert_allclose(end.positions, expected.positions, atol=1e-9)
        assert record.energy == pytest.approx(expected.get_potential_energy(), abs=1e-9)
        fixed = start.constraints[0].index
        np.testing.assert_array_equal(end.positions[fixed], start.positions[fixed])
        np.testing.assert_array_equal(end.get_tags(), start.get_tags())
        np.testing.assert_array_equal(end.constraints[0].index, fixed)
        force = np.linalg.norm(expected.get_forces(), axis=1).max()
        assert record.fmax == pytest.approx(force, abs=1e-9)
    assert all(record.converged for record in records)
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert len(lines) == 5


def test_cell_is_relaxed_as_in_ase(tmp_path):
    start = copper(1)
    options = RelaxOptions(fmax=0.01, steps=200, cell=True)
    (record,), (end,) = relax_structures(emt(), [("cu", start)], tmp_path, options)
    expected = start.copy()
    expected.calc = EMT()
    LBFGS(FrechetCellFilter(expected), logfile=None).run(fmax=0.01, steps=200)
    assert record.converged
    np.testing.assert_allclose(end.cell, expected.cell, atol=1e-8)
    # EMT's lattice constant of copper, 3.59 A, from ASE's own documentation of bulk tests
    assert end.get_volume() ** (1 / 3) == pytest.approx(3.59, abs=0.01)


def test_model_in_batches_relaxes_as_alone(tmp_path, checkpoints):
    """Forces of the model through ASE's optimizer, in float64, where rounding does not show."""
    model = Model.open(checkpoints["conservative"], device="cpu", float64=True)
    starts = [triclinic(), gas()]
    named = [(str(i), atoms) for i, atoms in enumerate(starts)]
    _, ends = relax_structures(model, named, tmp_path, RelaxOptions(steps=3))
    for start, end in zip(starts, ends, strict=True):
        start.calc = model.calculator
        LBFGS(start, logfile=None).run(fmax=0.05, steps=3)
        np.testing.assert_allclose(end.positions, start.positions, atol=1e-5)


def test_stopped_relaxations_go_on(tmp_path):
    """Stopped anywhere: what had ended is kept, what had not begins anew, the ends are the same."""
    options = RelaxOptions(fmax=0.03, max_atoms=30)
    named = [(str(seed), copper_slab(seed)) for seed in range(4)]
    whole, _ = relax_structures(stopping(), named, tmp_path / "whole", options)
    kept = set()
    for stop_at in (0, 30, 45):
        with pytest.raises(Stop):
            relax_structures(stopping(stop_at), named, tmp_path / "stopped", options)
        kept.add(len(list((tmp_path / "stopped" / "records").glob("*.json"))))
    again, _ = relax_structures(stopping(), named, tmp_path / "stopped", options)
    assert len(kept) > 1
    assert again == whole
    model = stopping(0)
    assert relax_structures(model, named, tmp_path / "stopped", options)[0] == whole
    with pytest.raises(UserError, match=r"another simulation \(fmax=0.03, now 0.5\)"):
        relax_structures(model, named, tmp_path / "stopped", RelaxOptions(fmax=0.5, max_atoms=30))


def test_more_steps_take_those_on_that_have_not_arrived(tmp_path):
    named = [("near", copper_slab(0)), ("far", copper_slab(1))]
    fmax = {"fmax": 0.03}
    few = relax_structures(stopping(), named, tmp_path, RelaxOptions(steps=3, **fmax))[0]
    assert [(r.steps, r.converged) for r in few] == [(3, False)] * 2
    records, ends = relax_structures(stopping(), named, tmp_path, RelaxOptions(steps=200, **fmax))
    assert all(record.converged for record in records)
    for index, (record, end) in enumerate(zip(records, ends, strict=True)):
        frames = ase.io.read(tmp_path / "trajectories" / f"{index:05d}.traj", ":")
        assert len(frames) == record.steps + 1 > 4
        end.calc = EMT()
        assert np.linalg.norm(end.get_forces(), axis=1).max() <= 0.03 + 1e-9
    nothing = stopping(0)  # raises at its first evaluation
    assert relax_structures(nothing, named, tmp_path, RelaxOptions(steps=5, **fmax))[0] == records


def test_saved_steps_are_not_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr("escaip_fairchem.simulate.relax.SAVE_SECONDS", 0.0)
    named = [("a", copper_slab())]
    with pytest.raises(Stop):
        relax_structures(stopping(6), named, tmp_path, RelaxOptions(fmax=0.02))
    (record,), (end,) = relax_structures(stopping(), named, tmp_path, RelaxOptions(fmax=0.02))
    frames = ase.io.read(tmp_path / "trajectories" / "00000.traj", ":")
    assert len(frames) == record.steps + 1
    np.testing.assert_array_equal(frames[0].positions, named[0][1].positions)
    moves = [np.abs(b.positions - a.positions).max() for a, b in zip(frames, frames[1:])]  # noqa: B905, RUF007
    assert min(moves) > 0
    end.calc = EMT()
    assert np.linalg.norm(end.get_forces(), axis=1).max() <= 0.02 + 1e-9


def test_one_bad_structure_does_not_stop_the_others(tmp_path, checkpoints, capsys):
    bad = molecule("H2O")
    bad.positions[1] = bad.positions[0]
    ase.io.write(tmp_path / "all.extxyz", [gas(), bad, triclinic()])
    arguments = ["relax", str(checkpoints["direct"]), str(tmp_path / "all.extxyz"), "--steps=2"]
    assert main([*arguments, "--device=cpu", f"--out={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert "0.0 of 3" not in printed
    assert "0 of 3 relaxed, 1 failed" in printed
    assert len(ase.io.read(tmp_path / "out" / "relaxed.traj", ":")) == 3
    steps = [line.split(",")[3] for line in (tmp_path / "out/table.csv").read_text().splitlines()]
    assert steps == ["steps", "2", "0", "2"]


def test_relaxation_refuses(tmp_path, checkpoints, capsys):
    ase.io.write(tmp_path / "gas.xyz", gas())
    for which, text in (("direct", "predicts none"), ("conservative", "not periodic")):
        arguments = [str(checkpoints[which]), str(tmp_path / "gas.xyz"), "--cell"]
        assert main(["relax", *arguments, "--device=cpu", f"--out={tmp_path / 'out'}"]) == 2
        error = capsys.readouterr().err
        assert text in error
    with pytest.raises(UserError, match="no structure at"):
        read_structures([tmp_path / "absent.xyz"])
    (tmp_path / "text.xyz").write_text("nothing of use\n")
    # readers of ASE raise StopIteration, RuntimeError, and return nothing
    (tmp_path / "empty.cif").write_text("data_x\n_cell 1\nloop_\n")
    (tmp_path / "POSCAR").write_text("garbage\nx y z\n")
    for name, text in (
        ("text.xyz", "cannot be read"),
        ("POSCAR", "cannot be read"),
        ("gas.xyz@x", "cannot be read"),
        ("empty.cif", "holds no structure"),
        ("empty.cif@0", "cannot be read"),
    ):
        with pytest.raises(UserError, match=text):
            read_structures([tmp_path / name])
    assert not (tmp_path / "out").exists()


# dynamics

ENSEMBLES = {
    "nve": {"ensemble": "nve", "temperature": 400},
    "langevin": {"ensemble": "nvt", "temperature": 400},
    "bussi": {"ensemble": "nvt", "temperature": 400, "thermostat": "bussi"},
    "npt": {"ensemble": "npt", "temperature": 400, "pressure": 1.0},
    "npt_full": {"ensemble": "npt", "temperature": 400, "barostat": "full"},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.full] * (n in ("nve", "npt"))) for n in ENSEMBLES],
)
def test_stopped_dynamics_go_on_bit_by_bit(tmp_path, name):
    """Stopped between states, so that files have more than they should; and run in two parts."""
    options = MDOptions(**ENSEMBLES[name], every=3, timestep=2.0)
    run_md(stopping(), copper(1), 40, tmp_path / "whole", options)
    for stop_at in (11, 17):
        with pytest.raises(Stop):
            run_md(
                stopping(stop_at), copper(1), 40, tmp_path / "parts", options, save_seconds=0.005
            )
    run_md(stopping(), copper(1), 29, tmp_path / "parts", options)
    line = run_md(stopping(), copper(1), 40, tmp_path / "parts", options)
    for file in ("trajectory.extxyz", "log.csv"):
        parts, whole = ((tmp_path / each / file).read_bytes() for each in ("parts", "whole"))
        assert parts == whole
    states = [dict(np.load(tmp_path / each / "state.npz")) for each in ("parts", "whole")]
    for key, value in states[0].items():
        if key not in ("plain",):
            np.testing.assert_array_equal(value, states[1][key], err_msg=key)
    frames = ase.io.read(tmp_path / "whole" / "trajectory.extxyz", ":")
    assert [frame.info["step"] for frame in frames] == list(range(0, 41, 3))
    rows = np.genfromtxt(tmp_path / "whole" / "log.csv", delimiter=",", names=True)
    assert rows["temperature_K"][0] == pytest.approx(400)
    if name == "langevin":
        assert "conserves nothing" in line
    else:
        assert np.ptp(rows["conserved_eV"]) < 0.02 * np.ptp(rows["kinetic_eV"]) + 1e-3


def test_nve_is_that_of_ase(tmp_path):
    """From given momenta, with fixed atoms."""
    start = copper_slab()
    start.set_momenta(np.random.default_rng(1).normal(size=(13, 3)))
    run_md(emt(), start, 20, tmp_path, MDOptions(every=20))
    expected = start.copy()
    expected.calc = EMT()
    VelocityVerlet(expected, 1.0 * units.fs).run(20)
    with np.load(tmp_path / "state.npz") as state:
        np.testing.assert_allclose(state["positions"], expected.positions, atol=1e-12)
        np.testing.assert_allclose(state["momenta"], expected.get_momenta(), atol=1e-12)
    fixed = start.constraints[0].index
    np.testing.assert_array_equal(expected.positions[fixed], start.positions[fixed])


def test_killed_command_goes_on_bit_by_bit(tmp_path, checkpoints):
    """`kill -9` of `escaip md` with a model; then the same command."""
    ase.io.write(tmp_path / "cu.traj", triclinic())
    arguments = ["md", str(checkpoints["direct"]), str(tmp_path / "cu.traj"), "--temperature=300"]
    arguments += ["--steps=30", "--every=2", "--device=cpu", "--timestep=0.2", "--save-seconds=0.1"]
    killed = [*arguments, f"--out={tmp_path / 'killed'}"]
    with one_thread():
        child = os.fork()
        if not child:
            main(killed)
            os._exit(0)
        log = tmp_path / "killed" / "log.csv"
        for _ in count():
            if log.exists() and log.read_text().count("\n") > 5:
                break
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert main(killed) == 0
        assert main([*arguments, f"--out={tmp_path / 'whole'}"]) == 0
    for file in ("trajectory.extxyz", "log.csv"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_dynamics_refuse_and_warn(tmp_path, checkpoints, capsys):
    crystal, free = tmp_path / "crystal.traj", tmp_path / "free.traj"
    ase.io.write(crystal, triclinic())
    ase.io.write(free, gas())

    def run(which, structure, *arguments) -> tuple[int, str]:
        given = ["md", str(checkpoints[which]), str(structure), "--device=cpu", *arguments]
        code = main([*given, f"--out={tmp_path / 'out'}"])
        return code, capsys.readouterr().err

    hot = "--temperature=300"
    for which, structure, arguments, text in (
        ("direct", crystal, ("--ensemble=npt", hot, "--steps=1"), "npt needs stress, and"),
        ("conservative", free, ("--ensemble=npt", hot, "--steps=1"), "periodic along all axes"),
        ("direct", free, ("--ensemble=nvt", "--steps=1"), "nvt needs --temperature"),
        ("direct", free, ("--ensemble=nve", "--steps=1"), "no momenta"),
        ("direct", free, (hot,), "--steps or --ps"),
    ):
        code, error = run(which, structure, *arguments)
        assert code == 2
        assert text in error
        assert not (tmp_path / "out" / "settings.json").exists()
    code, error = run("direct", free, "--ensemble=nve", hot, "--steps=1", "--timestep=0.1")
    assert code == 0
    (line,) = [line for line in error.splitlines() if "escaip: warning" in line]
    assert "direct forces" in line
    assert steps_of(None, 1.5, 0.5) == 3000
    with pytest.raises(UserError, match="--timestep is 0"):
        steps_of(None, 1.5, 0.0)


@pytest.mark.parametrize(
    ("structure", "internal", "settings"),
    [
        (molecule("H2O"), 3, {"ensemble": "nvt", "thermostat": "bussi", "timestep": 0.5}),
        pytest.param(
            bulk("Cu", cubic=True),
            9,
            {"ensemble": "npt", "timestep": 4.0, "barostat_time": 300.0},
            marks=pytest.mark.full,
        ),
    ],
    ids=["bussi", "npt"],
)
def test_temperature_is_that_of_inner_motion(tmp_path, structure, internal, settings):
    """A molecule that nothing turns and moves has 3N - 6, a crystal 3N - 3 degrees of freedom.

    Were all 3N counted, the water would have 900 K, and the crystal 400 K.
    """
    options = MDOptions(temperature=300, thermostat_time=10, every=1, **settings)
    run_md(emt(), structure, 1000, tmp_path, options)
    rows = np.genfromtxt(tmp_path / "log.csv", delimiter=",", names=True)
    found = 2 * rows["kinetic_eV"] / (internal * units.kB)
    np.testing.assert_allclose(rows["temperature_K"], found, rtol=1e-9)
    assert found[0] == pytest.approx(300)
    assert found[200:].mean() == pytest.approx(300, rel=0.12 if internal == 9 else 0.5)
    frames = ase.io.read(tmp_path / "trajectory.extxyz", "-1")
    assert abs(frames.get_momenta().sum(0)).max() < 1e-6


def test_files_that_are_shorter_than_they_were_are_refused(tmp_path):
    options = MDOptions("nve", 300, every=1)
    run_md(emt(), copper(), 3, tmp_path, options)
    (tmp_path / "log.csv").unlink()
    with pytest.raises(UserError, match=r"log\.csv has lost what it had"):
        run_md(emt(), copper(), 5, tmp_path, options)


def test_drift_is_a_slope(tmp_path):
    times = np.linspace(0, 2, 11)
    wave = 0.5 * (-1.0) ** np.arange(11)
    energies = (3 * times + wave) / 1000 * 4
    rows = [",".join(COLUMNS)]
    rows += [
        f"0,{t!r},0,0,0,{e!r},0,," for t, e in zip(times.tolist(), energies.tolist(), strict=True)
    ]
    (tmp_path / "log.csv").write_text("\n".join(rows) + "\n")
    slope = np.polyfit(times, 3 * times + wave, 1)[0]
    assert drift(tmp_path, 4, MDOptions()).startswith(
        f"energy drift: {slope:.3g} meV/atom/ps over 2"
    )


def test_pressure_has_its_sign_and_unit(tmp_path):
    """The log says ASE's pressure, and a larger one outside shrinks the cell."""
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.02, seed=1)
    options = MDOptions("npt", 50, 2.0, pressure=5.0, barostat_time=300.0, every=1)
    run_md(emt(), atoms, 40, tmp_path, options)
    rows = np.genfromtxt(tmp_path / "log.csv", delimiter=",", names=True)
    atoms.calc = EMT()
    kinetic = 2 * rows["kinetic_eV"][0] / (3 * atoms.get_volume())
    pressure = (-np.trace(atoms.get_stress(voigt=False)) / 3 + kinetic) / units.GPa
    assert rows["pressure_GPa"][0] == pytest.approx(pressure)
    assert pressure < 5.0
    assert (np.diff(rows["volume_A3"][1:5]) < 0).all()
