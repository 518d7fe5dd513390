"""From the command line to composed trainings, kept as the points of a sweep."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch

from escaip_fairchem.config import EScAIPConfig
from escaip_fairchem.data.groups import converted_folder
from escaip_fairchem.errors import UserError
from escaip_fairchem.files import write_whole
from escaip_fairchem.graph import build_graph
from escaip_fairchem.neighbors import Structures
from escaip_fairchem.sweep.compose import composer, to_yaml
from escaip_fairchem.sweep.plan import check, refuse_if_changed
from escaip_fairchem.sweep.points import override_value
from escaip_fairchem.sweep.store import STATE_NAME, Sweep, load_sweep
from escaip_fairchem.train.runner import instantiate
from escaip_fairchem.train.summary import versions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from escaip_fairchem.bench.accuracy.options import Options
    from escaip_fairchem.sweep.compose import Composer


@dataclass(frozen=True)
class Training:
    """One of the trainings.

    Attributes:
        name: Of its folder.
        model: Key of `MODELS`.
        seed: Of weights and order of batches.
    """

    name: str
    model: str
    seed: int


def trainings(options: Options) -> list[Training]:
    """All of them, seed by seed, so that what changes with time falls on every model."""
    return [
        Training(f"{model}-{seed}", model, seed)
        for seed in range(options.seeds)
        for model in options.models
    ]


def make_plan(options: Options) -> Sweep:
    """Compose and check the trainings, and write them down.

    Args:
        options: Of the command line.

    Returns:
        The folder ``--out`` as a sweep, whose points are these trainings and those of earlier
        calls.

    Raises:
        UserError: A setting does not fit, data are not found, or the folder holds a training of
            this name with other settings.
    """
    folder = options.out.resolve()
    sweep = load_sweep(folder) if (folder / STATE_NAME).exists() else Sweep(folder)
    configs: dict[str, dict[str, Any]] = {}
    with _recipe(options) as (recipe, data), composer(recipe) as compose:
        for training in trainings(options):
            own = [
                f"job.run_dir={override_value(str(sweep.points_folder))}",
                f"job.timestamp_id={training.name}",
                f"++job.run_name={training.name}",
            ]
            overrides = [*data, *options.overrides(training.model, training.seed), *own]
            if training.model == "builtin":
                slots = _largest_neighborhood(compose, tuple(overrides))
                overrides.append(f"backbone.knn_pad_size={slots}")
            try:
                config = compose(overrides)
                check(config, None)
                refuse_if_changed(sweep, training.name, config, "give another --out")
            except UserError as error:
                raise UserError(f"{training.name}: {error}") from error
            configs[training.name] = config
    for training in trainings(options):
        write_whole(sweep.config(training.name), to_yaml(configs[training.name]))
        sweep.points[training.name] = {"model": training.model, "seed": training.seed}
    sweep.parallel = options.jobs
    sweep.versions = versions()["versions"]
    sweep.save()
    return sweep


@contextmanager
def _recipe(options: Options) -> Iterator[tuple[Path, list[str]]]:
    """The recipe, and the overrides by which it finds the data."""
    if not options.recipe.is_file():
        raise UserError(
            f"--recipe: no recipe at {options.recipe}; name one such as "
            "configs/oc20/escaip_few_frames.yml"
        )
    folder = Path(options.data)
    if converted_folder([folder]) is None:
        if folder.is_dir() and len(folder.parts) > 1:  # not a name that is a folder's, too
            raise UserError(f"--data: {folder} has no train and val; `escaip convert` makes them")
        yield options.recipe, [f"dataset={options.data}"]
        return
    group = folder / "dataset.yaml"
    if not group.is_file():
        raise UserError(
            f"--data: no {group}; `escaip references {folder} --name NAME` makes a group"
        )
    with tempfile.TemporaryDirectory() as scratch:
        # the folder may lie anywhere; its group file brings references that were fitted to it
        target = Path(scratch) / "dataset" / "of_folder.yaml"
        target.parent.mkdir()
        target.write_text(group.read_text())
        text = options.recipe.read_text()
        searched = yaml.safe_load(text).get("hydra", {}).get("searchpath")
        if not searched:
            raise UserError(
                f"--recipe: {options.recipe} has no hydra.searchpath, so --data NAME only"
            )
        recipe = Path(scratch) / options.recipe.name
        first = f"searchpath:\n    - file://{scratch}\n"
        recipe.write_text(text.replace("searchpath:\n", first, 1))
        paths = {part: override_value(str((folder / part).resolve())) for part in ("train", "val")}
        yield recipe, ["dataset=of_folder", *(f"dataset.{k}={v}" for k, v in paths.items())]


_known_slots: dict[str, int] = {}


def _largest_neighborhood(compose: Composer, overrides: Sequence[str]) -> int:
    """Slots that the built-in needs for the data; it has a fixed number, and fails above it.

    An atom with itself and its neighbours; fewer slots cost less time, so this is its best case.
    """
    config = compose(overrides)["runner"]
    backbone = config["train_eval_unit"]["model"]["backbone"]
    known = {"cutoff": "max_radius", "max_neighbors": "knn_k", "use_pbc": "use_pbc"}
    settings = {ours: backbone[theirs] for ours, theirs in known.items()}
    loaders = [config[f"{kind}_dataloader"]["dataset"] for kind in ("train", "eval")]
    key = repr((settings, loaders))
    if key not in _known_slots:
        graph = EScAIPConfig.from_kwargs(preset="v2", **settings)
        _known_slots[key] = max(_slots(structure, graph) for structure in _structures(loaders))
    return _known_slots[key]


def _structures(loaders: list[dict[str, Any]]) -> Iterator[Any]:
    for loader in loaders:
        dataset = instantiate(loader)
        yield from (dataset[index] for index in range(len(dataset)))


def _slots(structure: Any, config: EScAIPConfig) -> int:
    batch = atomicdata_list_to_batch([structure])
    pbc = torch.atleast_2d(batch.pbc).bool()
    structures = Structures(batch.pos, batch.cell, pbc, batch.natoms, batch.batch)
    with torch.no_grad():
        return build_graph(structures, config).num_slots
