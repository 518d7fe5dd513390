"""The points of a sweep: sets of overrides, each with the name of its folder."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from escaip_fairchem.sweep.spec import Overrides, Spec

MAX_NAME = 96  # characters; file systems allow 255, tables and queues less
BASE_NAME = "base"  # of a point without overrides
_HASH = 8
_DIGITS = 4  # of drawn numbers, so that names stay short
_SAFE = re.compile(r"[A-Za-z0-9_.-]+")
# Hydra's grammar reads these without quotes, as they are.
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_WORDS = {"null", "true", "false", "inf", "nan", "yes", "no", "on", "off", "y", "n"}


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        name: Name of its folder; depends on `varied` only.
        varied: The overrides that make it.
        overrides: All of its overrides, as on fairchem's command line, in order.
    """

    name: str
    varied: Overrides
    overrides: tuple[str, ...]


def expand(spec: Spec, overrides: Sequence[str] = ()) -> list[Point]:
    """All points of a sweep: every combination of grid, list and draws, each once.

    Args:
        spec: The sweep.
        overrides: Of the command line, for all points, behind those of `spec.fixed`.

    Returns:
        Points in a fixed order.

    Raises:
        UserError: An override of the command line is for a key that the sweep varies.
    """
    for name in {*spec.grid, *spec.random, *(name for entry in spec.sets for name in entry)}:
        if any(_key_of(text) == name.lstrip("+~") for text in overrides):
            raise UserError(f"{name} is varied by the sweep file; leave it out of the command")
    grid = [
        dict(zip(spec.grid, values, strict=True))
        for values in itertools.product(*spec.grid.values())
    ]
    draws = [draw(spec, number) for number in range(spec.samples)] or [{}]
    fixed = [override(name, value) for name, value in spec.fixed.items()]
    points = {}
    for parts in itertools.product(grid, spec.sets or [{}], draws):
        varied = {name: value for part in parts for name, value in part.items()}
        more = [
            override(name, value)
            for condition, given in spec.resources
            if all(name in varied and varied[name] == condition[name] for name in condition)
            for name, value in given.items()
        ]
        own = [override(name, value) for name, value in varied.items()]
        name = point_name(varied)
        points.setdefault(name, Point(name, varied, _last_ones([*fixed, *overrides, *more, *own])))
    return list(points.values())


def _last_ones(overrides: Sequence[str]) -> tuple[str, ...]:
    """Of several overrides of one key, the last one; Hydra refuses two choices of a group."""
    found: dict[str, str] = {}
    for text in overrides:
        key = _key_of(text)
        found.pop(key, None)
        found[key] = text
    return tuple(found.values())


def _key_of(text: str) -> str:
    return text.partition("=")[0].lstrip("+~")


def draw(spec: Spec, number: int) -> Overrides:
    """One draw of the random overrides.

    It depends on the seed, its number and the names, not on how many are drawn: more samples
    leave the first ones as they are.
    """
    drawn = {}
    for name, (kind, values) in spec.random.items():
        source = random.Random(f"{spec.sampling_seed}/{number}/{name}")
        if kind == "choice":
            drawn[name] = source.choice(values)
        elif kind == "int":
            drawn[name] = source.randint(*values)
        elif kind == "uniform":
            drawn[name] = _rounded(source.uniform(*values))
        else:
            drawn[name] = _rounded(math.exp(source.uniform(*map(math.log, values))))
    return drawn


def _rounded(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")


def point_name(varied: Overrides) -> str:
    """Name of a folder: ``lr_0.001+backbone_tiny``, safe for file systems and Hydra.

    A hash is added where the name alone would not tell overrides apart: a value with other
    characters or of another type than it looks, or a name too long. Names depend on nothing else,
    so points that are added later change none.
    """
    parts, exact = [], True
    for name, value in varied.items():
        text = value if isinstance(value, str) else override_value(value)
        exact &= _SAFE.fullmatch(text) is not None
        if isinstance(value, str):  # 'null' and '1' are not null and 1
            exact &= _PLAIN.fullmatch(text) is not None and text.lower() not in _WORDS
        key = name.lstrip("+~")
        exact &= _SAFE.fullmatch(key) is not None
        parts.append(f"{_cleaned(key)}_{_cleaned(text)}")
    full = "+".join(parts) or BASE_NAME
    if exact and len(full) <= MAX_NAME:
        return full
    digest = hashlib.sha256(json.dumps(varied, sort_keys=True).encode()).hexdigest()
    return f"{full[: MAX_NAME - _HASH - 1]}-{digest[:_HASH]}"


def _cleaned(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-") or "-"


def override(name: str, value: Any) -> str:
    """An override as fairchem's command line takes it, with the quotes that Hydra's grammar needs.

    Args:
        name: With ``+``, ``++`` or ``~`` in front where wanted.
        value: Plain value of YAML.
    """
    return f"{name}={override_value(value)}"


def override_value(value: Any) -> str:
    """A value in Hydra's grammar of overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        inner = ",".join(f"{_key(key)}:{override_value(item)}" for key, item in value.items())
        return f"{{{inner}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(override_value(item) for item in value)}]"
    if not isinstance(value, str):
        return repr(value)
    if _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    return _quoted(value)


def _key(key: Any) -> str:
    return key if isinstance(key, str) and _PLAIN.fullmatch(key) else override_value(key)


def _quoted(text: str) -> str:
    # Only backslashes in front of a quote, or at the end, are special in Hydra's quotes.
    text = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", text)
    return "'" + re.sub(r"\\+$", lambda match: match[0] * 2, text) + "'"
