"""Turn labelled structures into a data set that the recipes train on."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from escaip_fairchem.data import publish, store
from escaip_fairchem.data.card import CARD_FILE, write_card
from escaip_fairchem.data.journal import Interrupted, is_published, open_journal
from escaip_fairchem.data.options import Options, SplitOptions
from escaip_fairchem.data.plan import make_plan
from escaip_fairchem.data.pool import run_tasks
from escaip_fairchem.data.summary import Summary, write_group
from escaip_fairchem.data.work import SYSTEM_ERRORS, hash_file, read_part
from escaip_fairchem.errors import UserError

__all__ = ["Options", "SplitOptions", "convert", "convert_files"]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from escaip_fairchem.data.journal import Journal
    from escaip_fairchem.data.plan import Plan


def convert(
    inputs: Sequence[str | Path],
    out: Path,
    *,
    name: str | None = None,
    label: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> tuple[Summary, Path | None]:
    """Convert files into a data set that recipes find by its name.

    Args:
        inputs: Files, glob patterns or folders.
        out: Folder to make, with ``train`` and ``val`` in it.
        name: The data set's name for ``dataset=NAME``; the name of ``out`` by default.
        label: fairchem's name of the data set, stored in checkpoints; ``name`` by default.
        overwrite: Whether an existing ``out`` and group file may be replaced, and an interrupted
            conversion with other options thrown away.
        **options: Fields of `Options`.

    Returns:
        What was written, and the Hydra group file, if frames have labels.

    Raises:
        UserError: If the inputs, as they are, cannot become such a set.
    """
    chosen = Options(**options)
    name = name or out.resolve().name
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"name {name!r}: use letters, digits, '.', '_' and '-' only (--name)")
    group = store.data_root() / "configs" / "dataset" / f"{name}.yaml"
    copies = () if chosen.unlabelled else (group,)
    summary = convert_files(
        inputs, out, label=label or name, overwrite=overwrite, copies=copies, **options
    )
    return summary, copies[0] if copies else None


def convert_files(
    inputs: Sequence[str | Path],
    out: Path,
    *,
    label: str,
    overwrite: bool = False,
    copies: Sequence[Path] = (),
    **options: Any,
) -> Summary:
    """Convert files into a folder with ``train`` and ``val``.

    The files are read once. A run that was killed, or stopped by a full disk, is continued by the
    same call; until the end, all that is written is in the hidden folder ``.NAME.partial`` beside
    ``out``.

    Args:
        inputs: As for `convert`.
        out: Folder to make.
        label: fairchem's name of the data set.
        overwrite: As for `convert`.
        copies: Where to copy ``dataset.yaml`` to.
        **options: As for `convert`.

    Returns:
        What was written.

    Raises:
        UserError: As for `convert`; a subclass if the same call can go on.
    """
    chosen = Options(**options)
    plan = make_plan(
        inputs,
        chosen.val,
        format_name=chosen.format,
        options=chosen.format_options,
        check_units=chosen.check_units,
        split_key=None if chosen.val or chosen.unlabelled else chosen.splitting.key,
        labelled=not chosen.unlabelled,
        strict=chosen.strict,
    )
    fingerprint = plan.fingerprint
    if overwrite:
        store.check_replaceable(out)
    if not overwrite and not is_published(out, fingerprint):  # before the work, not after it
        if out.exists():
            raise UserError(f"{out} exists; choose another folder or pass --overwrite")
        for copy in copies:
            if copy.exists():
                raise UserError(f"{copy} exists; choose another --name or pass --overwrite")
    with _machine_errors(out), open_journal(out, fingerprint, overwrite) as journal:
        if journal.published:  # all that was left is what follows
            summary = Summary.from_json(journal.read("summary"))
        else:
            _read(plan, journal, chosen.workers)
            summary = _publish(plan, journal, label, chosen)
            journal.note("summary", summary.as_json())
            journal.publish()
        for copy in copies:
            store.copy_file(out / store.DATASET_FILE, copy)
    return summary


def _read(plan: Plan, journal: Journal, workers: int) -> None:
    """Read all parts, and take the checksums of the files."""
    hashes = [
        (hash_file, (journal.folder / "files" / f"{number:06d}.json", path))
        for number, path in enumerate(plan.files)
    ]
    parts = [
        (read_part, (journal.part(number), plan.reading, part))
        for number, part in enumerate(plan.parts)
    ]
    with _progress("read", journal.n_records(len(parts))) as report:
        run_tasks([*parts, *hashes], workers, report)


def _publish(plan: Plan, journal: Journal, label: str, options: Options) -> Summary:
    """Put the set together in ``journal.new``."""
    frames = publish.Frames(plan, journal)
    frames.drop_duplicates()
    publish.refuse_nothing(frames)
    if plan.reading.check_units:
        frames.check_scales()
    try:
        masks = _sides(frames, options)
    except UserError as error:
        first = next(frames.rejections(), None)
        if first is None:
            raise
        raise UserError(f"{error} (left out: {first}, ...)") from error
    choice = {"split": options.describe_split(), "files": bool(options.val)}
    folder = publish.fresh_folder(journal, choice)
    with _progress("write", 0, int(frames.kept.sum())) as report:
        sides = {
            name: publish.write_side(folder / name, frames, mask, options.workers, report)
            for name, mask in masks.items()
        }
    out = journal.out.resolve()
    if options.unlabelled:
        summary = Summary(journal.out, n_test=sides["test"].n_frames)
    else:
        summary = write_group(
            folder,
            journal.out,
            sides["train"],
            sides["val"],
            label=label,
            comment=f"written by escaip convert from {len(plan.files)} files, "
            f"{options.describe_split()}",
            paths=(str(out / "train"), str(out / "val")),
        )
    summary.n_rejected, first = publish.write_rejections(folder, frames)
    summary.first_rejected = str(first) if first else ""
    references = summary.references
    write_card(
        folder / CARD_FILE,
        plan,
        label=label,
        files=journal.notes("files"),
        split=options.describe_split(),
        sides=sides,
        references=references,
        residuals={} if references is None else frames.residuals(masks, references.values),
        n_rejected=summary.n_rejected,
        n_duplicates=frames.n_duplicates,
    )
    return summary


def _sides(frames: publish.Frames, options: Options) -> dict[str, np.ndarray]:
    """Which frames go into which folder, (N,) bool each."""
    if options.unlabelled:
        return {"test": frames.kept}
    if options.val:
        masks = {"train": frames.kept & ~frames.in_val_files}
        masks["val"] = frames.kept & frames.in_val_files
        for name, mask in masks.items():
            if not mask.any():
                raise UserError(f"no frame of the {name} files could be used; see `--strict`")
        return masks
    split = options.splitting
    groups = frames.groups() if split.key else np.empty(len(frames.kept))
    in_val = np.zeros(len(frames.kept), dtype=bool)
    in_val[frames.kept] = split.mask(groups[frames.kept])
    return {"train": frames.kept & ~in_val, "val": in_val}


@contextmanager
def _progress(what: str, done: int, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A bar with the rate of frames in a terminal, nothing elsewhere."""
    from tqdm import tqdm

    with tqdm(desc=what, unit=" frames", initial=done, total=total, disable=None) as bar:
        yield bar.update


@contextmanager
def _machine_errors(out: Path) -> Iterator[None]:
    """Say what the user can do about a full disk and the like."""
    try:
        yield
    except (OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno not in SYSTEM_ERRORS:
            raise
        reason = getattr(error, "strerror", None) or "out of memory"
        raise Interrupted(
            f"{reason} ({getattr(error, 'filename', None) or out}): mend that, and run the "
            "same command again; it goes on where it stopped"
        ) from error
