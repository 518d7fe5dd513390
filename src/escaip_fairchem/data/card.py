"""``dataset.json``: what a converted set is made of and what is in it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem import __version__
from escaip_fairchem.data.facts import FORCE_EDGES, NATOMS_EDGES, Statistics
from escaip_fairchem.data.plan import VERSION

if TYPE_CHECKING:
    from pathlib import Path

    from escaip_fairchem.data.plan import Plan
    from escaip_fairchem.data.references import References

CARD_FILE = "dataset.json"


def write_card(
    path: Path,
    plan: Plan,
    *,
    label: str,
    files: list[dict[str, Any]],
    split: str,
    sides: dict[str, Statistics],
    references: References | None,
    residuals: dict[str, tuple[float, float, float]],
    n_rejected: int,
    n_duplicates: int,
) -> None:
    """Write the card.

    Args:
        path: The file.
        plan: What was converted.
        label: fairchem's name of the data set.
        files: Path, size and checksum of each source file.
        split: How validation frames were chosen.
        sides: Statistics of each folder.
        references: Element references of the training frames.
        residuals: Of each folder, smallest, largest and rms energy above the references, eV.
        n_rejected: Records left out.
        n_duplicates: Those of them that have the id of another one.
    """
    card, reading = plan.card, plan.reading
    content = {
        "conversion": {
            "package": f"escaip-fairchem {__version__}",
            "version": VERSION,
            "format": reading.format.name,
            "options": {**reading.format.OPTIONS, **reading.options},
            "unit_checks": reading.check_units,
            "split": split,
        },
        "label": label,
        "data": card.data,
        "energy_reference": card.energy,
        "level_of_theory": card.theory,
        "units": {"energy": "eV", "forces": "eV/A", "stress": "eV/A^3", "length": "A"},
        "units_in_source": card.units,
        "notes": list(card.notes),
        "files": files,
        "rejected": {"records": n_rejected, "duplicates": n_duplicates},
        "element_references": references_entry(references),
        "sets": {name: _side(side, residuals.get(name)) for name, side in sides.items()},
    }
    path.write_text(json.dumps(content, indent=1, default=str, allow_nan=False) + "\n")


def references_entry(references: References | None) -> dict[str, Any] | None:
    """Energies by symbol, eV, and how good they are."""
    from ase.data import chemical_symbols

    if references is None:
        return None
    return {
        "energy": {chemical_symbols[z]: references.values[z] for z in references.elements},
        "determined": references.determined,
        "residual_rms": references.rms,
    }


def _side(side: Statistics, residual: tuple[float, float, float] | None) -> dict[str, Any]:
    """What is in one folder."""
    from ase.data import chemical_symbols

    content = {
        "frames": side.n_frames,
        "frames_with_stress": side.n_stress,
        "elements": {
            chemical_symbols[z]: {"frames": int(side.frames_of[z]), "atoms": int(side.atoms_of[z])}
            for z in sorted(side.elements)
        },
        "natoms": _histogram(NATOMS_EDGES, side.natoms),
    }
    if not np.isfinite(side.energy).all():
        return content
    content |= {
        "force_rms_per_frame": _histogram(FORCE_EDGES, side.forces),
        "force_rms_free_atoms": side.force_rms,
        "stress_rms": side.stress_rms,
        "energy": list(side.energy),
        "energy_per_atom": list(side.energy_per_atom),
    }
    if residual is not None:
        content["energy_above_references"] = dict(zip(("min", "max", "rms"), residual, strict=True))
    return content


def _histogram(edges: tuple[float, ...], counts: np.ndarray) -> dict[str, list]:
    """Numbers of frames between edges; the last bin holds all above."""
    return {"from": list(edges[:-1]), "frames": counts.tolist()}
