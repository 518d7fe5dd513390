"""Errors against the number of training structures and of parameters, from a sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.tables import claims, writing
from escaip_fairchem.tables.points import METRICS, finished_points
from escaip_fairchem.tables.powerlaw import fit

if TYPE_CHECKING:
    from pathlib import Path

    from escaip_fairchem.tables.powerlaw import Fit

#: What errors are fitted against -> what is the same along a curve.
AXES = {"structures": "parameters", "parameters": "structures"}
_ERRORS = METRICS[:2]
_LABELS = {"val_forces_mae": "force MAE, eV/A", "val_energy_mae": "energy MAE, eV"}


def fits_of(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], Fit]]:
    """Fits of each error along each axis, one for each value of the other axis.

    Args:
        rows: With ``structures``, ``parameters`` and the errors.

    Returns:
        Rows of a table, each with its fit.
    """
    found = []
    for metric in _ERRORS:
        for axis, other in AXES.items():
            for value in sorted({row[other] for row in rows}):
                curve = [row for row in rows if row[other] == value and row[metric] is not None]
                if not curve:
                    continue
                law = fit([row[axis] for row in curve], [row[metric] for row in curve])
                low, high = law.exponent_range or (None, None)
                found.append(
                    (
                        {
                            "error": metric, "against": axis, other: value, "points": len(curve),
                            "supported": law.supported, "offset": law.offset,
                            "factor": law.factor, "exponent": law.exponent,
                            "exponent_low": low, "exponent_high": high, "verdict": law.verdict,
                        },
                        law,
                    )
                )  # fmt: skip
    return found


def run(folder: Path, out: Path) -> list[dict[str, Any]]:
    """Read a sweep, fit, write the tables and the figure.

    Args:
        folder: Of the sweep.
        out: Table of the points; that of the fits gets ``_fits``.

    Returns:
        Rows of the fits.

    Raises:
        UserError: No finished point.
    """
    writing.require_writable(out)
    rows = finished_points(folder)
    found = fits_of(rows)
    fits = out.with_name(f"{out.stem}_fits.csv")
    writing.write_rows(rows, out)
    writing.write_rows([row for row, _ in found], fits)
    shown = ("variant", "parameters", "structures", "seed", "steps", *METRICS)
    print(writing.text_table(sorted(rows, key=lambda r: (r["parameters"], r["structures"])), shown))
    for row, law in found:
        other = AXES[row["against"]]
        print(f"{row['error']} against {row['against']}, {row[other]:,} {other}: {law.verdict}")
    print(claims.SCALING, f"written: {out}, {fits}, {draw(rows, found, out)}", sep="\n")
    return [row for row, _ in found]


def draw(rows: list[dict[str, Any]], fits: list[tuple[dict[str, Any], Fit]], out: Path) -> Path:
    """A panel for each error and axis; a line where the data support one."""
    made, panels = writing.figure(len(_ERRORS) * len(AXES), width=3.6)
    places = [(metric, axis) for metric in _ERRORS for axis in AXES]
    for axes, (metric, axis) in zip(panels, places, strict=True):
        chosen = [pair for pair in fits if (pair[0]["error"], pair[0]["against"]) == (metric, axis)]
        for number, (row, law) in enumerate(chosen):
            other = AXES[axis]
            curve = [r for r in rows if r[other] == row[other] and r[metric] is not None]
            sizes = np.array([r[axis] for r in curve], float)
            label = f"{row[other]:,} {other}"
            axes.plot(sizes, [r[metric] for r in curve], "o", color=f"C{number}", label=label)
            if law.supported:
                ends = np.geomspace(sizes.min(), sizes.max(), 50)
                axes.plot(ends, law(ends), color=f"C{number}")
        baseline = [r[f"baseline_{metric}"] for r in rows if f"baseline_{metric}" in r]
        if baseline:
            axes.axhline(np.mean(baseline), color="gray", linestyle=":", label="trivial model")
        axes.set(xscale="log", yscale="log", ylabel=_LABELS[metric])
        axes.set_xlabel("training structures" if axis == "structures" else axis)
        if chosen:
            axes.legend(fontsize="xx-small")
    return writing.finish(made, out, claims.SCALING)
