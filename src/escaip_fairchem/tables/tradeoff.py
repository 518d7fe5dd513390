"""Speed and memory of inference against errors: the question of the paper's Figure 1.

All models predict the same structures in one process, in turn, so that what else the machine does
falls on all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.bench.measure import Call, interleaved, peak_bytes
from escaip_fairchem.errors import UserError
from escaip_fairchem.predict.metrics import means, structure_sums
from escaip_fairchem.predict.runner import predict_batch
from escaip_fairchem.sweep.store import STATE_NAME, load_sweep
from escaip_fairchem.tables import claims, writing
from escaip_fairchem.tables.structures import (
    batch_of,
    draw_structures,
    free_atoms,
    load_unit,
    predict_with,
    short_names,
)
from escaip_fairchem.train.parity import Parity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ase import Atoms

    from escaip_fairchem.tables.structures import Predict

_ERRORS = {"force_mae": "force MAE, eV/A", "energy_per_atom_mae": "energy MAE, eV/atom"}


def expand_runs(paths: Sequence[str]) -> list[str]:
    """Runs of sweeps (and of `escaip bench accuracy`) in place of their folders."""
    found = []
    for path in paths:
        if (Path(path) / STATE_NAME).is_file():
            sweep = load_sweep(Path(path))
            found += [str(sweep.run(name)) for name in sweep.points]
        else:
            found.append(path)
    return found


def errors_of(predict: Predict, structures: Sequence[Atoms]) -> dict[str, float]:
    """Errors on labelled structures; forces of free atoms. Baseline: zero forces.

    Args:
        predict: Energies and forces of a list of structures.
        structures: With energies and forces.

    Raises:
        UserError: A structure has no label.
    """
    for atoms in structures:
        if atoms.calc is None or not {"energy", "forces"} <= atoms.calc.results.keys():
            raise UserError("a structure of --data has no energy and forces to compare with")
    energies, forces = predict(structures)
    labels = [atoms.calc.results for atoms in structures]
    free = [free_atoms(atoms) for atoms in structures]
    n, none = len(structures), np.zeros((0, 9))
    parity = Parity(
        n_atoms=np.array([len(atoms) for atoms in structures]),
        energy=np.array([float(label["energy"]) for label in labels]),
        energy_model=energies,
        energy_baseline=np.zeros(n),
        numbers=np.concatenate([atoms.numbers for atoms in structures]),
        free=np.concatenate(free),
        forces=np.concatenate([label["forces"][f] for label, f in zip(labels, free, strict=True)]),
        forces_model=np.concatenate([each[f] for each, f in zip(forces, free, strict=True)]),
        stress=none,
        stress_model=none,
    )
    found = means(structure_sums(parity, np.zeros(n, int), 1))
    return {
        "force_mae": found["forces_mae"][0],
        "force_cosine": found["forces_cosine_similarity"][0],
        "force_mae_of_zero": found["forces_mae"][1],
        "energy_mae": found["energy_mae"][0],
        "energy_per_atom_mae": found["energy_per_atom_mae"][0],
    }


def run(
    runs: Sequence[str],
    data: str,
    out: Path,
    *,
    number: int = 100,
    batch_size: int = 8,
    repeats: int = 5,
    threads: int = 1,
    seed: int = 0,
    device: str | None = None,
    task: str | None = None,
    published: bool = False,
) -> list[dict[str, Any]]:
    """Measure errors, speed and memory; write the table and the figure.

    Args:
        runs: Checkpoints, folders of runs, or of sweeps.
        data: Labelled structures.
        out: The table.
        number: Structures that errors are measured on.
        batch_size: Structures, the first of these, that speed and memory are measured on.
        repeats: Turns.
        threads: Of the CPU.
        seed: Of the structures.
        device: ``cpu`` or ``cuda``.
        task: Data set of the checkpoints, if they know several.
        published: Add published errors on OC20 2M, val-ID; of use for such data only.

    Returns:
        The rows.

    Raises:
        UserError: No data, no label, or no checkpoint that fairchem can load.
    """
    import torch

    from escaip_fairchem.train.evaluation import device_type

    writing.require_writable(out)
    given = {"number": number, "batch-size": batch_size, "repeats": repeats, "threads": threads}
    for option, value in given.items():
        if value < 1:
            raise UserError(f"--{option} is {value}; give a positive number")
    device = device or device_type()
    structures = draw_structures(data, number, seed)
    timed = structures[:batch_size]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = _measured(expand_runs(runs), structures, timed, repeats, device, task)
    finally:
        torch.set_num_threads(before)
    for row in rows:
        row["threads"] = threads
    if published:
        rows += [
            {"model": name, "source": claims.OC20_2M_SOURCE, "force_mae": force / 1000}
            for name, (force, _) in claims.OC20_2M.items()
        ]
    writing.write_rows(rows, out, device=device)
    shown = ("model", "parameters", "force_mae", "force_cosine", "force_mae_of_zero",
             "energy_per_atom_mae", "structures_per_s", "peak_MiB", "source")  # fmt: skip
    print(writing.text_table(rows, [c for c in shown if any(c in row for row in rows)]))
    print(claims.TRADEOFF, f"written: {out}, {draw(rows, out)}", sep="\n")
    return rows


def _measured(
    paths: Sequence[str],
    structures: Sequence[Atoms],
    timed: Sequence[Atoms],
    repeats: int,
    device: str,
    task: str | None,
) -> list[dict[str, Any]]:
    import torch

    rows, calls = {}, {}
    for path, name in zip(paths, short_names(paths), strict=True):
        try:
            unit, known = load_unit(path, task=task, device=device)
        except UserError:
            raise
        except Exception as error:  # whatever a foreign model's loading raises
            print(f"{name} is left out: fairchem cannot load it ({str(error).splitlines()[0]})")
            continue
        batch = batch_of(timed, known).to(device)
        rows[name] = {
            "model": name,
            "checkpoint": str(path),
            "parameters": sum(weight.numel() for weight in unit.model.parameters()),
            "structures": len(structures),
            **errors_of(predict_with(unit, known), structures),
            "batch": len(timed),
            "atoms": sum(map(len, timed)),
        }
        calls[name] = Call(batch.clone, lambda batch, unit=unit: predict_batch(unit, batch))
    if not rows:
        raise UserError("no checkpoint that fairchem can load; give some")
    for name, spread in interleaved(calls, repeats, torch.device(device)).items():
        call = calls[name]
        peak = peak_bytes(lambda call=call: call.run(call.prepare()), torch.device(device))
        rows[name] |= {
            "structures_per_s": len(timed) / spread.min,
            "seconds_min": spread.min,
            "seconds_median": spread.median,
            "seconds_max": spread.max,
            "repeats": spread.repeats,
            "peak_MiB": peak / 2**20,
        }
    return list(rows.values())


def draw(rows: list[dict[str, Any]], out: Path) -> Path:
    """Errors against speed, and against memory; published errors without a speed as lines."""
    made, panels = writing.figure(3)
    places = [("force_mae", "structures_per_s", "structures / s"),
              ("energy_per_atom_mae", "structures_per_s", "structures / s"),
              ("force_mae", "peak_MiB", "peak memory of a batch, MiB")]  # fmt: skip
    for axes, (error, against, label) in zip(panels, places, strict=True):
        for row in rows:
            if against in row:
                axes.plot(row[against], row[error], "o")
                axes.annotate(row["model"], (row[against], row[error]), fontsize=7,
                              xytext=(4, 4), textcoords="offset points")  # fmt: skip
            elif error in row:
                axes.axhline(row[error], color="gray", linewidth=0.5)
                axes.annotate(row["model"], (0.02, row[error]), fontsize=5, color="gray",
                              xycoords=axes.get_yaxis_transform())  # fmt: skip
        axes.set(xlabel=label, ylabel=_ERRORS[error], xscale="log", yscale="log")
    return writing.finish(made, out, claims.TRADEOFF)
