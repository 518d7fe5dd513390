"""Element references and scales of a set, as a table and as Hydra group files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from escaip_fairchem.data import store
from escaip_fairchem.data.statistics import LabelStatistics, collect, read_given
from escaip_fairchem.errors import UserError
from escaip_fairchem.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from escaip_fairchem.data.references import References


def converted_folder(inputs: Sequence[str | Path]) -> Path | None:
    """The folder of `escaip convert`, with ``train`` and ``val``, if that is what is named."""
    folder = Path(inputs[0])
    ready = all((folder / part).is_dir() for part in ("train", "val"))
    return folder if len(inputs) == 1 and ready else None


def fit_references(
    inputs: Sequence[str | Path],
    *,
    isolated: str | None = None,
    name: str | None = None,
    out: Path | None = None,
    format_name: str | None = None,
    options: dict[str, Any] | None = None,
    workers: int = 1,
    overwrite: bool = False,
) -> list[str]:
    """Fit references and scales to a set, and write group files.

    Args:
        inputs: A folder of `escaip convert`, whose ``train`` is used, or whatever that reads.
        isolated: Energies that are not fitted, as for `read_given`.
        name: Name of group files to write in the data root.
        out: Another file to write the references to.
        format_name: Name of the format; found by a look at the inputs by default.
        options: Options of the format, such as where labels are.
        workers: Processes.
        overwrite: Whether files that exist may be replaced.

    Returns:
        Lines to print.

    Raises:
        UserError: Whatever is wrong with labels, files or ``isolated``.
    """
    folder = converted_folder(inputs)
    groups = store.data_root() / "configs"
    refs_file = groups / "element_refs" / f"{name}.yaml" if name else None
    dataset_file = groups / "dataset" / f"{name}.yaml" if name and folder else None
    targets = [path for path in (out, refs_file, dataset_file) if path]
    for path in targets:
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists; choose another name or pass --overwrite")
    given = read_given(isolated) if isolated else {}
    found = collect([folder / "train"] if folder else inputs, format_name, options, workers)
    references = found.energies.solve(given)
    comment = f"fitted by escaip references to {found.frames} structures"
    for path in (out, refs_file):
        if path:
            write_whole(path, references_group(references, comment).encode())
    if dataset_file:
        store.write_dataset_group(
            dataset_file,
            label=dataset_label(folder) or name,
            train=str((folder / "train").resolve()),
            val=str((folder / "val").resolve()),
            references=references,
            force_rms=found.forces.rms,
            stress_rms=found.stress.rms if found.with_stress else None,
            comment=comment,
        )
    written = [f"written: {path}" for path in targets]
    return [*table(references), *scales(found, references), *written]


def table(references: References) -> list[str]:
    """One line an element."""
    from ase.data import chemical_symbols

    lines = [f"{'element':<9}{'reference, eV':>18}"]
    for number in references.elements.tolist():
        how = "given" if number in references.given else ""
        how = "not determined alone" if number in references.open else how
        value = f"{references.values[number]:18.8f}"
        lines.append(f"{chemical_symbols[number]:<9}{value}  {how}".rstrip())
    return lines


def scales(found: LabelStatistics, references: References) -> list[str]:
    """What the fit leaves, and the scales of the labels."""
    stress = f"stress rms of {found.with_stress} structures: {found.stress.rms:.6g} eV/A^3"
    return [
        f"{found.frames} structures, {references.describe()}",
        f"energy rms above the references: {references.rms:.6g} eV, "
        f"{found.per_atom.rms(references.values):.6g} eV per atom (normalizer.energy_residual)",
        f"force rms of free atoms: {found.forces.rms:.6g} eV/A (normalizer.rmsd)",
        f"{stress} (normalizer.stress_rmsd)" if found.with_stress else "no stress",
    ]


def references_group(references: References, comment: str) -> str:
    """The text of a group file for ``element_refs=NAME``."""
    lines = ["# @package element_refs", f"# {comment}", "# eV, index = atomic number", "energy:"]
    lines += [f"  {line}" for line in store.energy_lines(references)]
    return "\n".join(lines) + "\n"


def dataset_label(folder: Path) -> str | None:
    """The data set's name in fairchem, as the conversion set it."""
    import yaml

    path = folder / store.DATASET_FILE
    return yaml.safe_load(path.read_text())["dataset"]["name"] if path.is_file() else None
