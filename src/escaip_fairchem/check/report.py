"""What the checks find: one line each, and numbers for programs."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from escaip_fairchem.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OK, NOTE, WRONG = "ok", "note", "WRONG"


@dataclass(frozen=True)
class Finding:
    """A line of the report.

    Attributes:
        state: ``ok``, ``note`` (look at it) or ``WRONG`` (the run would fail or be useless).
        topic: What it is about.
        text: One line; of a problem, with what to change.
    """

    state: str
    topic: str
    text: str

    def __str__(self) -> str:
        """The line as it is printed."""
        return f"{self.state:<6}{self.topic:<9}{self.text}"


@dataclass
class Report:
    """Findings in the order they were made.

    Attributes:
        show: Called with each finding at once; the later checks take a while.
        findings: All of them.
        values: Numbers by topic, in the units of the report: atoms, bytes, seconds.
    """

    show: Callable[[Finding], None] = lambda finding: None
    findings: list[Finding] = field(default_factory=list)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def problems(self) -> list[Finding]:
        """What must be changed."""
        return [finding for finding in self.findings if finding.state == WRONG]

    def add(self, state: str, topic: str, text: str) -> None:
        """Add a line."""
        finding = Finding(state, topic, text)
        self.findings.append(finding)
        self.show(finding)

    def ok(self, topic: str, text: str) -> None:
        """Add what is as it should be."""
        self.add(OK, topic, text)

    def note(self, topic: str, text: str) -> None:
        """Add what the user should know."""
        self.add(NOTE, topic, text)

    def wrong(self, topic: str, text: str) -> None:
        """Add a problem."""
        self.add(WRONG, topic, text)

    def record(self, topic: str, **values: Any) -> None:
        """Keep numbers."""
        self.values.setdefault(topic, {}).update(values)

    @contextmanager
    def watch(self, topic: str) -> Iterator[None]:
        """Turn an exception into a problem, so that the other checks go on."""
        try:
            yield
        except UserError as error:
            self.wrong(topic, str(error))
        except Exception as error:  # anything that would end the training
            root = _cause(error)
            text = " ".join(str(root).split()) or "no message"
            self.wrong(topic, f"{type(root).__name__}: {text}")

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {
            "ok": not self.problems,
            "findings": [vars(finding) for finding in self.findings],
            **self.values,
        }


def _cause(error: BaseException) -> BaseException:
    """The first of a chain of exceptions; Hydra wraps every one in its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def gib(n_bytes: float) -> str:
    """Bytes as text."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**27 else f"{n_bytes / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds as text."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s"
