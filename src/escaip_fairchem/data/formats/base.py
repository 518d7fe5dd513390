"""What a reader of a file format offers to the conversion.

A format splits its files into parts that can be read independently, and reads a part as a stream of
records. A record is decoded only when it is built, so that a resumed conversion passes quickly over
what it has, and a defect costs one record.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from ase import Atoms


@dataclass(frozen=True)
class Part:
    """What one worker reads from start to end; a format may add what it needs by a subclass.

    Attributes:
        paths: The files, first the one that messages name.
        start: First record of a container file that is shared out among parts.
        stop: Record after the last one; None for all.
    """

    paths: tuple[Path, ...]
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Record:
    """One structure that is not decoded yet.

    Attributes:
        index: Position in the file, from 0.
        build: Decodes it: ``ase.Atoms`` with raw labels in a ``SinglePointCalculator`` (energy eV,
            forces eV/A, those on fixed atoms included, stress eV/A^3 of periodic structures in
            ASE's order and sign), tags, ``FixAtoms``, and plain values in ``info``: ``sid`` as
            text, ``fid`` and whatever splits and evaluation need. Raises on a defect; one of the
            user's as `escaip_fairchem.errors.UserError`.
        name: What the file itself calls the record (a key, a path), if that helps to find it.
        id: Identifies the structure in its data set, where the format knows; two records with the
            same id are duplicates.
    """

    index: int
    build: Callable[[], Atoms]
    name: str = ""
    id: str | None = None


@dataclass(frozen=True)
class Card:
    """What a format knows about its data, for ``dataset.json``.

    Attributes:
        data: Name of the published data set, if it is one.
        energy: What energies are relative to.
        theory: Level of theory, as given by its publication or the file.
        units: Unit in the file of each quantity that is converted.
        notes: Anything that a user must know.
    """

    data: str = ""
    energy: str = "as in the source"
    theory: str = "as in the source"
    units: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Format(ABC):
    """A file format.

    Args:
        options: Options of this format by name; a subclass declares what it takes in `OPTIONS`.
    """

    #: Name for ``--format``.
    name: ClassVar[str]
    #: One line for ``--help``.
    summary: ClassVar[str]
    #: Options that the format takes, with their defaults (``--set NAME=VALUE``).
    OPTIONS: ClassVar[dict[str, Any]] = {}

    def __init__(self, **options: Any) -> None:
        """Keep the options; the names were checked against `OPTIONS` before."""
        self.options = {**self.OPTIONS, **options}

    @classmethod
    @abstractmethod
    def claims(cls, path: Path) -> bool:
        """Whether a file or folder is of this format, by its name and a look at its start."""

    @abstractmethod
    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Split the inputs (files or folders that `claims` accepted), always in the same order.

        Raises:
            UserError: If a file that belongs to another one is missing.
        """

    @abstractmethod
    def read(self, part: Part) -> Iterator[Record]:
        """Go through a part in order.

        An exception ends the part: what follows is lost, and reported so.
        """

    def card(self, paths: Sequence[Path]) -> Card:
        """Describe the data, given the same inputs as `parts`."""
        return Card()
