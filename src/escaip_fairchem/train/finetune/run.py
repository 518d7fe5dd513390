"""The whole of a fine-tuning: data, checkpoint, energies, recipe, training, comparison."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from escaip_fairchem.data import store
from escaip_fairchem.data.convert import SplitOptions, convert_files
from escaip_fairchem.data.frames import read_frames
from escaip_fairchem.data.store import DATASET_FILE
from escaip_fairchem.errors import UserError
from escaip_fairchem.train.finetune.energies import (
    Comparison,
    fit_elements,
    settle_references,
    sum_elements,
)
from escaip_fairchem.train.finetune.model import build_model
from escaip_fairchem.train.finetune.recipe import Options, run_name, write_recipe
from escaip_fairchem.train.finetune.start import Start, read_start
from escaip_fairchem.train.parity import Parity, evaluate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from escaip_fairchem.data.frames import LabelKeys

#: Frames that the energies of data and model are compared on.
COMPARED = 500
RECIPE, START, DATA = "recipe.yml", "start.pt", "data"


@dataclass(frozen=True)
class Source:
    """Labelled structures as the user names them.

    Attributes:
        inputs: Files that ASE reads, or a folder that `escaip convert` made.
        split: How validation frames are chosen, of files.
        keys: Where labels are when ASE does not find them, of files.
        check_units: Judge units by the size of distances and forces, of files.
    """

    inputs: Sequence[str]
    split: SplitOptions | None = None
    keys: LabelKeys | None = None
    check_units: bool = True

    @property
    def converted(self) -> Path | None:
        """The folder, if that is what is named."""
        folder = Path(self.inputs[0]).resolve()
        ready = all((folder / part).is_dir() for part in ("train", "val"))
        return folder if len(self.inputs) == 1 and ready else None


@dataclass(frozen=True)
class Split:
    """Training or validation frames: their folder, and what is read ahead of training."""

    folder: Path
    numbers: list[np.ndarray]
    stress: bool

    @classmethod
    def read(cls, folder: Path) -> Split:
        """Read species, and whether there is stress."""
        numbers, stress = [], True
        for frame in read_frames([folder]):
            numbers.append(frame.atoms.numbers)
            stress &= "stress" in frame.atoms.calc.results
        return cls(folder, numbers, stress)

    @property
    def natoms(self) -> np.ndarray:
        """Atoms of each frame."""
        return np.array([len(numbers) for numbers in self.numbers])

    @property
    def elements(self) -> set[int]:
        """Atomic numbers that occur."""
        return set(np.unique(np.concatenate(self.numbers)).tolist())


def finetune(
    checkpoint: Path,
    source: Source,
    out: Path,
    options: Options,
    *,
    task: str | None = None,
    energy: str = "auto",
    references: str = "auto",
    train: bool = True,
) -> Path:
    """Fine-tune a checkpoint on labelled structures.

    Args:
        checkpoint: Inference checkpoint, or the folder of a run.
        source: The data.
        out: Folder of the run to make.
        options: How to train.
        task: Data set of the checkpoint whose tasks to take, if it knows several.
        energy: ``total``, ``adsorption`` or ``auto``; see `settle_references`.
        references: ``keep``, ``refit`` or ``auto``; see `settle_references`.
        train: False stops before the training, with everything in place for it.

    Returns:
        The recipe, ``out/recipe.yml``.

    Raises:
        UserError: Whatever is wrong with checkpoint, data, energies or options.
    """
    out = out.resolve()
    if out.exists():
        raise UserError(f"{out} exists; name another folder with --out")
    start = read_start(checkpoint, task)
    if start.denoising:
        print(f"{start.denoising:,} parameters stay behind, which served denoising")
    with store.new_folder(out, overwrite=False) as partial:
        folder = _data(source, partial / DATA, start.label)
        splits = Split.read(folder / "train"), Split.read(folder / "val")
        _say_unseen(start, splits)
        if "stress" in start.task and not all(split.stress for split in splits):
            start.without_stress()
            print("the checkpoint's stress is not trained: the data has none")
        start.save(partial / START)
        trained = _trained_parameters(start, partial / START, options)
        comparison = _compare(start, splits[0], partial / START)
        correction, words = settle_references(comparison, energy, references)
        print(words)
        if correction is not None:
            start.set_references(start.references + correction)
            start.save(partial / START)
        baseline = fit_elements(comparison.numbers, comparison.data)
        before = _errors(start, splits[1], partial / START, baseline)
        folder = folder if source.converted else out / DATA
        recipe = write_recipe(
            partial / RECIPE,
            start,
            options,
            run=out,
            source=f"{checkpoint} and {' '.join(map(str, source.inputs))}",
            folders=(folder / "train", folder / "val"),
            natoms=(splits[0].natoms, splits[1].natoms),
        )
    print(f"trained: {trained}; {recipe['steps']} steps, lr {recipe['lr']:g}; {out / RECIPE}")
    sys.stdout.flush()  # before the training writes
    if not train:
        print(table({"before": before}))
        return out / RECIPE
    _run(out)
    final = out / "checkpoints" / "final" / "inference_ckpt.pt"
    if not final.is_file():
        print(f"handed to the queue; the model will be {final}")
    else:
        held_out = replace(splits[1], folder=folder / "val")
        print(table({"before": before, "after": _errors(start, held_out, final, baseline)}))
        print(f"model: {final}")
    return out / RECIPE


def _data(source: Source, target: Path, label: str) -> Path:
    """The folder of training and validation frames; files are converted into ``target``."""
    if source.converted:
        print(f"data: {source.converted}")
        return source.converted
    summary = convert_files(
        source.inputs,
        target,
        label=label,
        split=source.split,
        keys=source.keys,
        check_units=source.check_units,
        strict=True,
    )
    (target / DATASET_FILE).unlink()  # the recipe says what is needed of it
    print(f"data: {summary.n_train} train and {summary.n_val} val frames")
    return target


def _say_unseen(start: Start, splits: tuple[Split, Split]) -> None:
    """Warn of elements that the checkpoint does not know, and refuse impossible ones."""
    from ase.data import chemical_symbols

    def symbols(numbers: set[int]) -> str:
        return ", ".join(chemical_symbols[z] for z in sorted(numbers))

    elements = splits[0].elements | splits[1].elements
    limit = start.config.max_num_elements
    beyond = {z for z in elements if z >= limit}
    if beyond:
        raise UserError(
            f"the checkpoint has no place for {symbols(beyond)} (max_num_elements is {limit}); "
            "train a model of your own"
        )
    if not start.seen:
        print("which elements the checkpoint was trained on, its weights do not tell")
    elif elements - start.seen:
        print(
            f"warning: the checkpoint never saw {symbols(elements - start.seen)}; such atoms "
            "start from random weights, so give many frames with them, and do not freeze "
            "embedding or attributes"
        )
    if splits[1].elements - splits[0].elements:
        print(f"warning: only val has {symbols(splits[1].elements - splits[0].elements)}")


def _trained_parameters(start: Start, checkpoint: Path, options: Options) -> str:
    """Build the model once, so that a mistake in the options comes before the work."""
    model = build_model(
        start=str(checkpoint),
        freeze=options.freeze,
        lora_rank=options.lora_rank,
        backbone=start.model["backbone"],
        heads=start.model["heads"],
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters"


def _predict(start: Start, split: Split, checkpoint: Path, limit: int) -> tuple[Parity, list]:
    """Labels and predictions of at most ``limit`` frames, and their atomic numbers."""
    from omegaconf import OmegaConf

    dataset = {
        "_target_": "escaip_fairchem.data.datasets.create_dataset",
        "name": start.label,
        "split": "val",
        "src": str(split.folder),
        "stress": start.trains_stress,
    }
    runner = {
        "eval_dataloader": {"dataset": dataset},
        "train_eval_unit": {"tasks": start.tasks},
    }
    parity = evaluate(OmegaConf.create({"runner": runner}), checkpoint, limit)
    return parity, np.split(parity.numbers, np.cumsum(parity.n_atoms)[:-1])


def _compare(start: Start, split: Split, checkpoint: Path) -> Comparison:
    """Energies of training frames beside those of the model."""
    parity, numbers = _predict(start, split, checkpoint, COMPARED)
    return Comparison(numbers, parity.energy, parity.energy_model)


def _errors(start: Start, split: Split, checkpoint: Path, baseline: np.ndarray) -> Parity:
    """Errors beside those of energies of elements, eV, (120,), and of zero forces."""
    parity, numbers = _predict(start, split, checkpoint, limit=1000)
    return replace(parity, energy_baseline=sum_elements(numbers, baseline))


def table(columns: dict[str, Parity]) -> str:
    """Errors on the validation frames, one column each, beside those of trivial models."""
    width = 12
    lines = ["".join([f"{'validation frames':<24}", *(f"{n:>{width}}" for n in columns)])]
    errors = [parity.errors() for parity in columns.values()]
    lines[0] += f"{'baseline':>{width}}"
    for name, (_, baseline) in errors[0].items():
        values = [*(error[name][0] for error in errors), baseline]
        lines.append("".join([f"{name:<24}", *(f"{value:{width}.5f}" for value in values)]))
    cosines = (f"{parity.force_cosine():{width}.5f}" for parity in columns.values())
    lines.append("".join([f"{'force cosine':<24}", *cosines]))
    lines.append("baseline: energies of elements fitted to the training frames, zero forces")
    return "\n".join(lines)


def _run(out: Path) -> None:
    """Run the recipe by the command that can repeat it."""
    command = [
        str(Path(sys.executable).with_name("fairchem")),
        *("-c", str(out / RECIPE), run_name(out)),
    ]
    if subprocess.run(command, check=False).returncode:
        again = shlex.join(["fairchem", *command[1:]])
        raise UserError(
            f"the training failed, see above; after a correction of {RECIPE}, `{again}` starts it "
            "again"
        )
