"""Numbers of a split that a reviewer looks at before a submission is spent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from escaip_fairchem.submission.boards import Board
    from escaip_fairchem.submission.report import Report

# OC20 leaves out labels beyond 10 eV and 50 eV/A, so predictions far beyond are worth a look.
ADSORPTION_ENERGY = 20.0  # eV
LARGE_FORCE = 50.0  # eV/A
TOTAL_PER_ATOM = 0.5  # eV; a total energy of an oxide slab is some -7 eV per atom
LARGEST_STRUCTURE = 500  # atoms; OC20 and OC22 have fewer than 300
SAME_SYSTEM = 0.7  # of the spread of all energies
MIN_SYSTEMS = 10
HALF = np.float16


@dataclass
class SplitNumbers:
    """Numbers of a split.

    Attributes:
        structures: How many.
        rows: Of forces.
        energy: Mean, standard deviation, smallest and largest, eV.
        force: Mean and largest norm, eV/A.
        zero: Share of rows that are exactly zero.
        net: Median over structures of the norm of the sum of forces, eV/A.
        within: Spread of energies within systems over that of all; NaN with few systems.
    """

    structures: int
    rows: int
    energy: tuple[float, float, float, float]
    force: tuple[float, float]
    zero: float
    net: float
    within: float

    LABELS = (
        "structures", "force rows", "energy mean, eV", "energy std, eV", "energy min, eV",
        "energy max, eV", "mean |F|, eV/A", "max |F|, eV/A", "zero forces", "net force, eV/A",
        "spread in a system",
    )  # fmt: skip

    def texts(self) -> list[str]:
        """The numbers, in the order of ``LABELS``."""
        values = (*self.energy, *self.force)
        return [
            f"{self.structures:,}",
            f"{self.rows:,}",
            *(f"{value:.4g}" for value in values),
            f"{self.zero:.2%}",
            f"{self.net:.3g}",
            "" if np.isnan(self.within) else f"{self.within:.2f}",
        ]


def measure(
    ids: np.ndarray, energy: np.ndarray, forces: np.ndarray | None, ends: np.ndarray | None
) -> SplitNumbers:
    """Measure a split whose arrays fit together.

    Args:
        ids: (n,) str.
        energy: (n,), eV.
        forces: (N, 3), eV/A, or None.
        ends: (n,), where the forces of each structure end, or None.
    """
    energy = energy.astype(np.float64)
    norms = np.zeros(0) if forces is None else np.linalg.norm(forces, axis=1)
    return SplitNumbers(
        structures=len(ids),
        rows=len(norms),
        energy=(energy.mean(), energy.std(), energy.min(), energy.max()),
        force=(norms.mean(), norms.max()) if len(norms) else (0.0, 0.0),
        zero=float((norms == 0).mean()) if len(norms) else 0.0,
        net=0.0 if forces is None else float(np.median(net_forces(forces, ends))),
        within=_within(ids, energy),
    )


def net_forces(forces: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Norm of the sum of the forces of each structure, (n,), eV/A."""
    total = np.concatenate([np.zeros((1, 3)), np.cumsum(forces, axis=0, dtype=np.float64)])
    return np.linalg.norm(np.diff(total[ends], axis=0, prepend=0), axis=1)


def _within(ids: np.ndarray, energy: np.ndarray) -> float:
    """Spread of the energies of one system's frames, relative to that of all."""
    systems, index = np.unique([name.rpartition("_")[0] for name in ids], return_inverse=True)
    frames = np.bincount(index)
    several = frames[index] > 1
    if (frames > 1).sum() < MIN_SYSTEMS or "" in systems or not energy[several].std():
        return float("nan")
    deviation = energy - (np.bincount(index, energy) / frames)[index]
    freedom = several.sum() - (frames > 1).sum()
    return float(np.sqrt((deviation[several] ** 2).sum() / freedom) / energy[several].std())


def judge(report: Report, split: str, board: Board, found: SplitNumbers, all_atoms: bool) -> None:
    """Say what is odd about the numbers of a split."""
    mean, std, *extremes = found.energy
    size = found.rows / found.structures
    if found.structures > 1 and std < 1e-4 * max(1.0, abs(mean)):
        report.problems.append(f"{split}_energy is constant ({mean:.6g} eV)")
    elif board.energies == "adsorption" and abs(mean) > ADSORPTION_ENERGY:
        report.problems.append(
            f"{split}_energy has a mean of {mean:.4g} eV: {board.title} wants adsorption energies, "
            "these look like total ones"
        )
    elif board.energies == "adsorption" and max(map(abs, extremes)) > ADSORPTION_ENERGY:
        worst = max(extremes, key=abs)
        report.remarks.append(f"{split}_energy: adsorption energies up to {worst:.4g} eV")
    elif board.energies == "total" and all_atoms and abs(mean) < TOTAL_PER_ATOM * size:
        report.problems.append(
            f"{split}_energy has a mean of {mean:.4g} eV for {size:.0f} atoms: {board.title} wants "
            "total energies"
        )
    if found.within > SAME_SYSTEM:
        report.remarks.append(
            f"{split}: energies of frames of one system differ as those of all do "
            f"({found.within:.2f} of their spread): is each with its id?"
        )
    if not found.rows:
        return
    if found.zero == 1:
        report.problems.append(f"{split}_forces are all zero")
    if found.force[1] > LARGE_FORCE:
        report.remarks.append(f"{split}_forces: up to {found.force[1]:.4g} eV/A")


def judge_precision(report: Report, name: str, array: np.ndarray) -> None:
    """Say if all values are ones that float16 has: it was made of such predictions."""
    values = array[array != 0].ravel()[:100_000]
    with np.errstate(over="ignore"):
        rounded = len(values) >= 10 and (values.astype(HALF) == values).all()
    if rounded:
        report.problems.append(
            f"{name} has float16 precision, up to 0.004 eV off at 10 eV: predict in float32"
        )


def judge_shift(report: Report, split: str, forces: np.ndarray, ends: np.ndarray) -> None:
    """Say if the forces of each structure sum to zero when cut one row earlier or later."""
    if len(ends) < 3:
        return
    here = np.median(net_forces(forces, ends)[1:-1])
    for shift in (-1, 1):
        moved = np.clip(ends + shift, 0, len(forces))
        if np.median(net_forces(forces, moved)[1:-1]) < 0.01 * here:
            report.problems.append(
                f"{split}_chunk_idx is off by one: forces cut {abs(shift)} row "
                f"{'later' if shift > 0 else 'earlier'} sum to zero in each structure"
            )


def compare_splits(report: Report, splits: dict[str, SplitNumbers]) -> None:
    """Put the numbers side by side, and say which split is unlike the others."""
    if not splits:
        return
    columns = [found.texts() for found in splits.values()]
    report.table.append(f"{'':<20}" + "".join(f"{split:>14}" for split in splits))
    for label, *values in zip(SplitNumbers.LABELS, *columns, strict=True):
        report.table.append(f"{label:<20}" + "".join(f"{value:>14}" for value in values))
    for split, found in splits.items():
        others = [other.energy for name, other in splits.items() if name != split]
        if others and all(
            abs(found.energy[0] - mean) > 3 * max(std, 1e-9) for mean, std, *_ in others
        ):
            report.remarks.append(f"{split}: its mean energy is unlike that of all other splits")
