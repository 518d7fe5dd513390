"""The order of numbered files."""

from __future__ import annotations

import re


def by_number(text: str) -> list[tuple[int, str]]:
    """Sort key by which file 2 comes before file 10."""
    return [(int(digits or 0), rest) for digits, rest in re.findall(r"(\d*)(\D*)", text)]
