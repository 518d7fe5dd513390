"""Barriers by ASE's nudged elastic band, with all images in one batch; see `run_neb`."""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import ase.io
import ase.optimize
import matplotlib as mpl
import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator
from ase.geometry import find_mic
from ase.mep import NEB
from ase.utils.forcecurve import fit_images

from escaip_fairchem.display import open_display
from escaip_fairchem.errors import UserError
from escaip_fairchem.files import save_figure, write_csv
from escaip_fairchem.simulate.folder import claimed, write_frames, write_json
from escaip_fairchem.simulate.relax import RelaxOptions, relax_structures
from escaip_fairchem.simulate.relaxation import evaluator
from escaip_fairchem.simulate.structures import fingerprint

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ase import Atoms

    from escaip_fairchem.simulate.model import Model
    from escaip_fairchem.simulate.relaxation import Evaluate

BAND_NAME = "band.traj"
SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class NEBOptions:
    """What kind of a band.

    Attributes:
        images: Between the ends.
        fmax: Largest force of a relaxed band, eV/A.
        steps: Most steps.
        optimizer: ``FIRE``, ``BFGS`` or ``LBFGS``, of ASE.
        k: Spring constant, eV/A^2.
        climb: The highest image climbs to the saddle point.
        relax_ends: Relax the ends before.
    """

    images: int = 5
    fmax: float = 0.05
    steps: int = 500
    optimizer: str = "FIRE"
    k: float = 0.1
    climb: bool = False
    relax_ends: bool = False


@dataclass(frozen=True)
class Barrier:
    """What a band says.

    Attributes:
        forward: Highest image above the first, eV.
        backward: The same above the last, eV.
        reaction: Last above the first, eV.
        fmax: Largest force on the band, eV/A.
        steps: Done.
        converged: Whether that force is small enough.
    """

    forward: float
    backward: float
    reaction: float
    fmax: float
    steps: int
    converged: bool


class BatchedNEB(NEB):
    """ASE's band, whose images are evaluated in one call.

    Args:
        images: The band with its ends.
        evaluate: From structures to the results of each.
        **options: Of ASE's.
    """

    def __init__(self, images: list[Atoms], evaluate: Evaluate, **options: object) -> None:
        super().__init__(images, method="improvedtangent", **options)
        self._evaluate = evaluate
        self._hold(images)

    def get_forces(self) -> np.ndarray:
        """Of the band, for the optimizer, ((n - 2) N, 3)."""
        inner = self.images[1:-1]
        if any(image.calc.check_state(image) for image in inner):
            self._hold(inner)
        return super().get_forces()

    def _hold(self, images: Sequence[Atoms]) -> None:
        """Give each image its results."""
        for atoms, results in zip(images, self._evaluate(images), strict=True):
            held = {name: results[name] for name in ("energy", "forces")}
            if not all(np.isfinite(value).all() for value in held.values()):
                raise UserError("energy or forces of an image are not finite; try more images")
            atoms.calc = SinglePointCalculator(atoms, **held)


def run_neb(model: Model, initial: Atoms, final: Atoms, out: Path, options: NEBOptions) -> Barrier:
    """Relax a band from an interpolation by IDPP, or go on with it.

    Into the folder: ``band.traj``, ``neb.csv``, ``neb.json`` and ``neb.png``. After a stop the
    band goes on from where it was saved last, its optimizer without memory.

    Args:
        model: What evaluates the images.
        initial: First end; its constraints are those of the images.
        final: Last end, atoms in the same order.
        out: Folder of the results.
        options: What kind of a band.

    Returns:
        Barrier and reaction energy.

    Raises:
        UserError: Ends that do not belong together, or the folder of another simulation.
    """
    _refuse(initial, final, options)
    settings = {
        **model.settings,
        **asdict(options),
        "ends_sha256": fingerprint([initial, final]),
    }
    del settings["steps"]  # more of them go on
    with claimed(out, settings):
        model.warn_if_direct("energies along the path need not fit its forces")
        if options.relax_ends:
            relaxing = RelaxOptions(fmax=options.fmax, steps=options.steps)
            ends = [("initial", initial), ("final", final)]
            _, (initial, final) = relax_structures(model, ends, out / "ends", relaxing)
        images, done = _start(out, initial, final, options)
        band = BatchedNEB(images, evaluator(model.calculator), k=options.k, climb=options.climb)
        barrier = _relax(band, out, done, options)
        write_csv(out / "neb.csv", _rows(images))
        write_json(out / "neb.json", asdict(barrier))
        plot(images, out / "neb.png")
    return barrier


