"""Points of a sweep as rows: their parameters, counted, their data and their last errors."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from escaip_fairchem.errors import UserError
from escaip_fairchem.sweep.points import expand, override
from escaip_fairchem.sweep.spec import load_spec
from escaip_fairchem.sweep.states import look
from escaip_fairchem.sweep.store import load_sweep
from escaip_fairchem.train.summary import SUMMARY_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

#: Overrides that are not part of a variant.
SEED, FRACTION = "seed", "train_fraction"
#: Errors that tables have, in this order.
METRICS = ("val_forces_mae", "val_energy_mae", "val_forces_cosine_similarity")
#: Groups of parameters by their names.
_GROUPS = {
    "attention": r"\.attention\.(qkv|out|\w*scale)\b",
    "messages": r"\.attention\.(pair|edge|message)\.",
    "feed_forward": r"(blocks\.\d+\.(node|edge)_ffn|input_block\.ffn)\.",
    "edge_attributes": r"\.attributes\.",
    "readouts": r"_readout\.",
    "heads": r"^output_heads\.",
}


def count_parameters(config: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of a model by group, without memory for them.

    Args:
        config: Resolved configuration of a training.

    Returns:
        ``parameters`` (all), and those of each group; ``attention`` is the projections of queries,
        keys and values and of the output.
    """
    import torch

    from escaip_fairchem.train.runner import instantiate

    with torch.device("meta"):
        model = instantiate(config["runner"]["train_eval_unit"]["model"])
    counts = dict.fromkeys(("parameters", *_GROUPS), 0)
    for name, weight in model.named_parameters():
        counts["parameters"] += weight.numel()
        group = next((g for g, pattern in _GROUPS.items() if re.search(pattern, name)), None)
        if group is not None:
            counts[group] += weight.numel()
    return counts


def count_points(recipe: Path, sweep_file: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Parameters of the variants of a sweep file, before anything is trained.

    Args:
        recipe: A recipe of fairchem's command.
        sweep_file: The sweep file.
        overrides: For all points.

    Raises:
        UserError: A mistake in a point.
    """
    from escaip_fairchem.sweep.compose import composer

    rows: dict[str, dict[str, Any]] = {}
    with composer(recipe) as compose:
        for point in expand(load_spec(sweep_file), overrides):
            name = variant(point.varied)
            if name not in rows:
                rows[name] = {"variant": name, **count_parameters(compose(point.overrides))}
    return list(rows.values())


def variant(overrides: Mapping[str, Any]) -> str:
    """Overrides in words, without seed and part of the data."""
    kept = {k: v for k, v in overrides.items() if k.lstrip("+~") not in (SEED, FRACTION)}
    return (
        " ".join(
            override(name.lstrip("+~").removeprefix("backbone."), v) for name, v in kept.items()
        )
        or "-"
    )


def finished_points(folder: Path) -> list[dict[str, Any]]:
    """Rows of the points of a sweep that have finished.

    Args:
        folder: Of the sweep.

    Returns:
        Columns: point, variant, seed, fraction, structures (of training), steps, parameters and
        their groups, last errors, and those of the trivial models (``baseline_`` in front).

    Raises:
        UserError: No sweep, or none of its points has finished.
    """
    sweep = load_sweep(folder)
    states = look(sweep)
    done = [state for state in states if state.state == "finished"]
    if not done:
        raise UserError(f"none of the {len(states)} points of {folder} has finished")
    if len(done) < len(states):
        print(f"{len(states) - len(done)} of {len(states)} points have not finished; left out")
    counted: dict[str, dict[str, int]] = {}
    sizes: dict[str, int] = {}
    rows = []
    for state in done:
        overrides = sweep.points[state.name]
        config = yaml.safe_load(sweep.config(state.name).read_text())
        name = variant(overrides)
        if name not in counted:
            counted[name] = count_parameters(config)
        dataset = config["runner"]["train_dataloader"]["dataset"]
        key = json.dumps(dataset, sort_keys=True)
        if key not in sizes:
            sizes[key] = _length(dataset)
        summary = json.loads((sweep.run(state.name) / SUMMARY_NAME).read_text())
        errors = {m: summary["metrics"].get(m, {}) for m in METRICS}
        rows.append(
            {
                "point": state.name,
                "variant": name,
                "seed": config["job"]["seed"],
                "fraction": dataset.get("fraction", 1.0),
                "structures": sizes[key],
                "steps": summary["steps"],
                "atoms_per_s": summary["atoms_per_s"],
                **counted[name],
                **{m: found.get("last") for m, found in errors.items()},
                **{
                    f"baseline_{m}": found["baseline"]
                    for m, found in errors.items()
                    if "baseline" in found
                },
            }
        )
    return rows


def _length(dataset: Mapping[str, Any]) -> int:
    from escaip_fairchem.train.runner import instantiate

    return len(instantiate(dataset))


def require_equal(rows: Iterable[dict[str, Any]], within: float) -> float:
    """Largest difference of the numbers of parameters from the first variant's.

    Args:
        rows: With ``variant`` and ``parameters``.
        within: What is allowed, in percent.

    Returns:
        In percent.

    Raises:
        UserError: A variant has more or fewer.
    """
    rows = list(rows)
    first = rows[0]["parameters"]
    off = {row["variant"]: 100 * (row["parameters"] / first - 1) for row in rows}
    for name, percent in off.items():
        if abs(percent) > within:
            raise UserError(
                f"{name} has {percent:+.1f} % of the {first:,} parameters of {rows[0]['variant']}, "
                f"more than {within:g} %: change its sizes, or allow it by --within"
            )
    return float(np.abs(list(off.values())).max())
