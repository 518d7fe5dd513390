"""Checkpoints that are whole or absent, and can be told from damaged ones."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from fairchem.core.common import distutils
from fairchem.core.components.callbacks import TrainCheckpointCallback
from torch.distributed.checkpoint import CheckpointException

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torchtnt.framework import State

    from escaip_fairchem.train.unit import TrainEvalUnit

MANIFEST = "manifest.json"
PARTIAL, REPLACED, REMOVED = ".partial_", ".replaced_", ".removed_"


class WriteFailed(Exception):
    """A checkpoint could not be written, on all ranks alike; nothing of it is left."""


class CheckpointCallback(TrainCheckpointCallback):
    """Asks the runner for checkpoints: between steps, and at the end.

    Args:
        checkpoint_every_n_steps: Steps between them; None writes none.
        max_saved_checkpoints: How many are kept, besides ``final``.

    Raises:
        UserError: A number is less than 1.
    """

    def __init__(
        self, checkpoint_every_n_steps: int | None, max_saved_checkpoints: int = 2
    ) -> None:
        for name, value in (
            ("checkpoint_every_n_steps", checkpoint_every_n_steps or 1),
            ("max_saved_checkpoints", max_saved_checkpoints),
        ):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, got {value}")
        super().__init__(checkpoint_every_n_steps, max_saved_checkpoints)

    def on_train_step_start(self, state: State, unit: TrainEvalUnit) -> None:
        """Write one if it is due; the runner removes old ones."""
        step = unit.train_progress.num_steps_completed
        if self.checkpoint_every_n_steps and step % self.checkpoint_every_n_steps == 0:
            save, folder = self._checkpoint_hooks()
            save(os.path.join(folder, f"step_{step}"))


def write_checkpoint(
    target: Path, fill: Callable[[Path], None], about: dict[str, Any], keep: int
) -> None:
    """Write a checkpoint under another name, then rename it; all ranks do this together.

    Args:
        target: The checkpoint; one of that name is replaced.
        fill: Writes this rank's part into a folder.
        about: What the manifest says of it: ``step`` and ``epoch``, at least.
        keep: How many checkpoints ``step_N`` stay; older ones are removed once this one is whole,
            as are those of later steps, which training will reach by another way, or damaged ones.

    Raises:
        WriteFailed: It could not be written, for want of space as a rule; tried again with one
            older checkpoint left.
    """
    try:
        _write(target, fill, about)
    except WriteFailed as error:
        if not _together(lambda: distutils.is_master() and _make_room(target.parent))[0]:
            raise
        logging.warning(f"{target}: {error}; older checkpoints were removed to make room")
        _write(target, fill, about)
    if distutils.is_master():
        _prune(target, about["step"], keep)


def _write(target: Path, fill: Callable[[Path], None], about: dict[str, Any]) -> None:
    partial = target.with_name(PARTIAL + target.name)

    def make() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def publish() -> None:
        files = {name: entry for part in parts for name, entry in part.items()}
        text = json.dumps({**about, "files": files}, indent=1)
        (partial / MANIFEST).write_text(text + "\n")
        sync(partial / MANIFEST)
        sync(partial)
        replaced = target.with_name(REPLACED + target.name)
        if target.exists():
            target.replace(replaced)
        partial.replace(target)
        sync(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def fill_and_sum() -> dict[str, list[int]]:
        fill(partial)
        return {path.name: _size_and_sum(path) for path in _files_of_rank(partial)}

    try:
        _together(lambda: make() if distutils.is_master() else None)
        parts = _together(fill_and_sum)
        _together(lambda: publish() if distutils.is_master() else None)
    except BaseException:
        if distutils.is_master():
            clean_up(target.parent)
        raise


def _together(work: Callable[[], Any]) -> list[Any]:
    """Do something on every rank; what each gave, or the same failure on all of them."""
    result, failure, mistake = None, None, None
    try:
        result = work()
    except (Exception, CheckpointException) as error:
        failure = _reason(error)
        if not failure:
            mistake = error if isinstance(error, Exception) else RuntimeError(str(error))
    found = gathered((result, failure, repr(mistake) if mistake else None))
    if mistake is not None:
        raise mistake
    other = next((text for _, _, text in found if text), None)
    if other:
        raise RuntimeError(f"another rank failed: {other}")
    failure = next((reason for _, reason, _ in found if reason), None)
    if failure:
        raise WriteFailed(failure)
    return [part for part, _, _ in found]


def gathered(value: Any) -> list[Any]:
    """A value of every rank, by rank."""
    if distutils.get_world_size() == 1:
        return [value]
    values = [None] * distutils.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _reason(error: BaseException | None) -> str | None:
    """Why writing failed; None if that is not what happened."""
    while error is not None:
        if isinstance(error, CheckpointException):
            reasons = [_reason(failure) for failure, _ in error.failures.values()]
            return next((reason for reason in reasons if reason), None)
        if isinstance(error, OSError):
            return error.strerror or str(error)
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error):
            return "the file could not be written"
        error = error.__cause__ or error.__context__
    return None


def newest_whole(folder: Path) -> Path | None:
    """The checkpoint of the latest step that is whole; others are named in a warning.

    Args:
        folder: Of the checkpoints; it need not exist.
    """
    for path in sorted(checkpoints(folder), key=_order, reverse=True):
        wrong = damage(path)
        if wrong is None:
            return path
        logging.warning(f"checkpoint {path} is damaged ({wrong}) and is left out")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, in no order."""
    found = folder.iterdir() if folder.is_dir() else []
    return [path for path in found if re.fullmatch(r"step_\d+|final", path.name)]


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    if not (path / ".metadata").is_file():
        return "it is not complete"
    if not (path / MANIFEST).exists():
        return None  # written by fairchem, whose metadata come last
    files = manifest(path).get("files")
    if not files:
        return f"{MANIFEST} cannot be read"
    for name, entry in files.items():
        try:
            if (path / name).stat().st_size != entry[0]:
                return f"{name} has another size"
            if _size_and_sum(path / name) != entry:
                return f"{name} was altered"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; empty if it says nothing."""
    try:
        found = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def clean_up(folder: Path) -> None:
    """Remove what an interrupted write or removal left."""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith(REPLACED):
            whole = path.with_name(path.name.removeprefix(REPLACED))
            if not whole.exists():
                path.replace(whole)
                continue
        if path.name.startswith((PARTIAL, REPLACED, REMOVED)):
            shutil.rmtree(path, ignore_errors=True)


def published(path: Path) -> Path:
    """The name that a checkpoint gets once it is whole."""
    return path.with_name(path.name.removeprefix(PARTIAL))


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _order(path: Path) -> tuple[float, bool]:
    step = manifest(path).get("step")
    if step is None:
        # an unreadable `final` stands first, to be named
        step = float("inf") if path.name == "final" else int(path.name.removeprefix("step_"))
    return step, path.name == "final"


def _files_of_rank(folder: Path) -> Iterator[Path]:
    """Files whose sums this rank makes: its own; of the first rank, those of all, too."""
    rank = distutils.get_rank()
    for path in folder.iterdir():
        match = re.match(r"__(\d+)_|rank_(\d+)\.", path.name)
        if (int(match[1] or match[2]) if match else 0) == rank:
            yield path


def _size_and_sum(path: Path) -> list[int]:
    checksum = 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
        return [file.tell(), checksum]


def _prune(newest: Path, step: int, keep: int) -> None:
    others = [path for path in checkpoints(newest.parent) if path != newest]
    later = [path for path in others if step < _order(path)[0] < float("inf")]
    earlier = [path for path in others if path not in later and path.name != "final"]
    kept = keep - (newest.name != "final")
    for path in [*later, *sorted(earlier, key=_order, reverse=True)[kept:]]:
        _remove(path)


def _make_room(folder: Path) -> bool:
    """Remove all but the newest whole checkpoint; whether there were any."""
    best = newest_whole(folder)
    others = [path for path in checkpoints(folder) if path != best] if best else []
    for path in others:
        _remove(path)
    return bool(others)


def _remove(path: Path) -> None:
    """Remove a checkpoint so that no half of it is ever seen."""
    removed = path.with_name(REMOVED + path.name)
    shutil.rmtree(removed, ignore_errors=True)
    path.replace(removed)
    shutil.rmtree(removed, ignore_errors=True)
