"""Variants of equal size beside each other, from a sweep: what do parameters do where?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.tables import claims, writing
from escaip_fairchem.tables.points import (
    METRICS,
    count_points,
    finished_points,
    require_equal,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_COUNTS = ("parameters", "attention", "messages", "feed_forward", "edge_attributes", "readouts",
           "heads")  # fmt: skip


def rows_of(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each variant: its parameters, and mean and spread of its errors over seeds.

    Args:
        points: As `finished_points` gives them.
    """
    rows = []
    for name in dict.fromkeys(point["variant"] for point in points):
        of_variant = [point for point in points if point["variant"] == name]
        row = {"variant": name, "seeds": len(of_variant)}
        row |= {key: of_variant[0][key] for key in _COUNTS}
        row["attention_percent"] = 100 * row["attention"] / row["parameters"]
        for metric in METRICS:
            values = [p[metric] for p in of_variant if p[metric] is not None]
            row[metric] = float(np.mean(values)) if values else None
            # of one run nothing is known about the spread
            row[f"{metric}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        rows.append(row)
    return rows


def run(folder: Path, out: Path, *, within: float = 2.0) -> list[dict[str, Any]]:
    """Read a sweep, check that variants are equally large, write the table and the figure.

    Args:
        folder: Of the sweep.
        out: The table.
        within: Allowed difference of the numbers of parameters, in percent.

    Returns:
        The rows.

    Raises:
        UserError: No finished point, or a variant is larger or smaller.
    """
    writing.require_writable(out)
    points = finished_points(folder)
    off = require_equal(points, within)
    rows = rows_of(points)
    writing.write_rows(rows, out)
    shown = ("variant", "parameters", "attention_percent", "seeds", METRICS[0], f"{METRICS[0]}_sd",
             METRICS[1], f"{METRICS[1]}_sd", METRICS[2])  # fmt: skip
    print(writing.text_table(sorted(rows, key=lambda row: row[METRICS[0]]), shown))
    print(f"parameters are equal within {off:.2g} %")
    if min(row["seeds"] for row in rows) < 2:
        print("one seed of a variant says nothing about the spread; take `seed: [0, 1, 2]`")
    print(claims.ATTENTION, f"written: {out}, {draw(points, rows, out)}", sep="\n")
    return rows


def count(
    recipe: Path, sweep_file: Path, overrides: Sequence[str], *, within: float | None
) -> list[dict[str, Any]]:
    """Print the parameters of the variants of a sweep file, before anything is trained.

    Args:
        recipe: A recipe of fairchem's command.
        sweep_file: The sweep file.
        overrides: For all points.
        within: Allowed difference, in percent; None allows any.

    Returns:
        The rows.

    Raises:
        UserError: A mistake in a point, or a variant is larger or smaller.
    """
    rows = count_points(recipe, sweep_file, overrides)
    for row in rows:
        row["attention_percent"] = 100 * row["attention"] / row["parameters"]
    print(writing.text_table(rows, ("variant", *_COUNTS, "attention_percent")))
    if within is not None:
        print(f"parameters are equal within {require_equal(rows, within):.2g} %")
    return rows


def draw(points: Sequence[dict[str, Any]], rows: list[dict[str, Any]], out: Path) -> Path:
    """Errors of each variant, each seed a point, and against the share of attention."""
    made, (left, right) = writing.figure(2)
    order = sorted(rows, key=lambda row: row[METRICS[0]], reverse=True)
    places = {row["variant"]: place for place, row in enumerate(order)}
    for point in points:
        if point[METRICS[0]] is None:
            continue
        left.plot(point[METRICS[0]], places[point["variant"]], "o", color="C0", alpha=0.6)
        share = 100 * point["attention"] / point["parameters"]
        right.plot(share, point[METRICS[0]], "o", color="C0", alpha=0.6)
    left.set_yticks(list(places.values()), list(places), fontsize=6)
    left.set(xlabel="force MAE, eV/A")
    right.set(xlabel="parameters in the attention, %", ylabel="force MAE, eV/A")
    return writing.finish(made, out, claims.ATTENTION)
