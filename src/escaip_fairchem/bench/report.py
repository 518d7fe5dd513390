"""Rows of results: a printed table, a CSV file that grows, and the figures."""

from __future__ import annotations

import csv
import dataclasses
import datetime as dt
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from escaip_fairchem.errors import UserError


@dataclass
class Row:
    """One measurement of one model.

    Attributes:
        model: ``built-in``, ``ours``, or the name of a peer.
        quantity: What was measured, e.g. ``forward`` or ``saved for backward``.
        unit: Of min, median and max: ``ms``, ``s``, ``MiB`` or ``steps/s``.
        systems: Structures of the batch.
        atoms: Atoms of the batch.
        ratio: Smallest value of the reference (the built-in, or EScAIP beside peers) over this
            one's: above 1, this one is better.
        error: Largest difference from the built-in (of preset ``paper``, from the authors' code) in
            float32, relative to the largest value.
        common: Columns that say what was run: config, kind, domain, precision, device, threads.
    """

    model: str
    quantity: str
    unit: str
    systems: int
    atoms: int
    min: float
    median: float
    max: float
    repeats: int
    ratio: float | None = None
    error: float | None = None
    common: dict[str, Any] = dataclasses.field(default_factory=dict)


_COMMON = ("config", "kind", "domain", "precision", "device", "threads")
_OWN = tuple(field.name for field in dataclasses.fields(Row) if field.name != "common")
COLUMNS = ("date", "hardware", "torch", "version", "commit", "command", *_COMMON, *_OWN)


class Report:
    """Prints rows as they come and appends them to a file.

    Args:
        command: Name of the subcommand, for a column.
        out: CSV file to append to, or None.

    Raises:
        UserError: `out` is a table with other columns, or its folder does not exist.
    """

    def __init__(self, command: str, out: Path | None) -> None:
        self.command, self.out = command, out
        self.rows: list[Row] = []
        self._environment: dict[str, str] | None = None
        if out is None:
            return
        if not out.parent.is_dir():
            raise UserError(f"--out: the folder {out.parent} does not exist")
        if out.exists() and out.read_text().splitlines()[:1] not in ([], [",".join(COLUMNS)]):
            raise UserError(f"--out: {out} has other columns; name another file")

    def add(self, row: Row) -> None:
        """Print a row and append it to the file."""
        if not self.rows:
            print(_line(("model", "quantity", "systems", "atoms", "min", "median", "max", "ratio")))
        self.rows.append(row)
        values = (f"{v:.4g}" for v in (row.min, row.median, row.max))
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}x"
        cells = (row.model, f"{row.quantity}, {row.unit}", row.systems, row.atoms, *values, ratio)
        print(_line(cells), flush=True)
        if self.out is not None:
            self._append(row)

    def _append(self, row: Row) -> None:
        if self._environment is None:
            self._environment = environment(str(row.common.get("device", "cpu")))
        values = {"command": self.command, **self._environment, **row.common}
        values |= {name: _rounded(getattr(row, name)) for name in _OWN}
        new = not self.out.exists() or not self.out.read_text()
        with self.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(values)


def environment(device: str) -> dict[str, str]:
    """Date, hardware, version of torch and of this package, and its commit if it has one."""
    import torch

    import escaip_fairchem

    hardware = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "date": dt.date.today().isoformat(),
        "hardware": hardware,
        "torch": torch.__version__,
        "version": escaip_fairchem.__version__,
        "commit": _commit(),
    }


def _commit() -> str:
    """Short commit of the checkout this package runs from; empty where it is installed."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        tracked = ["git", "-C", str(folder), "ls-files", "--error-unmatch", "__init__.py"]
        subprocess.run(tracked, capture_output=True, check=True)
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _rounded(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _line(cells: tuple[Any, ...]) -> str:
    widths = (20, 23, 7, 7, 9, 9, 9, 8)
    left = [str(c).ljust(w) for c, w in zip(cells[:2], widths[:2], strict=True)]
    return " ".join(left + [str(c).rjust(w) for c, w in zip(cells[2:], widths[2:], strict=True)])
