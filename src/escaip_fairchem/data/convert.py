"""Turn labelled structures into a data set that the recipes train on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from escaip_fairchem.data import checks, splits, store
from escaip_fairchem.data.frames import (
    Frame,
    LabelKeys,
    expand_inputs,
    free_atoms,
    group_of,
    labelled,
    read_frames,
)
from escaip_fairchem.data.references import ReferenceFit, References, RunningRms
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import numpy as np
    from ase import Atoms

DATASET_FILE = "dataset.yaml"


@dataclass(frozen=True)
class SplitOptions:
    """How validation frames are chosen.

    Attributes:
        val_fraction: Part of the frames to hold out.
        by: ``info`` key whose groups go to one side as a whole.
        within: ``info`` key inside whose groups frames are held out.
        seed: Random seed.
    """

    val_fraction: float = 0.1
    by: str | None = None
    within: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not 0 < self.val_fraction < 1:
            raise UserError(f"--val-fraction is {self.val_fraction}; give a number between 0 and 1")
        if self.by and self.within:
            raise UserError("--split-by and --val-within exclude each other; give one of them")

    @property
    def key(self) -> str | None:
        """The ``info`` key that the split needs."""
        return self.by or self.within

    def describe(self) -> str:
        """Say in a few words how the split is made."""
        how = "at random"
        if self.by:
            how = f"by whole {self.by}"
        elif self.within:
            how = f"within each {self.within}"
        return f"val fraction {self.val_fraction:g} {how}, seed {self.seed}"

    def mask(self, groups: list[str]) -> np.ndarray:
        """Choose the validation frames, (N,) bool, given each frame's group."""
        if self.by:
            return splits.split_by_group(groups, self.val_fraction, self.seed)
        if self.within:
            return splits.split_within_groups(groups, self.val_fraction, self.seed)
        return splits.split_random(len(groups), self.val_fraction, self.seed)


@dataclass
class Summary:
    """What was written.

    Attributes:
        folder: Folder that holds ``train``, ``val`` and ``dataset.yaml``.
        n_train: Training frames.
        n_val: Validation frames.
        n_stress: Frames that carry stress.
        references: Element references of the training frames.
        force_rms: Of the free training atoms, eV/A.
        unseen: Elements of validation that training lacks, by symbol.
    """

    folder: Path
    n_train: int
    n_val: int
    n_stress: int
    references: References
    force_rms: float
    unseen: list[str]

    def describe(self) -> str:
        """The lines that the commands print."""
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
        return "\n".join(lines)


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
    from ase.data import chemical_symbols

    fit, force_scale, stress_scale, n_stress = ReferenceFit(), RunningRms(), RunningRms(), 0
    val_elements: set[str] = set()
    with store.new_folder(out, overwrite) as partial:
        train = store.SplitWriter(partial / "train")
        val = store.SplitWriter(partial / "val")
        for atoms, held_out in zip(frames, in_val, strict=True):
            results = atoms.calc.results
            n_stress += "stress" in results
            if held_out:
                val.add(atoms)
                val_elements.update(atoms.symbols)
                continue
            train.add(atoms)
            fit.add(atoms.numbers, results["energy"])
            force_scale.add(results["forces"][free_atoms(atoms)])
            if "stress" in results:
                stress_scale.add(atoms.get_stress(voigt=False))
        train.close()
        val.close()
        references = fit.solve()
        store.write_dataset_group(
            partial / DATASET_FILE,
            label=label,
            train=paths[0],
            val=paths[1],
            references=references,
            force_rms=force_scale.rms,
            stress_rms=stress_scale.rms if n_stress else None,
            comment=comment,
        )
    known = {chemical_symbols[z] for z in references.elements}
    unseen = sorted(val_elements - known)
    return Summary(out, len(train), len(val), n_stress, references, force_scale.rms, unseen)


