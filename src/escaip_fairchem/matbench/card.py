"""The YAML file of a model in the benchmark's repository, and the files beside it."""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from escaip_fairchem.describe import describe, find_checkpoint
from escaip_fairchem.errors import UserError
from escaip_fairchem.files import whole_file, write_whole
from escaip_fairchem.matbench.check import KINDS, find_artifact
from escaip_fairchem.predict.data import sha256_of
from escaip_fairchem.predict.parts import Plan
from escaip_fairchem.submission.card import training_of

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGES = ("escaip-fairchem", "fairchem-core", "torch", "ase", "pymatgen")
_AUTHOR = re.compile(r"(?P<name>[^<;]+?)\s*(?:<(?P<email>[^>]+)>)?\s*(?:;\s*(?P<affiliation>.+))?")


@dataclass(frozen=True)
class CardOptions:
    """What the checkpoint does not say.

    Attributes:
        name: Of the model.
        authors: ``NAME <EMAIL>; AFFILIATION`` of each; the first needs an email address.
        key: The model's place in the benchmark; made from the name if None.
        family: Folder of the model's family.
        license: Of the code.
        checkpoint_license: Of the weights.
        checkpoint_url: Direct download of the checkpoint.
        repository: Of the code, URL.
        paper: URL.
        doi: URL.
        published: When the paper was, yyyy-mm-dd.
        training_sets: Keys of the benchmark's data/datasets.yml.
        fine_tuned: Whether it began with another training.
        openness: ``OSOD``, ``OSCD``, ``CSOD`` or ``CSCD``: open or closed source, then data.
    """

    name: str
    authors: tuple[str, ...]
    key: str | None = None
    family: str = "escaip"
    license: str = "MIT"
    checkpoint_license: str = "unreleased"
    checkpoint_url: str | None = None
    repository: str | None = None
    paper: str | None = None
    doi: str | None = None
    published: str | None = None
    training_sets: tuple[str, ...] = ("MPtrj",)
    fine_tuned: bool = False
    openness: str = "OSOD"


def write_card(
    checkpoint: Path, results: Path, out: Path, options: CardOptions, schema: Path | None = None
) -> list[str]:
    """Write ``models/FAMILY/KEY.yml``, and copy the two files into ``models/FAMILY/KEY/``.

    Args:
        checkpoint: The one of the relaxations.
        results: Folder that the recipe wrote.
        out: Folder of the tree, such as a clone of the benchmark's repository.
        options: What the checkpoint does not say.
        schema: The benchmark's schema, to validate the YAML against.

    Returns:
        What was written, and what is left to fill in.

    Raises:
        UserError: The relaxations are of another checkpoint, an option is malformed, or the YAML
            does not satisfy the schema.
    """
    path = find_checkpoint(checkpoint)
    plan = Plan.read(results / "results")
    if plan.checkpoint_sha256 != sha256_of(path):
        raise UserError(f"{results} holds relaxations of another checkpoint, {plan.checkpoint}")
    key = options.key or re.sub(r"[^a-z0-9.]+", "-", options.name.lower()).strip("-.")
    if not re.fullmatch(r"[a-z0-9]+(?:[.-][a-z0-9]+)*", key):
        raise UserError(f"--key {key}: lowercase letters and digits, joined by hyphens or dots")
    if not re.fullmatch(r"[a-z0-9]+(?:_[a-z0-9]+)*", options.family):
        raise UserError(f"--family {options.family}: lowercase letters and digits, joined by _")
    model = f"models/{options.family}/{key}"
    copied = {}
    for kind in KINDS:
        source = find_artifact(results, kind)
        copied[kind] = f"{model}/{source.name}"
        with whole_file(out / copied[kind]) as partial:
            shutil.copyfile(source, partial)
    content = _content(describe(path), plan, key, options)
    content["metrics"] = {
        kind: {"pred_file": _reference(out, copied[kind])} for kind in ("geo_opt", "discovery")
    }
    if schema is not None:
        _validate(content, schema)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
    write_whole(out / f"{model}.yml", text)
    lines = [f"wrote {out / model}.yml, {', '.join(copied.values())}"]
    lines += [f"fill in: {name}" for name in _empty(content)]
    lines += ["upload the two files, and fill in: metrics.*.pred_file.url"]
    if schema is None:
        lines.append("not validated: give --schema tests/model-schema.yml of the benchmark")
    return lines


