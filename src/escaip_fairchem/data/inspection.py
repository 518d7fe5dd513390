"""The whole of `escaip inspect`: read, report, draw, compare with a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.data.groups import converted_folder
from escaip_fairchem.data.inspect_plot import draw
from escaip_fairchem.data.limits import judge, read_limits
from escaip_fairchem.data.references import NUM_REFERENCES
from escaip_fairchem.data.report import Inspection
from escaip_fairchem.data.store import DATASET_FILE
from escaip_fairchem.data.survey import gather

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from escaip_fairchem.data.limits import Limits
    from escaip_fairchem.data.survey import Facts


def inspect_data(
    inputs: Sequence[str | Path],
    *,
    plot: Path,
    recipe: Sequence[str] | None = None,
    sample: int = 0,
    cutoff: float = 6.0,
    max_neighbors: int = 30,
    format_name: str | None = None,
    options: dict[str, Any] | None = None,
    workers: int = 1,
) -> Iterator[str]:
    """Report what is in a set, and draw it.

    Args:
        inputs: A folder of `escaip convert`, or whatever that reads.
        plot: The PNG to write.
        recipe: A recipe to compare with, and overrides of it.
        sample: Look at about so many structures; 0 looks at all.
        cutoff: Within which neighbours are counted, A, without a recipe.
        max_neighbors: Neighbours that a model keeps, without a recipe.
        format_name: Name of the format; found by a look at the inputs by default.
        options: Options of the format, such as where labels are.
        workers: Processes.

    Yields:
        Lines.

    Raises:
        UserError: Files that cannot be read, or a recipe that cannot be composed.
    """
    folder = converted_folder(inputs)
    limits = _limits(recipe, folder) if recipe else None
    parts = {name: [folder / name] for name in ("train", "val")} if folder else {"": inputs}
    facts = gather(
        parts,
        cutoff=limits.cutoff if limits else cutoff,
        use_pbc=limits.use_pbc if limits else True,
        format_name=format_name,
        options=options,
        sample=sample,
        workers=workers,
    )
    references, origin = _references(facts, folder, limits)
    found = Inspection(
        facts,
        references,
        origin,
        limits.cutoff if limits else cutoff,
        limits.max_neighbors if limits else max_neighbors,
    )
    yield from found.lines()
    if limits:
        yield f"does it fit {' '.join(recipe)}?"
        above = found.residual * facts.natoms
        known = above[np.isfinite(above)]
        rms = float(np.sqrt(np.mean(np.square(known)))) if len(known) else float("nan")
        for line in judge(facts, limits, found.cut()[1], rms):
            yield f"  {line}"
    title = str(folder or inputs[0])
    yield f"figure: {draw(found, plot, title)}"


def _limits(recipe: Sequence[str], folder: Path | None) -> Limits:
    """What a recipe assumes, with the references and scales of the folder unless it names data."""
    import yaml

    overrides = list(recipe[1:])
    named = any(word.startswith("dataset=") for word in overrides)
    if folder and not named and (folder / DATASET_FILE).is_file():
        group = yaml.safe_load((folder / DATASET_FILE).read_text())
        scales = [f"++normalizer.{name}={value}" for name, value in group["normalizer"].items()]
        references = f"++element_refs.energy={group['element_refs']['energy']}"
        overrides = [references, *scales, *overrides]
    return read_limits(Path(recipe[0]), overrides)


def _references(facts: Facts, folder: Path | None, limits: Limits | None) -> tuple[np.ndarray, str]:
    """Element references, eV, (120,): of the recipe, of the folder, or fitted."""
    import yaml

    if limits:
        values = limits.references[:NUM_REFERENCES]
        return np.pad(values, (0, NUM_REFERENCES - len(values))), "of the recipe"
    if folder and (folder / DATASET_FILE).is_file():
        group = yaml.safe_load((folder / DATASET_FILE).read_text())
        return np.array(group["element_refs"]["energy"]), f"of {DATASET_FILE}"
    if not np.isfinite(facts.energy).any():
        return np.zeros(NUM_REFERENCES), "none"
    return facts.fit().solve().values, "fitted here"