def convert(
    inputs: Sequence[str | Path],
    out: Path,
    *,
    name: str | None = None,
    label: str | None = None,
    split: SplitOptions | None = None,
    keys: LabelKeys | None = None,
    check_units: bool = True,
    overwrite: bool = False,
) -> tuple[Summary, Path]:
    """Convert files that ASE reads into a data set that recipes find by its name.

    Args:
        inputs: Files, glob patterns or folders of ASE-LMDB files.
        out: Folder to make, with ``train`` and ``val`` in it.
        name: The data set's name for ``dataset=NAME``; the name of ``out`` by default.
        label: fairchem's name of the data set, stored in checkpoints; ``name`` by default.
        split: How validation frames are chosen.
        keys: Where labels are when there is no calculator.
        check_units: Judge units by the size of distances and forces.
        overwrite: Whether an existing ``out`` and group file may be replaced.

    Returns:
        What was written, and the Hydra group file.

    Raises:
        UserError: Naming file and frame of the first defect.
    """
    name = name or out.resolve().name
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"name {name!r}: use letters, digits, '.', '_' and '-' only (--name)")
    group = store.data_root() / "configs" / "dataset" / f"{name}.yaml"
    if not overwrite:  # said before the work, not after it
        if out.exists():
            raise UserError(f"{out} exists; choose another folder or pass --overwrite")
        if group.exists():
            raise UserError(f"{group} exists; choose another --name or pass --overwrite")
    summary = convert_files(
        inputs,
        out,
        label=label or name,
        split=split,
        keys=keys,
        check_units=check_units,
        overwrite=overwrite,
    )
    store.copy_file(out / DATASET_FILE, group)
    return summary, group


def convert_files(
    inputs: Sequence[str | Path],
    out: Path,
    *,
    label: str,
    split: SplitOptions | None = None,
    keys: LabelKeys | None = None,
    check_units: bool = True,
    overwrite: bool = False,
) -> Summary:
    """Convert files that ASE reads into a folder with ``train`` and ``val``.

    The files are read twice: first everything is checked and the split is chosen, then it is
    written, so that a bad frame is found before anything exists and memory stays constant.

    Args:
        inputs: As for `convert`.
        out: Folder to make.
        label: fairchem's name of the data set.
        split: As for `convert`.
        keys: As for `convert`.
        check_units: As for `convert`.
        overwrite: Whether an existing ``out`` may be replaced.

    Returns:
        What was written.

    Raises:
        UserError: Naming file and frame of the first defect.
    """
    from tqdm import tqdm

    split, keys = split or SplitOptions(), keys or LabelKeys()
    paths = expand_inputs(inputs)
    frames = tqdm(read_frames(paths), desc="check", unit=" frames", disable=None)
    in_val = split.mask(_check_all(frames, keys, split.key, check_units))
    labelled_frames = (labelled(frame, keys) for frame in read_frames(paths))
    folder = out.resolve()
    return write_dataset(
        out,
        tqdm(labelled_frames, desc="write", unit=" frames", total=len(in_val), disable=None),
        in_val,
        label=label,
        comment=f"written by escaip convert from {len(paths)} files, {split.describe()}",
        paths=(str(folder / "train"), str(folder / "val")),
        overwrite=overwrite,
    )


def _check_all(
    frames: Iterable[Frame], keys: LabelKeys, split_key: str | None, check_units: bool
) -> list[str]:
    """Check every frame; returns the group of each, empty where the split needs none."""
    groups: list[str] = []
    rms: list[float] = []
    stress_rms: list[float] = []
    for frame in frames:
        source = frame.atoms
        try:
            # Before labels are asked for: ASE drops those of a structure with NaN positions.
            checks.check_structure(
                source.numbers,
                source.positions,
                source.cell.array,
                source.pbc,
                check_units=check_units,
            )
            results = labelled(frame, keys).calc.results
            checks.check_labels(
                len(source),
                energy=results["energy"],
                forces=results["forces"],
                stress=results.get("stress"),
                check_units=check_units,
            )
        except UserError as error:
            raise UserError(f"{frame.place}: {error}") from error
        rms.append(checks.component_rms(results["forces"]))
        if "stress" in results:
            stress_rms.append(checks.component_rms(results["stress"]))
        groups.append(group_of(frame, split_key) if split_key else "")
    if check_units and rms:
        checks.check_force_scale(rms)
    if check_units and stress_rms:
        checks.check_stress_scale(stress_rms)
    return groups
