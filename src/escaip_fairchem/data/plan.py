"""What a conversion reads: the parts of its inputs, and how each frame is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from escaip_fairchem.data.formats.registry import check_options, find_format
from escaip_fairchem.data.frames import expand_inputs
from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from escaip_fairchem.data.formats.base import Card, Format, Part

#: Of what is stored; a conversion of another version starts anew.
VERSION = 1


@dataclass(frozen=True)
class Reading:
    """How each frame is taken; it goes to the workers.

    Attributes:
        format: The reader's class.
        options: Its options.
        check_units: Judge units by the size of distances and forces.
        split_key: ``info`` key whose values are remembered for the split.
        labelled: Whether frames must have labels.
        strict: Whether the first defect stops the conversion.
    """

    format: type[Format]
    options: dict[str, Any]
    check_units: bool = True
    split_key: str | None = None
    labelled: bool = True
    strict: bool = False

    def reader(self) -> Format:
        """Make the reader."""
        return self.format(**self.options)


@dataclass(frozen=True)
class Plan:
    """The work of a conversion, in the order of its output.

    Attributes:
        reading: How each frame is taken.
        parts: What is read, one part by one worker.
        is_val: Whether the part belongs to official validation files.
        card: What the reader knows of the data.
    """

    reading: Reading
    parts: tuple[Part, ...]
    is_val: tuple[bool, ...]
    card: Card

    @property
    def files(self) -> list[Path]:
        """The input files, each once."""
        found = dict.fromkeys(path for part in self.parts for path in part.paths)
        return list(dict.fromkeys(file for path in found for file in _files_of(path)))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that what is read depends on, as JSON has it."""
        reading = self.reading
        return {
            "version": VERSION,
            "format": reading.format.name,
            "options": {key: repr(value) for key, value in sorted(reading.options.items())},
            "check_units": reading.check_units,
            "split key": reading.split_key,
            "labelled": reading.labelled,
            "parts": [
                [[str(path.resolve()) for path in part.paths], part.start, part.stop, is_val]
                for part, is_val in zip(self.parts, self.is_val, strict=True)
            ],
            "files": {
                str(path.resolve()): [status.st_size, status.st_mtime_ns]
                for path, status in ((path, path.stat()) for path in self.files)
            },
        }


def make_plan(
    inputs: Sequence[str | Path],
    val: Sequence[str | Path] = (),
    *,
    format_name: str | None = None,
    options: dict[str, Any] | None = None,
    check_units: bool = True,
    split_key: str | None = None,
    labelled: bool = True,
    strict: bool = False,
) -> Plan:
    """Find the format of the inputs and share them out.

    Args:
        inputs: Files, glob patterns or folders.
        val: The same of official validation files.
        format_name: Name of the format; found by a look at the inputs by default.
        options: Options of the format.
        check_units: As for `Reading`.
        split_key: As for `Reading`.
        labelled: As for `Reading`.
        strict: As for `Reading`.

    Raises:
        UserError: If an input does not exist or has no known format, or an option is unknown.
    """
    options = dict(options or {})
    paths, val_paths = expand_inputs(inputs), expand_inputs(val)
    _check_once([*paths, *val_paths])
    kind = find_format([*paths, *val_paths], format_name)
    check_options(kind, options)
    if not labelled and "unlabelled" in kind.OPTIONS:
        options["unlabelled"] = True
    reading = Reading(kind, options, check_units, split_key, labelled, strict)
    reader = reading.reader()
    parts = [reader.parts(some) if some else [] for some in (paths, val_paths)]
    if not parts[0]:
        raise UserError(f"input {paths[0]} holds no frames")
    sides = [False] * len(parts[0]) + [True] * len(parts[1])
    return Plan(reading, (*parts[0], *parts[1]), tuple(sides), reader.card([*paths, *val_paths]))


def _check_once(paths: Sequence[Path]) -> None:
    """Refuse an input that is given twice: its frames would be on both sides of the split."""
    known: dict[Path, Path] = {}
    for path in paths:
        first = known.setdefault(path.resolve(), path)
        if first is not path:
            also = f" (as {path})" if path != first else ""
            raise UserError(f"input {first} is given twice{also}; give it once")


def _files_of(path: Path) -> Iterator[Path]:
    """The file itself, or those of a folder."""
    if path.is_dir():
        yield from sorted(file for file in path.rglob("*") if file.is_file())
    else:
        yield path