def _content(found: dict[str, Any], plan: Plan, key: str, options: CardOptions) -> dict[str, Any]:
    """All keys but the metrics, in the benchmark's order."""
    conservative = found["forces"] == "conservative"
    has_stress = "stress" in {task["property"] for task in found["tasks"]}
    kind = "_G" if conservative else "_D"
    content = {
        "model_name": options.name,
        "model_key": key,
        "model_version": None,
        "dates": {
            "benchmark_added": f"{datetime.now(UTC):%Y-%m-%d}",
            "paper_published": options.published,
        },
        "lifecycle": "active",
        "authors": [_author(text, first=not n) for n, text in enumerate(options.authors)],
        "repo": options.repository,
        "doi": options.doi,
        "paper": options.paper,
        "pr_url": None,
        "checkpoint_url": options.checkpoint_url,
        "license": {"code": options.license, "checkpoint": options.checkpoint_license},
        "environment": {
            "dependencies": [f"{name}=={version(name).partition('+')[0]}" for name in PACKAGES],
            "python_version": ".".join(platform.python_version_tuple()[:2]),
        },
        "openness": options.openness,
        "architecture_types": ["gnn", "transformer"],
        "train_task": "S2EFS" if has_stress else "S2EF",
        "test_task": "IS2RE-SR",
        "targets": ("EFS" if has_stress else "EF") + kind,
        "training_sets": list(options.training_sets),
        "model_params": found["parameters"],
        "fine_tune": options.fine_tuned,
        "hyperparams": {
            "evaluation": {
                "max_force": plan.settings["fmax"],
                "max_steps": plan.settings["steps"],
                "ase_optimizer": plan.settings["optimizer"],
                "cell_filter": "FrechetCellFilter",
            },
            "architecture": {
                "graph_construction_radius": found["cutoff"],
                "max_neighbors": found["max_neighbors"],
                "n_layers": found["num_layers"],
                "hidden_size": found["hidden_size"],
                "preset": found["preset"],
            },
        },
        "notes": {
            "description": "EScAIP, an attention model on neighbours "
            "(https://arxiv.org/abs/2410.24169), as escaip-fairchem implements it; "
            f"{found['forces']} forces.",
        },
    }
    training = training_of(Path(found["run"]["folder"])) if found["run"] else {}
    if training.get("hours") is not None and training.get("device"):
        entry = {
            "hardware": training["device"],
            "count": training["ranks"],
            "hours_per_device": round(training["hours"], 2),
        }
        content["training_cost"] = {"entries": [entry]}
    return content


def _author(text: str, *, first: bool) -> dict[str, Any]:
    match = _AUTHOR.fullmatch(text.strip())
    if match is None or (first and not match["email"]):
        raise UserError(
            f"--author {text!r}: give 'NAME <EMAIL>; AFFILIATION', the first with EMAIL"
        )
    return {name: value for name, value in match.groupdict().items() if value}


def _reference(out: Path, name: str) -> dict[str, Any]:
    """A file as the YAML refers to it."""
    path = out / name
    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    return {"name": name, "size": path.stat().st_size, "md5": md5}


def _empty(content: dict[str, Any]) -> Iterator[str]:
    for name, value in content.items():
        if value is None:
            yield name
        elif isinstance(value, dict):
            yield from (f"{name}.{inner}" for inner in _empty(value))


def _validate(content: dict[str, Any], schema: Path) -> None:
    """Raise if the benchmark's schema does not accept it."""
    try:
        import jsonschema
    except ImportError:
        raise UserError(
            "--schema needs jsonschema; pip install 'escaip-fairchem[matbench]'"
        ) from None
    try:
        rules = yaml.safe_load(schema.read_text())
        validator = jsonschema.validators.validator_for(rules)(rules)
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--schema {schema}: {error}") from None
    for error in validator.iter_errors(content):
        where = ".".join(map(str, error.absolute_path)) or "the file"
        raise UserError(f"the benchmark's schema refuses {where}: {error.message}")
