"""What the rows of ``escaip bench gpu`` come to, in words that others use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from escaip_fairchem.bench.report import Row

#: Structures of OC20's 2M split, and atoms of one on average.
STRUCTURES, ATOMS = 2_000_000, 73


def headlines(rows: Sequence[Row], md_atoms: int) -> list[str]:
    """Lines for the fastest of ours of each kind; nothing of what was not measured.

    Args:
        rows: Of all measurements.
        md_atoms: About how many atoms the dynamics to report has.
    """
    lines = []
    for kind in ("direct", "conservative"):
        forward = {size: _fastest(rows, "forward", size, kind) for size in ("H256 L4", "H512 L10")}
        if row := forward["H256 L4"]:
            lines.append(f"{1e3 * row.atoms / row.min:,.0f} atoms per second, {_of(row)}")
        if row := forward["H512 L10"]:
            lines.append(f"{1e3 * row.min / row.atoms:.3g} microseconds per atom, {_of(row)}")
        for size in forward:
            if row := _fastest(rows, "train", size, kind):
                hours = STRUCTURES * ATOMS * row.min / row.atoms / 3.6e6
                lines.append(
                    f"{hours:.3g} hours per epoch of OC20-2M ({ATOMS} atoms each), {_of(row)}"
                )
            if row := _fastest(rows, "md step", size, kind, md_atoms):
                lines.append(
                    f"{1e3 / row.min:.3g} MD steps per second, {row.atoms} atoms, {_of(row)}"
                )
    return lines


def _fastest(
    rows: Sequence[Row], quantity: str, size: str, kind: str, atoms: int | None = None
) -> Row | None:
    """The row of ours with the least time per atom, of about `atoms` atoms if given."""
    found = [
        row
        for row in rows
        if row.model.startswith("ours")
        and row.quantity == quantity
        and f" {size} " in f"{row.common['config']} "
        and row.common["kind"] == kind
        and (atoms is None or 0.8 * atoms < row.atoms < 1.25 * atoms)
    ]
    return min(found, key=lambda row: row.min / row.atoms, default=None)


def _of(row: Row) -> str:
    return f"{row.common['config']}, {row.common['kind']}, {row.common['precision']}"