def _start(out: Path, initial: Atoms, final: Atoms, options: NEBOptions) -> tuple[list[Atoms], int]:
    """The saved band and its steps, or a new one."""
    if (out / BAND_NAME).is_file():
        images = ase.io.read(out / BAND_NAME, ":")
        return images, int(images[0].info["steps"])
    last = final.copy()
    # the nearest images of the atoms, so that none crosses the cell
    last.positions = (
        initial.positions
        + find_mic(final.positions - initial.positions, initial.cell, initial.pbc)[0]
    )
    images = [initial.copy() for _ in range(options.images + 1)] + [last]
    for image in images:
        image.calc = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = NEB(images, method="improvedtangent")
        # distances between nearest images: atoms meet across the sides of the cell, too
        path.interpolate("idpp", mic=bool(initial.pbc.any()), apply_constraint=False)
    return images, 0


def _relax(band: BatchedNEB, out: Path, done: int, options: NEBOptions) -> Barrier:
    optimizer = getattr(ase.optimize, options.optimizer)(band, logfile=None)
    display = open_display("neb", options.steps, done)
    first, start = done, time.monotonic()
    saved = start
    while True:
        fmax = float(np.linalg.norm(band.get_forces(), axis=1).max())
        if fmax <= options.fmax or done >= options.steps:
            break
        if time.monotonic() - saved >= SAVE_SECONDS:
            _save(band, out, done)
            saved = time.monotonic()
        optimizer.step()
        optimizer.nsteps += 1
        done += 1
        if display.due():
            rate = (done - first) / (time.monotonic() - start)
            display.show(done, f"{rate:.3g} steps/s, largest force {fmax:.3g} eV/A")
    _save(band, out, done)
    display.close()
    energies = [image.get_potential_energy() for image in band.images]
    return Barrier(
        forward=max(energies) - energies[0],
        backward=max(energies) - energies[-1],
        reaction=energies[-1] - energies[0],
        fmax=fmax,
        steps=done,
        converged=fmax <= options.fmax,
    )


def _save(band: BatchedNEB, out: Path, done: int) -> None:
    band.images[0].info["steps"] = done
    write_frames(out / BAND_NAME, band.images)


def _rows(images: Sequence[Atoms]) -> list[dict]:
    """A row an image: length of the path to it, energy, largest force on a free atom."""
    length, rows = 0.0, []
    for index, image in enumerate(images):
        if index:
            moved = image.positions - images[index - 1].positions
            length += float(np.linalg.norm(find_mic(moved, image.cell, image.pbc)[0]))
        energy = image.get_potential_energy()
        rows.append(
            {
                "image": index,
                "path_A": length,
                "energy_eV": energy,
                "relative_eV": energy - images[0].get_potential_energy(),
                "fmax_eV_per_A": float(np.linalg.norm(image.get_forces(), axis=1).max()),
            }
        )
    return rows


def plot(images: Sequence[Atoms], path: Path) -> None:
    """Draw energies along the path, with the slopes that forces say.

    Args:
        images: Of a band, evaluated.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 10}):
        figure = Figure(figsize=(5, 3.5), layout="constrained")
        axes = figure.subplots()
        fit = fit_images(list(images))
        axes.plot(fit.fit_path, fit.fit_energies, color="tab:blue", label="by energies and forces")
        axes.plot(fit.path, fit.energies, "o", color="black", label="images")
        axes.set_xlabel("path, A")
        axes.set_ylabel("energy above the first image, eV")
        axes.legend()
        save_figure(figure, path)


def table(out: Path, barrier: Barrier) -> str:
    """The images as lines, and the barriers.

    Args:
        out: Folder of the results.
        barrier: What `run_neb` returned.
    """
    lines = [line.replace(",", "  ") for line in (out / "neb.csv").read_text().splitlines()]
    rows = [line.split() for line in lines]
    shown = [f"{rows[0][0]:>6}" + "".join(f"{name:>15}" for name in rows[0][1:])]
    shown += [f"{row[0]:>6}" + "".join(f"{float(x):>15.4f}" for x in row[1:]) for row in rows[1:]]
    end = "" if barrier.converged else f"; not converged, fmax {barrier.fmax:.3g} eV/A"
    shown.append(
        f"barrier {barrier.forward:.4f} eV, back {barrier.backward:.4f} eV, "
        f"reaction {barrier.reaction:+.4f} eV, {barrier.steps} steps{end}"
    )
    return "\n".join(shown)


def _refuse(initial: Atoms, final: Atoms, options: NEBOptions) -> None:
    if options.images < 1 or options.fmax <= 0 or options.steps < 0 or options.k <= 0:
        raise UserError("--images, --fmax and --k must be positive, --steps not negative")
    if initial.get_chemical_symbols() != final.get_chemical_symbols():
        raise UserError(
            f"the ends differ: {initial.get_chemical_formula()} and "
            f"{final.get_chemical_formula()}, or their atoms are in another order; "
            "give the same atoms in the same order"
        )
    if abs(initial.cell.array - final.cell.array).max() > 1e-6 or (initial.pbc != final.pbc).any():
        raise UserError("the ends differ in cell or pbc; a band needs the same for both")
    moved = find_mic(final.positions - initial.positions, initial.cell, initial.pbc)[1]
    if moved.max() < 1e-3:
        raise UserError("the ends are the same structure; there is no path between them")
