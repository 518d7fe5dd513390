"""From recipe and sweep file to composed, checked and stored points."""

from __future__ import annotations

import json
import shutil
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import yaml

from escaip_fairchem.config import EScAIPConfig
from escaip_fairchem.data.datasets import find_sources
from escaip_fairchem.errors import UserError
from escaip_fairchem.files import write_whole
from escaip_fairchem.sweep.compose import composer, to_yaml
from escaip_fairchem.sweep.points import expand, override_value
from escaip_fairchem.sweep.spec import load_spec
from escaip_fairchem.sweep.store import (
    STATE_NAME,
    Sweep,
    difference,
    load_sweep,
)
from escaip_fairchem.train.summary import versions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from escaip_fairchem.sweep.points import Point
    from escaip_fairchem.sweep.spec import Halving, Spec

_SHOWN = 3  # points named in a message that several share


@dataclass(frozen=True)
class Plan:
    """A sweep that can be carried out.

    Attributes:
        sweep: With the points of the file, and those of its folder.
        spec: The file.
        points: Those of the file.
        configs: Name -> resolved configuration.
        seconds: Time that composing and checking took.
    """

    sweep: Sweep
    spec: Spec
    points: list[Point]
    configs: dict[str, dict[str, Any]]
    seconds: float

    @property
    def new(self) -> list[str]:
        """Points that the folder does not hold yet."""
        return [name for name in self.configs if not self.sweep.config(name).exists()]


def make_plan(recipe: Path, sweep_file: Path, folder: Path, overrides: Sequence[str]) -> Plan:
    """Compose and check every point; nothing is written.

    Args:
        recipe: A recipe of fairchem's command.
        sweep_file: The sweep file.
        folder: Folder of the sweep; it need not exist.
        overrides: For all points.

    Raises:
        UserError: With all mistakes in all points.
    """
    start = time.monotonic()
    folder = folder.resolve()
    spec = load_spec(sweep_file)
    points = expand(spec, overrides)
    sweep = load_sweep(folder) if (folder / STATE_NAME).exists() else Sweep(folder)
    configs: dict[str, dict[str, Any]] = {}
    mistakes: dict[str, list[str]] = defaultdict(list)
    with composer(recipe) as compose:
        for point in points:
            own = [
                f"job.run_dir={override_value(str(sweep.points_folder))}",
                f"job.timestamp_id={override_value(point.name)}",
                f"++job.run_name={override_value(point.name)}",
            ]
            try:
                config = compose([*point.overrides, *own])
                check(config, spec.halving)
                refuse_if_changed(sweep, point.name, config)
            except UserError as error:
                mistakes[str(error)].append(point.name)
            else:
                configs[point.name] = config
    if mistakes:
        raise UserError(_listed(mistakes, len(points)))
    return Plan(
        _updated(sweep, spec, points, configs), spec, points, configs, time.monotonic() - start
    )


def _listed(mistakes: dict[str, list[str]], n_points: int) -> str:
    lines = []
    for message, names in mistakes.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        lines.append(f"{', '.join(names[:_SHOWN])}{more}: {message}")
    if len(lines) == 1:
        return lines[0]
    return f"{len(lines)} mistakes in {n_points} points, nothing was started\n  " + "\n  ".join(
        lines
    )


def check(config: dict[str, Any], halving: Halving | None) -> None:
    """What can be told without building anything: model keys, paths of data, rungs.

    Args:
        config: The resolved configuration of a point.
        halving: Of the sweep, or None.

    Raises:
        UserError: Something is wrong.
    """
    runner = config.get("runner", {})
    unit = runner.get("train_eval_unit") or {}
    backbone = (unit.get("model") or {}).get("backbone")
    if backbone and str(backbone.get("model")).startswith("escaip"):
        _check_backbone(json.dumps(backbone))
    for loader in ("train_dataloader", "eval_dataloader"):
        dataset = (runner.get(loader) or {}).get("dataset") or {}
        if dataset.get("_target_", "").endswith("datasets.create_dataset"):
            find_sources(dataset["name"], dataset["split"], dataset["src"])
    if halving is None:
        return
    if "stop_at_step" not in runner:
        raise UserError("halving needs a recipe with `stop_at_step`, as those of this package")
    every = runner.get("evaluate_every_n_steps")
    for step in halving.steps:
        if not every or step % every:
            raise UserError(
                f"halving: no evaluation at step {step}, where a rung ends; set "
                f"evaluate_every_n_steps (now {every}) to a divisor of it"
            )
    end = runner.get("max_steps")
    if end is not None and halving.steps[-1] >= end:
        raise UserError(f"halving: steps ends at {halving.steps[-1]}, and runs at {end}")


@cache
def _check_backbone(text: str) -> None:
    """Most points of a sweep share a model, whose check compares names at length."""
    EScAIPConfig.from_kwargs(**{k: v for k, v in json.loads(text).items() if k != "model"})


def refuse_if_changed(
    sweep: Sweep,
    name: str,
    config: dict[str, Any],
    remedy: str = "give another --dir, or vary this key in the sweep file",
) -> None:
    """Refuse to continue a run with another configuration.

    Args:
        sweep: Its folder may hold the configuration of the run.
        name: Of the run.
        config: The resolved configuration.
        remedy: What the message says to do.

    Raises:
        UserError: They differ.
    """
    path = sweep.config(name)
    if not path.exists():
        return
    text = difference(read_config(path), yaml.safe_load(to_yaml(config)))
    if text:
        raise UserError(f"differs from what {sweep.folder} holds under this name: {text}; {remedy}")


def read_config(path: Path) -> dict[str, Any]:
    """A resolved configuration, with YAML's own types: enough to compare and to look up."""
    return yaml.load(path.read_text(), Loader=yaml.CSafeLoader)


def _updated(
    sweep: Sweep, spec: Spec, points: list[Point], configs: dict[str, dict[str, Any]]
) -> Sweep:
    halving = json.loads(json.dumps(asdict(spec.halving))) if spec.halving else None
    if sweep.points and halving != sweep.halving:
        raise UserError(f"halving differs from that of {sweep.folder}; give another --dir")
    if halving and sweep.points and any(point.name not in sweep.points for point in points):
        raise UserError(f"points cannot join the halving of {sweep.folder}; give another --dir")
    modes = {config["job"]["scheduler"]["mode"] for config in configs.values()}
    if len(modes) > 1:
        raise UserError("some points run locally and some on SLURM; choose one for all of them")
    sweep.slurm = modes == {"SLURM"}
    sweep.parallel = spec.parallel
    sweep.halving = halving
    if spec.halving:
        sweep.metric = spec.halving.metric
    sweep.points |= {point.name: point.varied for point in points}
    return sweep


def store(plan: Plan, recipe: Path, sweep_file: Path) -> None:
    """Write the folder of the sweep.

    Args:
        plan: What to write.
        recipe: Copied.
        sweep_file: Copied.
    """
    sweep = plan.sweep
    sweep.folder.mkdir(parents=True, exist_ok=True)
    for source, name in ((recipe, "recipe"), (sweep_file, "sweep")):
        target = sweep.folder / f"{name}{source.suffix}"
        if source.resolve() != target:
            shutil.copy(source, target)
    for name, config in plan.configs.items():
        write_whole(sweep.config(name), to_yaml(config))
    sweep.versions = versions()["versions"]
    sweep.save()
