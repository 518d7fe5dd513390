"""Composing many points of one recipe, with the result of fairchem's command for each.

fairchem takes 2 s for a point: Hydra reads the group files again, and the search for unused keys
resolves the whole configuration once for each key. Here group files are read once for each choice
of groups, further overrides are applied by Hydra's own function; unused keys are looked for, and
interpolations replaced, by reading, as long as they are simple.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import shutil
import tempfile
from contextlib import contextmanager
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import yaml
from fairchem.core._cli import get_canonical_config
from fairchem.core.launchers.api import ALLOWED_TOP_LEVEL_KEYS, JobConfig
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hydra.core.override_parser.types import Override

# An interpolation of which reading tells the top-level key that it needs, if any.
_SIMPLE = re.compile(r"\$\{(?:(?:oc\.env|now):[^${}]*|(\w+)(?:[.\[][^${}:]*)?)\}")

# One that is the path of a key and no more.
_PATH = re.compile(r"\$\{(\w+(?:\.\w+)*)\}")
_KEPT = set(ALLOWED_TOP_LEVEL_KEYS)


@contextmanager
def composer(recipe: Path) -> Iterator[Composer]:
    """Compose points of a recipe.

    Args:
        recipe: A ``.yml`` or ``.yaml`` file.

    Raises:
        UserError: No such recipe.
    """
    if not recipe.is_file():
        raise UserError(f"no recipe at {recipe}; name one such as configs/oc20/escaip_2m.yml")
    # as fairchem's command: groups beside the recipe are found for .yaml only
    with tempfile.TemporaryDirectory() as scratch:
        folder, name = recipe.resolve().parent, recipe.name
        if recipe.suffix == ".yml":
            folder, name = Path(scratch), f"{recipe.stem}.yaml"
            shutil.copy(recipe, folder / name)
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            yield Composer(name)


class Composer:
    """Composes points; made by `composer`.

    Args:
        name: Of the recipe, in the folder that Hydra was initialised with.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._job = OmegaConf.structured(JobConfig)
        self._parse = cache(OverridesParser.create().parse_override)  # 2 ms each
        self._composed: dict[tuple[str, ...], tuple[DictConfig, set[str]]] = {}

    def __call__(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The resolved configuration of a point, as fairchem stores it.

        Args:
            overrides: As on fairchem's command line.

        Returns:
            Plain values under ``job`` and ``runner`` (and ``reducer``).

        Raises:
            UserError: The overrides do not fit the recipe.
        """
        try:
            return self._canonical(self._compose(overrides))
        except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
            raise UserError(_one_line(error)) from error

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        parsed = [self._parse(text) for text in overrides]
        # the first point says which names are of groups
        if not self._composed:
            self._with_groups(tuple(overrides))
        example = next(iter(self._composed.values()))
        values = [entry for entry in parsed if _sets_a_value(entry, *example)]
        groups = tuple(entry.input_line for entry in parsed if entry not in values)
        config, _ = self._with_groups(groups)
        config = copy.deepcopy(config)
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        return config

    def _with_groups(self, overrides: tuple[str, ...]) -> tuple[DictConfig, set[str]]:
        """Composed by Hydra, once; and the names of the groups chosen from."""
        if overrides not in self._composed:
            config = hydra.compose(self._name, list(overrides), return_hydra_config=True)
            choices = set(config.hydra.runtime.choices)
            OmegaConf.set_struct(config, False)
            del config["hydra"]
            OmegaConf.set_struct(config, True)
            self._composed[overrides] = config, choices
        return self._composed[overrides]

    def _canonical(self, config: DictConfig) -> dict[str, Any]:
        OmegaConf.set_struct(config, False)
        # only this part: merging the whole, as fairchem does, takes as long as resolving it
        config.job = OmegaConf.merge(self._job, config.get("job", {}))
        job = OmegaConf.to_object(config.job)
        job.__post_init__()  # paths and metadata, as fairchem does
        content = OmegaConf.to_container(config, enum_to_str=True)
        content["job"] = _without_enums(dataclasses.asdict(job))
        if not _keys_are_used(content):
            get_canonical_config(copy.deepcopy(config))  # raises if a key is unused
        try:
            return {k: _resolved(content[k], content) for k in content.keys() & _KEPT}
        except (_NotSimpleError, RecursionError):  # OmegaConf knows, and takes 20 times as long
            config.job = job
            content = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
            return {k: content[k] for k in content.keys() & _KEPT}


def _without_enums(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_enums(item) for key, item in value.items()}
    return value.name if isinstance(value, Enum) else value


class _NotSimpleError(Exception):
    """An interpolation that is more than the path of a key."""


def _resolved(value: Any, root: dict[str, Any]) -> Any:
    """A value with its interpolations replaced by what they name."""
    if isinstance(value, dict):
        return {key: _resolved(item, root) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, root) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    path = _PATH.fullmatch(value)
    found = root
    for key in path[1].split(".") if path else ():
        found = found.get(key, _NotSimpleError) if isinstance(found, dict) else _NotSimpleError
    if path is None or found is _NotSimpleError:
        raise _NotSimpleError(value)
    return _resolved(found, root)


def _sets_a_value(override: Override, config: DictConfig, choices: set[str]) -> bool:
    """Whether an override can only set a value: Hydra is asked where it might choose a group."""
    key = override.key_or_group
    if override.is_delete() or override.is_sweep_override() or override.package or "/" in key:
        return False
    if "." in key:  # a group has slashes
        return True
    known = not override.is_add() and not override.is_force_add() and key in config
    return known and key not in choices and not OmegaConf.is_config(config._get_node(key))


def _keys_are_used(content: dict[str, Any]) -> bool:
    """Whether fairchem's search for unused keys would find none, if that can be told by reading.

    A key is used if an interpolation in another key leads to it. Of interpolations that are
    nested, relative or call functions, that cannot be told.
    """
    used: set[str] = set()
    for key, value in content.items():
        for text in _interpolated(value):
            if "${" in _SIMPLE.sub("", text):
                return False
            used.update({match[1] for match in _SIMPLE.finditer(text) if match[1]} - {key})
    return used >= content.keys() - _KEPT


def _interpolated(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _interpolated(item)
    elif isinstance(value, str) and "${" in value:
        yield value


def _one_line(error: BaseException) -> str:
    """The message of an error and of what it was raised from."""
    texts = []
    while error is not None:
        text = " ".join(str(error).split()).partition(" Config search path:")[0]
        if text and not any(text in known for known in texts):
            texts.append(text)
        error = error.__cause__
    return "; ".join(texts)


class _Dumper(yaml.CSafeDumper):
    """Writes what OmegaConf reads: to it, unlike to YAML 1.1, 1e-3 is a number."""


def _represent_string(dumper: _Dumper, text: str) -> yaml.Node:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="'" if _is_number(text) else None
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_Dumper.add_representer(str, _represent_string)


def to_yaml(config: dict[str, Any]) -> str:
    """Text of a resolved configuration, as OmegaConf reads it."""
    return yaml.dump(config, Dumper=_Dumper, sort_keys=False, width=120)
