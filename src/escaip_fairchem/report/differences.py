"""In what the configurations of runs differ."""

from __future__ import annotations

import json
from typing import Any

#: What a run was called, where and when it took place, not what it computed.
PLACES = ("job.metadata", "job.run_dir", "job.run_name", "job.timestamp_id")
# Copies of `job` and of the unit's tasks, which fairchem writes once more.
_COPIES = ("runner.train_eval_unit.job_config", "collate_fn.tasks")


def flat(config: dict[str, Any]) -> dict[str, str]:
    """A configuration as text by dotted keys.

    Entries of a list that have names, such as tasks, are found by them and not by their place, and
    so are callbacks by their class; a list of plain values is one value.

    Args:
        config: As read from canonical_config.yaml.
    """
    found: dict[str, str] = {}
    _flatten("", config, found)
    return found


def differences(configs: list[dict[str, str] | None]) -> dict[str, list[str | None]]:
    """Keys in which configurations differ, with the value in each.

    Args:
        configs: From `flat`; None where there is none.

    Returns:
        By key: a value for each configuration, None where it has no such key. Keys that only say
        where a run took place (`PLACES`) are left out.
    """
    known = [config for config in configs if config is not None]
    keys = dict.fromkeys(key for config in known for key in config)
    return {
        key: [config and config.get(key) for config in configs]
        for key in keys
        if len({config.get(key) for config in known}) > 1 and not _below(key, PLACES)
    }


def _flatten(where: str, value: Any, found: dict[str, str]) -> None:
    if where.endswith(_COPIES):
        return
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            _flatten(f"{where}.{key}".lstrip("."), inner, found)
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        names = [_name(entry, place) for place, entry in enumerate(value)]
        for place, (name, entry) in enumerate(zip(names, value, strict=True)):
            unique = names.count(name) == 1
            _flatten(f"{where}.{name if unique else place}", entry, found)
    else:
        found[where] = _text(value)


def _text(value: Any) -> str:
    """A string as it is, unless it would be taken for something else."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value, default=str)


def _name(entry: Any, place: int) -> str:
    if isinstance(entry, dict) and "name" in entry:
        return str(entry["name"])
    if isinstance(entry, dict) and "_target_" in entry:
        return str(entry["_target_"]).rpartition(".")[2]
    return str(place)


def _below(key: str, places: tuple[str, ...]) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in places)
