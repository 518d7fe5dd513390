"""The sweep file: which overrides are varied, and how the runs are carried out."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from escaip_fairchem.describe import rises
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

Overrides = dict[str, Any]
#: Distribution -> how many values it takes; None: any number, at least one.
DISTRIBUTIONS = {"uniform": 2, "loguniform": 2, "int": 2, "choice": None}
_KEYS = ("grid", "list", "random", "samples", "sampling_seed", "fixed")
_HOW = ("parallel", "resources", "halving")
#: What a sweep sets itself.
_OWN = ("job.run_dir", "job.timestamp_id", "stop_at_step")


@dataclass(frozen=True)
class Halving:
    """Successive halving: points pause at the end of a rung, and only the best go on.

    Attributes:
        metric: Column of metrics.csv that decides, such as ``val_forces_mae``.
        steps: Step at which each rung ends; after the last one, the best go on to the end.
        factor: One in so many points goes on, rounded down, at least one.
        mode: ``min`` or ``max``: whether small or large values are better.
    """

    metric: str
    steps: tuple[int, ...]
    factor: float = 3
    mode: str = "min"

    def sizes(self, n_points: int) -> list[int]:
        """Points of each rung; one rung more than there are `steps`."""
        sizes = [n_points]
        for _ in self.steps:
            sizes.append(max(1, int(sizes[-1] / self.factor)))
        return sizes


@dataclass(frozen=True)
class Spec:
    """A sweep file.

    Attributes:
        grid: Override name -> values; every combination is a point.
        sets: `list` of the file: sets of overrides, combined with the grid.
        random: Override name -> (distribution, its values).
        samples: Draws from `random`, each combined with grid and list.
        sampling_seed: Of the draws.
        fixed: Overrides of all points; not part of their names.
        parallel: Runs at a time; None: as many as the scheduler allows, and one locally.
        resources: (condition, overrides): what points that meet the condition get besides.
        halving: Successive halving, or None.
    """

    grid: dict[str, list[Any]] = field(default_factory=dict)
    sets: list[Overrides] = field(default_factory=list)
    random: dict[str, tuple[str, Sequence[Any]]] = field(default_factory=dict)
    samples: int = 0
    sampling_seed: int = 0
    fixed: Overrides = field(default_factory=dict)
    parallel: int | None = None
    resources: tuple[tuple[Overrides, Overrides], ...] = ()
    halving: Halving | None = None


def load_spec(path: Path) -> Spec:
    """Read a sweep file.

    Args:
        path: YAML, with the types of Hydra (``1e-3`` is a number).

    Raises:
        UserError: No such file, not YAML, or something in it is unknown or out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not path.is_file():
        raise UserError(f"no sweep file at {path}; docs/sweeps.md shows one")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, OSError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    try:
        return parse_spec(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse_spec(content: Any) -> Spec:
    """Check the content of a sweep file.

    Args:
        content: What its YAML says.

    Raises:
        UserError: Something is unknown, missing or out of range.
    """
    _known(content, (*_KEYS, *_HOW), "")
    grid = _mapping(content, "grid")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"grid: {name} is {values!r}; give a list of values")
    sets = content.get("list") or []
    if not isinstance(sets, list) or not all(isinstance(entry, dict) for entry in sets):
        raise UserError("list: give a list of sets of overrides, each `- {name: value, ...}`")
    random = {name: _distribution(name, d) for name, d in _mapping(content, "random").items()}
    samples = _integer(content, "samples", 0, least=0)
    if bool(random) != bool(samples):
        raise UserError("random and samples go together: `samples: 20` draws 20 points")
    spec = Spec(
        grid=grid,
        sets=sets,
        random=random,
        samples=samples,
        sampling_seed=_integer(content, "sampling_seed", 0, least=0),
        fixed=_mapping(content, "fixed"),
        parallel=_integer(content, "parallel", None, least=1),
        resources=tuple(_resource(entry) for entry in content.get("resources") or []),
        halving=_halving(content["halving"]) if content.get("halving") else None,
    )
    _refuse_own(spec)
    return spec


def _known(content: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(content, dict):
        raise UserError(f"{where}expected keys of {', '.join(known)}")
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"{where}unknown key {key!r}; {hint}")


def _mapping(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{key}: give names of overrides, as `{key}: {{lr: ...}}`")
    return value


def _integer(content: Mapping[str, Any], key: str, default: Any, *, least: int) -> Any:
    value = content.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{key} is {value!r}; give an integer of at least {least}")
    return value


def _distribution(name: str, given: Any) -> tuple[str, Sequence[Any]]:
    where = f"random: {name}: "
    _known(given, tuple(DISTRIBUTIONS), where)
    if len(given) != 1:
        raise UserError(f"{where}give one distribution of {', '.join(DISTRIBUTIONS)}")
    ((kind, values),) = given.items()
    count = DISTRIBUTIONS[kind]
    if not isinstance(values, list) or not values or (count and len(values) != count):
        wanted = "[low, high]" if count else "a list of values"
        raise UserError(f"{where}{kind} is {values!r}; give {wanted}")
    if kind == "choice":
        return kind, values
    number = int if kind == "int" else (int, float)
    low, high = values
    if not all(isinstance(x, number) and not isinstance(x, bool) for x in values) or not (
        low < high and math.isfinite(low) and math.isfinite(high)
    ):
        kinds = "integers" if kind == "int" else "numbers"
        raise UserError(f"{where}{kind} is {values!r}; give two {kinds}, the smaller one first")
    if kind == "loguniform" and low <= 0:
        raise UserError(f"{where}loguniform is {values!r}; both must be positive")
    return kind, values


def _resource(entry: Any) -> tuple[Overrides, Overrides]:
    _known(entry, ("when", "set"), "resources: ")
    return _mapping(entry, "when"), _mapping(entry, "set")


def _halving(given: Any) -> Halving:
    _known(given, ("metric", "mode", "factor", "steps"), "halving: ")
    if "metric" not in given or "steps" not in given:
        raise UserError("halving: give metric, such as val_forces_mae, and steps, such as [200]")
    metric, steps, factor = str(given["metric"]), given["steps"], given.get("factor", 3)
    if (
        not isinstance(steps, list)
        or not steps
        or not all(isinstance(step, int) and step > 0 for step in steps)
        or steps != sorted(set(steps))
    ):
        raise UserError(f"halving: steps is {steps!r}; give rising integers, such as [200, 600]")
    if not isinstance(factor, int | float) or factor <= 1:
        raise UserError(f"halving: factor is {factor!r}; give a number above 1")
    mode = given.get("mode") or ("max" if rises(metric) else "min")
    if mode not in ("min", "max"):
        raise UserError(f"halving: mode is {mode!r}; give min or max")
    return Halving(metric, tuple(steps), factor, mode)


def _refuse_own(spec: Spec) -> None:
    names = {*spec.grid, *spec.random, *spec.fixed}
    names.update(name for entry in spec.sets for name in entry)
    names.update(name for _, given in spec.resources for name in given)
    for name in sorted(names):
        if name.lstrip("+~") in _OWN:
            raise UserError(f"{name} is set by the sweep itself; leave it out")
