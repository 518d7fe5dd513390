"""A model card for the Hugging Face Hub, of what a checkpoint and its run say of themselves."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escaip_fairchem.describe import describe, find_checkpoint
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

UNKNOWN = "not recorded"
TITLES = {
    "energy_mae": "energy MAE",
    "energy_per_atom_mae": "energy MAE per atom",
    "forces_mae": "force MAE",
    "forces_cosine_similarity": "force cosine",
    "stress_mae": "stress MAE",
    "efwt": "EFwT",
}


@dataclass(frozen=True)
class CardOptions:
    """What only the author knows.

    Attributes:
        name: Of the model.
        license: Of the weights, by its short name on the Hub.
        authors: Who trained it; None leaves it out.
        repository: ``USER/NAME`` on the Hub; None leaves the words.
    """

    name: str
    license: str
    authors: str | None = None
    repository: str | None = None


def write_card(
    checkpoint: Path, metrics: Sequence[Path], out: Path, options: CardOptions
) -> list[str]:
    """Write ``README.md`` and copy the checkpoint into a folder that can be uploaded.

    Args:
        checkpoint: Inference checkpoint, its folder, or the folder of a run.
        metrics: Files ``metrics.json`` of evaluations of this checkpoint.
        out: The folder; made if need be.
        options: What only the author knows.

    Returns:
        Lines for the user: what was written, what is not known, and the command that uploads it.

    Raises:
        UserError: No such checkpoint, or metrics of another one.
    """
    path = find_checkpoint(checkpoint)
    found = describe(path)
    evaluations = [_read_metrics(file, path) for file in metrics]
    training = training_of(Path(found["run"]["folder"])) if found["run"] else {}
    card = _card(found, training, evaluations, options)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy2(path, out / path.name)
    (out / "README.md").write_text(str(card).rstrip() + "\n")
    repository = options.repository or "USER/NAME"
    lines = [f"wrote {out / 'README.md'} and {out / path.name}"]
    if not evaluations:
        lines.append("without metrics: give --metrics metrics.json of an evaluation")
    unknown = [line for line in str(card).splitlines() if UNKNOWN in line]
    lines += [f"fill in or leave out: {line.strip('| ')}" for line in unknown]
    return [*lines, "read it, then upload the folder:", f"  hf upload {repository} {out} ."]


def training_of(run: Path) -> dict[str, Any]:
    """What a run records of its cost: device, ranks, hours, steps; empty without summary.json."""
    path = run / "summary.json"
    if not path.is_file():
        return {}
    summary = json.loads(path.read_text())
    seconds = summary.get("wall_time_s")
    ranks = summary.get("ranks") or 1
    return {
        "device": summary.get("device"),
        "ranks": ranks,
        "hours": seconds / 3600 if seconds is not None else None,
        "device_hours": ranks * seconds / 3600 if seconds is not None else None,
        "steps": summary.get("steps"),
        "epochs": summary.get("epochs"),
        "restarts": _restarts(run),
    }


def _restarts(run: Path) -> int:
    from escaip_fairchem.train.status import read_status

    return read_status(run).restarts


def _read_metrics(file: Path, checkpoint: Path) -> dict[str, Any]:
    from escaip_fairchem.predict.data import sha256_of

    try:
        content = json.loads(file.read_text())
        made_by = content["checkpoint_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is no metrics.json of an evaluation") from None
    if made_by != sha256_of(checkpoint):
        raise UserError(f"{file} holds metrics of another checkpoint, {content['checkpoint']}")
    return content


def _card(
    found: dict[str, Any],
    training: dict[str, Any],
    evaluations: list[dict[str, Any]],
    options: CardOptions,
) -> Any:
    """The card with its front matter, as ``huggingface_hub`` makes it."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    dataset = ", ".join(dict.fromkeys(d for task in found["tasks"] for d in task["datasets"]))
    results = [
        EvalResult(
            task_type="other",
            dataset_type=dataset,
            dataset_name=f"{dataset}, {split}",
            metric_type=name,
            metric_name=f"{_title(name)}{', ' if entry['unit'] else ''}{entry['unit']}",
            metric_value=entry["value"],
        )
        for evaluation in evaluations
        for split, content in evaluation["splits"].items()
        for name, entry in content["metrics"].items()
        if entry["value"] is not None
    ]
    data = ModelCardData(
        license=options.license,
        library_name="fairchem",
        tags=["chemistry", "materials", "interatomic potential", "EScAIP"],
        model_name=options.name,
        eval_results=results or None,
    )
    sections = [
        f"# {options.name}",
        _introduction(found, options),
        "## Model\n\n" + _table(_model_rows(found)),
        "## Training\n\n" + _table(_training_rows(found, training)),
        *(_metrics_section(evaluation) for evaluation in evaluations),
        "## How to use\n\n" + _usage(options, found),
        "## Limits\n\n" + _limits(found),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections))


