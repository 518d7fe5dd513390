"""What a check of a file found."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """Findings; printed as text, one line each.

    Attributes:
        problems: What makes the file unfit.
        remarks: What a reviewer would look at, and may be right.
        table: Numbers of the splits, side by side.
    """

    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    table: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """All lines, the verdict last."""
        count = len(self.problems)
        verdict = f"{count} problem{'s'[: count != 1]}" if count else "no problem found"
        return "\n".join(
            [
                *self.table,
                *(f"look at: {line}" for line in self.remarks),
                *(f"problem: {line}" for line in self.problems),
                verdict,
            ]
        )
