"""What was written: ``dataset.yaml``, and the lines that the commands print."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.data import store
from escaip_fairchem.data.facts import Statistics, columns, measure
from escaip_fairchem.data.references import References

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ase import Atoms

REJECTED_FILE = "rejected.csv"


@dataclass
class Summary:
    """What was written.

    Attributes:
        folder: Folder that holds ``train``, ``val`` and ``dataset.yaml``, or ``test``.
        n_train: Training frames.
        n_val: Validation frames.
        n_test: Frames without labels.
        n_stress: Frames that carry stress.
        references: Element references of the training frames.
        force_rms: Of the free training atoms, eV/A.
        unseen: Elements of validation that training lacks, by symbol.
        n_rejected: Records left out.
        first_rejected: Place and reason of the first of them.
    """

    folder: Path
    n_train: int = 0
    n_val: int = 0
    n_test: int = 0
    n_stress: int = 0
    references: References | None = None
    force_rms: float = 1.0
    unseen: tuple[str, ...] = ()
    n_rejected: int = 0
    first_rejected: str = ""

    def describe(self) -> str:
        """The lines that the commands print."""
        if self.references is None:
            lines = [f"{self.folder}: {self.n_test} frames without labels"]
        else:
            n_frames = self.n_train + self.n_val
            lines = [
                f"{self.folder}: {self.n_train} train and {self.n_val} val frames",
                f"stress in {self.n_stress} of {n_frames} frames",
                f"element references: {self.references.describe()}",
                f"force rms of free training atoms: {self.force_rms:.4g} eV/A",
            ]
        if self.unseen:
            lines.append(
                f"only val has {', '.join(self.unseen)}: train gives them no reference energy, so "
                "val energies are comparable only within one composition"
            )
        if self.n_rejected:
            lines.append(
                f"left out: {self.n_rejected}, listed in {self.folder / REJECTED_FILE}; "
                f"the first is {self.first_rejected}"
            )
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`."""
        content = asdict(self) | {"folder": str(self.folder)}
        for key, value in (content["references"] or {}).items():
            content["references"][key] = np.asarray(value).tolist()
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Summary:
        """What `as_json` made plain."""
        stored = content["references"]
        if stored is not None:
            arrays = {key: np.array(stored[key]) for key in ("values", "elements")}
            stored = References(**{**stored, **arrays})
        return cls(**{**content, "folder": Path(content["folder"]), "references": stored})


def write_dataset(
    out: Path,
    frames: Iterable[Atoms],
    in_val: np.ndarray,
    *,
    label: str,
    comment: str,
    paths: tuple[str, str],
    overwrite: bool = False,
) -> Summary:
    """Write labelled frames, their statistics and ``dataset.yaml``, all or nothing.

    For frames that are made on the spot: what is remembered of each one is held in memory.

    Args:
        out: Folder to make.
        frames: Labelled frames, N of them.
        in_val: Which frames are held out, (N,) bool.
        label: fairchem's name of the data set.
        comment: Where the data comes from, for ``dataset.yaml``.
        paths: Train and val folders as ``dataset.yaml`` names them.
        overwrite: Whether an existing folder may be replaced.

    Returns:
        What was written.
    """
    facts, numbers = [], []
    with store.new_folder(out, overwrite) as partial:
        writers = [store.SplitWriter(partial / side) for side in ("train", "val")]
        for atoms, held_out in zip(frames, in_val, strict=True):
            writers[int(held_out)].add(atoms)
            facts.append(measure(atoms))
            numbers.append(atoms.numbers)
        for writer in writers:
            writer.close()
        table, train, val = columns(facts, numbers), Statistics(), Statistics()
        train.add(table, ~in_val)
        val.add(table, in_val)
        return write_group(partial, out, train, val, label=label, comment=comment, paths=paths)


def write_group(
    folder: Path,
    out: Path,
    train: Statistics,
    val: Statistics,
    *,
    label: str,
    comment: str,
    paths: tuple[str, str],
) -> Summary:
    """Write ``dataset.yaml`` and sum up."""
    from ase.data import chemical_symbols

    references = train.references()
    store.write_dataset_group(
        folder / store.DATASET_FILE,
        label=label,
        train=paths[0],
        val=paths[1],
        references=references,
        force_rms=train.force_rms,
        stress_rms=train.stress_rms,
        comment=comment,
    )
    unseen = sorted(chemical_symbols[z] for z in val.elements - train.elements)
    return Summary(
        out,
        train.n_frames,
        val.n_frames,
        n_stress=train.n_stress + val.n_stress,
        references=references,
        force_rms=train.force_rms,
        unseen=tuple(unseen),
    )
