"""The configuration reference, docs/configuration.md, written from the code it describes."""

from __future__ import annotations

import dataclasses
import re
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from escaip_fairchem.config import (
    ALIASES,
    CHOICES,
    ONLY_VALUE,
    PRESETS,
    WITHOUT_EFFECT,
    EScAIPConfig,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

#: What each key of the backbone means; every key has an entry, as a test sees to.
MEANINGS = {
    "preset": "what the keys without a value of their own are: `paper` (2024) or `v2` (2025)",
    "hidden_size": "channels of nodes and edges, H; divisible by `num_heads`",
    "num_layers": "blocks, L",
    "num_heads": "attention heads, A; 64 channels a head as published",
    "graph": "`knn`: strictly the nearest, hard cut. `soft_knn`: soft ranks and an envelope",
    "angular": "angles in attention: a bias of their cosine, or Legendre-weighted channels",
    "message": "whether the state of the edge enters the message",
    "pooling": "node from its neighbourhood: mean of the slots, or slot 0 (the atom itself)",
    "layout": "where norms and residuals sit, as in the authors' code of 2024 or 2025",
    "cutoff": "radius of the neighbourhood, A",
    "max_neighbors": "neighbours per atom, K",
    "rank_scale": "`soft_knn`: width of a step of the rank, A",
    "envelope_scale": "`soft_knn`: temperature of the soft maximum in the envelope",
    "smooth": "energy twice differentiable at every crossing; needs `soft_knn`; false as published",
    "use_pbc": "false treats every structure as a molecule",
    "neighbor_search": "how candidate pairs are found; all give the same pairs",
    "max_num_elements": "size of the species table; atomic numbers must be below it",
    "species_dim": "channels of a species embedding",
    "boo_lmax": "largest l of the bond-orientational order; 0 is without it (Q_0 is 1 everywhere)",
    "boo_dim": "channels of its embedding",
    "boo_scale": "`component`: sqrt(2l+1) Q_l. `unit`: Q_l with a floor of 1e-3",
    "rbf_size": "Gaussians of the distance between 0 and the cutoff",
    "rbf_dim": "channels that they are mapped to",
    "rbf_width": "width of a Gaussian in units of their spacing",
    "frequency_list": "`legendre`: channels of a head for l = 0..4; must sum to H/A",
    "activation": "of all feed-forward layers",
    "norm": "of all norms; `skip` has none",
    "ffn_multiplier": "hidden width of the blocks' feed-forward layers, in units of H",
    "readout_multiplier": "that of the readouts",
    "output_multiplier": "that of the heads",
    "mlp_dropout": "dropout of the readouts",
    "node_ffn_dropout": "that of the node feed-forward layers",
    "edge_ffn_dropout": "that of the edge feed-forward layers, that of the input block included",
    "scalar_output_dropout": "that of energy and force-magnitude outputs",
    "vector_output_dropout": "that of the force-direction output",
    "attention_dropout": "that of attention weights",
    "stochastic_depth": "probability that a structure skips a sub-layer in training",
    "direct_forces": "true: a force head. false: forces by differentiation (`ConservativeHead`)",
    "regress_forces": "whether forces are learnt",
    "regress_stress": "stress by differentiation; needs `direct_forces: false`",
    "direct_stress": "a stress head reads the edges; needs `direct_forces: true`",
    "energy_reduce": "energy of a structure: sum or mean of atomic energies",
    "energy_head_norm": "false: no norm before the energy head, as in the built-in gradient head",
    "energy_head_gain": "gain of the energy head's initial weights",
    "force_weights": "`vector` as published; `scalar` makes direct forces exactly equivariant",
    "force_encoding": "forces are an input too, of `+denoising=dens`; nothing else sets it",
    "checkpointing": "what training keeps for backward ([memory](model.md#speed-and-memory))",
    "inference_chunk": "without gradients, atoms at a time; 0 takes all at once",
    "compile": "everything after the graph by `torch.compile` ([speed](model.md#compilation))",
    "cuda_graphs": "with `compile`: evaluation on a GPU by CUDA graphs, for small batches",
    "init": "`published`, or `resolved`: [few frames](model.md#few-frames)",
}  # fmt: skip

#: What the keys of a recipe mean, in the order of the page.
RECIPE_KEYS = {
    "seed": "of weights, dropout and the order of batches",
    "epochs": "passes over the data, or null with `steps`",
    "steps": "optimizer steps, or null with `epochs`",
    "lr": "largest learning rate",
    "max_atoms": "atoms in a batch, per GPU",
    "train_fraction": "part of the training structures, the same ones whatever the seed",
    "accumulate": "batches per optimizer step and GPU",
    "train_on_free_atoms": "false also learns the forces on fixed atoms",
    "loss": "weights: `loss.energy`, `loss.forces` and, with stress, `loss.stress`",
    "optim": "`weight_decay`, `warmup_factor`, `warmup_epochs`, `lr_min_factor`, `clip_grad_norm`, "
    "`ema_decay`",
    "normalizer": "`mean` (eV) is added to energies, `rmsd` multiplies outputs",
    "element_refs": "`element_refs.energy`: eV of each element, index = atomic number",
    "bf16": "mixed precision in bfloat16",
    "fp16": "mixed precision in float16 with loss scaling, for GPUs without bfloat16",
    "tf32": "TF32 matrix products on GPUs",
    "shard_optimizer": "each rank holds a part of the optimizer's state",
    "num_workers": "processes that load data, per GPU",
    "evaluate_every_n_steps": "validation between those at the end of each epoch",
    "checkpoint_every_n_steps": "steps between checkpoints to go on from",
    "budget": "of `+budget=one`: `seconds` or `samples`, `clock`, `evaluations`, `warmup`",
    "max_saved_checkpoints": "how many of them are kept, besides `final`",
    "stop_at_step": "pause there; null or a larger number goes on",
    "denoising": "of `+denoising=dens`: `prob`, `std`, `corrupt_ratio`, `weight`, `max_force_norm`",
    "rotate": "turn each training structure at random, anew at each step",
    "on_nan": "what a loss or gradient that is not finite does: stop, or skip the step",
    "progress": "a bar in a terminal, lines in a log file; false shows neither",
    "tensorboard": "event files for TensorBoard, as `logger=tensorboard`",
    "backbone": "the model: the keys below, as `backbone.KEY=VALUE` (`+backbone.KEY` if new)",
    "dataset": "`dataset.name`, `dataset.train`, `dataset.val`: paths in the data root",
    "heads": "output heads by task name",
    "tasks": "fairchem's tasks: what is learnt, loss, metrics",
    "properties": "the tasks of `tasks`, by name",
    "optimizer": "the optimizer, built by Hydra",
    "train_dataloader": "fairchem's data loader for training",
    "eval_dataloader": "that for validation",
    "start": "of `initial=checkpoint` and `escaip finetune`: whose weights a run begins with",
    "freeze": "parts of the model that stay as they are",
    "layer_decay": "factor of the learning rate from a layer to the one before it",
    "lora_rank": "rank of low-rank updates; 0 trains the weights themselves",
    "checkpoint": "of recipes that predict: an inference checkpoint, or the folder of a run",
    "splits": "data sets to predict, by name; `splits.NAME=null` leaves one out",
    "task": "data set of the checkpoint whose tasks are predicted, if it knows several",
    "part_rows": "structures of a part: what a kill loses at most, per GPU",
    "allow_unknown_elements": "predict elements that have no reference energy, too",
    "free_atoms_only": "evaluate forces on free atoms; false: on all",
    "milli": "print meV in place of eV",
    "board": "the leaderboard that a file is for",
    "ids": "names in that file: `sid`, `sid_fid`, or `auto` for the first if it is unique",
    "atoms": "whose forces that file has: `all` or `free`",
    "fixed_forces": "those of atoms held in place: `zero`, or as `predicted`",
    "relax_optimizer": "of ASE: `LBFGS`, `BFGS` or `FIRE`",
    "fmax": "largest force on a free atom of a relaxed structure, eV/A",
    "relax_steps": "most steps of a relaxation",
    "maxstep": "longest move of an atom in a step of a relaxation, A",
    "float64": "predict in double precision",
    "entries": "computed structure entries of WBM, as Matbench Discovery publishes them",
    "references": "its elemental reference entries",
    "job": "fairchem's job: `run_dir`, `run_name`, `timestamp_id` (the same again resumes), "
    "`device_type`, `scheduler`, `logger`",
}  # fmt: skip

_HEADER = """\
# Configuration reference

Written by `escaip config-reference > docs/configuration.md`; change the code, not this page.

- [Groups](#groups): `fairchem -c RECIPE GROUP=CHOICE`
- [Keys of a recipe](#keys-of-a-recipe): `fairchem -c RECIPE KEY=VALUE`
- [Keys of the backbone](#keys-of-the-backbone): `fairchem -c RECIPE +backbone.KEY=VALUE`
- [Names of other codes](#names-of-other-codes) that the backbone takes too

The command line wins over the groups, and the groups over the recipe. A key that neither the recipe
nor its groups set is added with `+KEY=VALUE`; `++KEY=VALUE` does either. Unknown keys of the
backbone are refused with the name of the nearest one.
"""


def markdown() -> str:
    """The page docs/configuration.md."""
    sections = [_HEADER, _groups(), _recipe_keys(), _backbone(), _other_names()]
    return "\n".join(sections)


def recipe_keys() -> set[str]:
    """Keys that a recipe or the command line sets for the groups."""
    root = files("escaip_fairchem") / "configs"
    wiring = (root / "training" / "wiring.yaml").read_text()
    used = {key for text in _texts(root) for key in re.findall(r"\$\{(\w+)[.}]", text)}
    return {*used, *re.findall(r"^(\w+):", wiring, flags=re.M)} - {"runner", "defaults"}


def _texts(folder: Any) -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _texts(entry)
        elif entry.name.endswith(".yaml"):
            yield entry.read_text()


def _groups() -> str:
    lines = ["## Groups", "", "| group | choice | what it is |", "|---|---|---|"]
    for folder, group in _group_folders():
        for file in sorted(folder.iterdir(), key=lambda file: file.name):
            if file.name.endswith(".yaml"):
                name = file.name.removesuffix(".yaml")
                lines.append(f"| `{group}` | `{name}` | {_about(file.read_text())} |")
    lines += [
        "",
        "`dataset` also has what `escaip convert` has written into `$ESCAIP_DATA/configs/dataset`.",
        "Groups of one domain (`oc20`, ...) are those that its recipes find.",
        "",
    ]
    return "\n".join(lines)


def _group_folders() -> Iterator[tuple[Any, str]]:
    """Folders of groups with their names, those for all recipes first."""
    root = files("escaip_fairchem") / "configs"
    found = []
    for folder in root.iterdir():
        if not folder.is_dir() or folder.name.startswith("__"):
            continue
        inner = [f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("__")]
        found += [(1, f"{f.name}` of `{folder.name}", f) for f in inner]
        found += [] if inner else [(0, folder.name, folder)]
    for _, name, folder in sorted(found, key=lambda entry: entry[:2]):
        yield folder, name


def _about(text: str) -> str:
    """First sentence of a group file's comment, or its values in one line."""
    lines = text.splitlines()
    if lines and lines[0].startswith("# @package"):
        lines = lines[1:]
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    if comment:
        sentence = re.split(r"(?<=\.)\s", " ".join(comment), maxsplit=1)[0]
        return sentence.rstrip(".:;").replace("|", "\\|")
    values = [line for line in lines if ": " in line and not line.startswith(("model:", "#"))]
    return ", ".join(f"`{line.strip()}`" for line in values)


def _recipe_keys() -> str:
    lines = ["## Keys of a recipe", "", "| key | meaning |", "|---|---|"]
    known = recipe_keys()
    lines += [f"| `{key}` | {text} |" for key, text in RECIPE_KEYS.items() if key in known]
    return "\n".join([*lines, ""])


def _backbone() -> str:
    lines = [
        "## Keys of the backbone",
        "",
        "| key | type | `paper` | `v2` | meaning |",
        "|---|---|---|---|---|",
    ]
    paper, v2 = (EScAIPConfig.from_kwargs(preset=preset).to_dict() for preset in PRESETS)
    for field in dataclasses.fields(EScAIPConfig):
        key = field.name
        kind = " \\| ".join(CHOICES[key]) if key in CHOICES else _kind(str(field.type))
        values = f"{_value(paper[key])} | {_value(v2[key])}"
        lines.append(f"| `{key}` | {kind} | {values} | {MEANINGS[key]} |")
    return "\n".join([*lines, ""])


def _kind(annotation: str) -> str:
    return "list of int" if annotation.startswith("tuple") else annotation


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value == [] else str(value)


def _other_names() -> str:
    lines = [
        "## Names of other codes",
        "",
        "Keys of fairchem's built-in EScAIP and of the authors' code.",
        "",
        "| theirs | here |",
        "|---|---|",
    ]
    lines += [f"| `{theirs}` | `{ours}` |" for theirs, ours in ALIASES.items()]
    lines += [f"| `{key}` | only {_value(value)} |" for key, value in ONLY_VALUE.items()]
    ignored = ", ".join(f"`{key}`" for key in sorted(WITHOUT_EFFECT))
    return "\n".join([*lines, "", f"Accepted, and without effect here: {ignored}.", ""])
