"""``escaip bench peers --peers escaip_v1``: preset ``paper`` beside the authors' own code.

Their code of NeurIPS 2024 runs in an environment of its own, in a process that takes turns with
this one. Agreement comes first: theirs makes the weights, ours loads them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from escaip_fairchem.bench import authors_worker, v1_names
from escaip_fairchem.bench.compare import OURS
from escaip_fairchem.bench.measure import (
    Spread,
    differences,
    precision,
    refuse_if_different,
    timed,
)
from escaip_fairchem.bench.others import (
    check_environment,
    does_not_run,
    does_not_start,
    peer_row,
    plain,
)
from escaip_fairchem.bench.pair import PERTURBATION, batch_of, outputs, own_model
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from ase import Atoms

    from escaip_fairchem.bench.report import Report
    from escaip_fairchem.bench.settings import Settings
    from escaip_fairchem.model import EScAIP

NAME = "escaip_v1"

#: Their configuration for OC20 2M, 83.3 M parameters, in their folder.
CONFIG = "configs/s2ef/2M/EScAIP_hydra/L10_H8_512_.yml"

#: Its size, in terms of `Settings`.
SIZE = {"hidden": 512, "layers": 10, "neighbors": 20}


def run(
    settings: Settings,
    report: Report,
    structures: list[Atoms],
    folder: Path | None,
    python: Path | None,
) -> None:
    """Compare energies and forces of both, then measure them in turn.

    Args:
        settings: Size, threads, repeats.
        report: Takes a row of each.
        structures: The batch; no two neighbours may be equally far where the nearest end.
        folder: The authors' repository at cea229e.
        python: Python of an environment with fairchem 1.

    Raises:
        UserError: The code is not there or does not run, or the models differ.
    """
    _check(settings, folder, python)
    batch = batch_of(structures)
    with tempfile.TemporaryDirectory() as scratch, precision("fp32", settings.torch_device):
        task = _task(settings, structures, folder)
        with _Worker(python, task, Path(scratch)) as worker, torch.no_grad():
            worker.turn()  # not measured, as the first of ours
            found = torch.load(worker.answer, weights_only=True)
            ours = paper_model(settings, found["weights"])
            theirs = {key: found[key] for key in ("energy", "forces")}
            errors = differences(theirs, outputs(ours, batch))
            refuse_if_different(errors)
            size = sum(tensor.numel() for tensor in found["weights"].values())
            print(f"both: {size / 1e6:.1f} M parameters; {NAME}: {found['versions']}")
            compared = ", ".join(f"{key} {e:.1e}" for key, e in errors.items())
            print(f"differences, of the largest value: {compared}")
            seconds: dict[str, list[float]] = {OURS: [], NAME: []}
            for _ in range(settings.repeats):
                seconds[NAME].append(worker.turn())
                seconds[OURS].append(timed(ours, batch.clone(), settings.torch_device))
    own, other = (Spread.of(seconds[name]) for name in (OURS, NAME))
    columns = settings.columns("paper")
    row = peer_row(OURS, own, columns, structures, None)
    report.add(dataclasses.replace(row, error=max(errors.values())))
    columns |= {"config": f"v1 H{settings.hidden} L{settings.layers} K{settings.neighbors}"}
    report.add(peer_row(NAME, other, columns, structures, 1e3 * own.min))


def paper_model(settings: Settings, weights: dict[str, torch.Tensor]) -> EScAIP:
    """Preset ``paper`` with their weights.

    Args:
        settings: Size; the domain decides about periodic images.
        weights: By the authors' names, see `v1_names`.

    Returns:
        The model, in eval mode.

    Raises:
        UserError: The weights are of another model.
    """
    keys = {
        "preset": "paper",
        "direct_forces": True,
        "hidden_size": settings.hidden,
        "num_layers": settings.layers,
        "num_heads": settings.hidden // 64,
        "max_neighbors": settings.neighbors,
        "use_pbc": settings.domain != "molecules",
    }
    with settings.chosen_kernels():
        model = own_model(keys | settings.own_keys())
    model.load_state_dict(v1_names.to_package(weights, model.state_dict(), settings.layers))
    return model.eval().requires_grad_(False)


def _check(settings: Settings, folder: Path | None, python: Path | None) -> None:
    check_environment([NAME], python, settings)
    if not settings.direct:
        raise UserError(f"{NAME} is compared with direct forces only; leave --kind away")
    if folder is None:
        raise UserError(f"{NAME}: give --authors, their code; see escaip bench peers --list")
    for file in ("src/EScAIP.py", CONFIG):
        if not (folder / file).is_file():
            raise UserError(f"--authors: no {file} in {folder}; see escaip bench peers --list")


def _task(settings: Settings, structures: list[Atoms], folder: Path) -> dict[str, Any]:
    structures = [atoms.copy() for atoms in structures]
    for atoms in structures:
        if not atoms.pbc.any():
            atoms.cell = [1e3] * 3  # their graph divides by its volume, then looks for no images
    return {
        "folder": str(folder.resolve()),
        "config": CONFIG,
        "changes": {
            "hidden_size": settings.hidden,
            "num_layers": settings.layers,
            "atten_num_heads": settings.hidden // 64,
            "max_neighbors": settings.neighbors,
            "energy_reduce": "sum",
            "atten_name": "math",  # the others do not run on CPUs
            "use_compile": False,
            "use_padding": False,  # which would only make it slower
        },
        "perturbation": PERTURBATION,
        "threads": settings.threads,
        "structures": [plain(atoms) for atoms in structures],
    }


class _Worker:
    """Their model in a process that waits for its turns.

    Args:
        python: Runs it.
        task: See `authors_worker`.
        scratch: Folder for its files.

    Attributes:
        answer: File that is written before the first turn ends.
    """

    def __init__(self, python: Path, task: dict[str, Any], scratch: Path) -> None:
        self._python, self._errors = python, scratch / "errors"
        self.answer, request = scratch / "answer.pt", scratch / "task.json"
        request.write_text(json.dumps(task))
        command = [str(python), authors_worker.__file__, str(request), str(self.answer)]
        pipe = subprocess.PIPE
        try:
            with self._errors.open("w") as errors:
                # a group of its own: what is named as Python may be a script that starts it
                self._process = subprocess.Popen(
                    command, stdin=pipe, stdout=pipe, stderr=errors, text=True, process_group=0
                )
        except OSError as error:
            raise does_not_start(python, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()

    def turn(self) -> float:
        """Seconds of energy and forces.

        Raises:
            UserError: It ended; the last line of its error.
        """
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            return float(self._process.stdout.readline())
        except (BrokenPipeError, ValueError):
            self._end()  # it may print something else, and wait
            raise does_not_run(NAME, self._python, self._errors.read_text()) from None