def _title(name: str) -> str:
    return TITLES.get(name, name.replace("_", " "))


def _table(rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {UNKNOWN if value is None else value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _introduction(found: dict[str, Any], options: CardOptions) -> str:
    by = f" by {options.authors}" if options.authors else ""
    return (
        f"An EScAIP interatomic potential, trained{by} with escaip-fairchem and fairchem-core. "
        f"Licence of the weights: {options.license}."
    )


def _model_rows(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "parameters": f"{found['parameters']:,}",
        "preset": found["preset"],
        "hidden size, layers, heads": f"{found['hidden_size']}, {found['num_layers']}, "
        f"{found['num_heads']}",
        "neighbours": f"{found['max_neighbors']} within {found['cutoff']:g} A",
        "forces": found["forces"],
        "predicts": ", ".join(f"{t['property']} ({t['unit']})" for t in found["tasks"]),
    }


def _training_rows(found: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    run = found["run"] or {}
    hours = training.get("device_hours")
    steps = training.get("steps")
    rows = {
        "data": "; ".join(f"{split}: {_places(src)}" for split, src in run.get("data", {}).items())
        or None,
        "steps": f"{steps:,} ({training['epochs']:g} epochs)" if steps is not None else None,
        "hardware": f"{training['ranks']} x {training['device']}" if training else None,
        "hardware hours": f"{hours:.2f} ({training['ranks']} x {training['hours']:.2f} h)"
        if hours is not None
        else None,
    }
    if training.get("restarts"):
        rows["restarts"] = training["restarts"]
    versions = run.get("versions")
    rows["versions"] = ", ".join(f"{k} {v}" for k, v in versions.items()) if versions else None
    return rows


def _places(sources: str | Sequence[str]) -> str:
    """The ends of paths, which name the data but not the machine."""
    paths = [sources] if isinstance(sources, str) else sources
    return ", ".join("/".join(Path(path).parts[-2:]) for path in paths)


def _metrics_section(evaluation: dict[str, Any]) -> str:
    splits = evaluation["splits"]
    names = dict.fromkeys(name for content in splits.values() for name in content["metrics"])
    lines = [
        f"| metric (forces: {evaluation['forces_on']}) | unit | " + " | ".join(splits) + " |",
        "|---|---|" + "---|" * len(splits),
    ]
    for name in names:
        entries = [content["metrics"].get(name) for content in splits.values()]
        unit = next(entry["unit"] for entry in entries if entry)
        values = [
            "" if not entry or entry["value"] is None else f"{entry['value']:.4g}"
            for entry in entries
        ]
        lines.append(f"| {_title(name)} | {unit} | " + " | ".join(values) + " |")
    counts = ", ".join(
        f"{split} {content['counts']['structures']:,}" for split, content in splits.items()
    )
    return "\n".join(["## Metrics", "", *lines, "", f"Structures: {counts}."])


def _usage(options: CardOptions, found: dict[str, Any]) -> str:
    repository = options.repository or "USER/NAME"
    name = Path(found["checkpoint"]).name
    datasets = {dataset for task in found["tasks"] for dataset in task["datasets"]}
    task = "" if len(datasets) == 1 else f", task={sorted(datasets)[0]!r}"
    lines = [
        "```bash",
        "pip install escaip-fairchem",
        f"hf download {repository} {name} --local-dir .",
        "```",
        "",
        "```python",
        "from escaip_fairchem import calculator",
        "",
        f'atoms.calc = calculator("{name}"{task})',
        "print(atoms.get_potential_energy())  # eV",
        "```",
    ]
    return "\n".join(lines)


def _limits(found: dict[str, Any]) -> str:
    """What the kind of model forbids; the author adds the rest."""
    from ase.data import chemical_symbols

    numbers = sorted({number for task in found["tasks"] for number in task["references"]})
    elements = [chemical_symbols[number] for number in numbers if number < len(chemical_symbols)]
    lines = [
        "- Elements with a reference energy: " + " ".join(elements) + "."
        if elements
        else "- Energies are as labelled (adsorption or formation energies), without references."
    ]
    if found["forces"].startswith("direct"):
        lines.append("- Forces are predicted, not the gradient of the energy: energy is not kept.")
    if not found["smooth"]:
        lines.append("- The energy jumps where neighbours come and go (`smooth: false`).")
    return "\n".join(lines)
