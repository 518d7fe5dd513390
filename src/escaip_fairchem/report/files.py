"""Files of runs, any of which may be damaged: that is noted, and what can be read is kept."""

from __future__ import annotations

import base64
import csv
import io
import json
from typing import TYPE_CHECKING, Any

from escaip_fairchem.train.metrics import number

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

COLORS = 128  # of an embedded figure; a quarter of the bytes, and no difference to be seen
_SHOWN_LINES = 3


def read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object.

    Args:
        path: The file; it need not exist.
        problems: Gets a line if the file is damaged.

    Returns:
        Its content, empty if there is none.
    """
    return _read_dict(path, json.loads, "JSON", problems)


def read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    """A YAML mapping; as `read_json`."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    def parse(text: str) -> Any:
        try:
            return yaml.load(text, loader)
        except yaml.YAMLError as error:
            raise ValueError from error

    return _read_dict(path, parse, "YAML", problems)


def read_rows(path: Path, problems: list[str], required: str, text: str = "") -> list[dict]:
    """Rows of a CSV file.

    Args:
        path: The file; it need not exist.
        problems: Gets a line that names the rows that cannot be read.
        required: Column that each row has.
        text: Column that is not a number.

    Returns:
        The others, without their empty cells, numbers as numbers.
    """
    content = _read(path, problems)
    reader = csv.DictReader(io.StringIO(content or "", newline=""))
    rows, bad = [], []
    try:
        for row in reader:
            try:
                # a row that was cut off has None for the cells that it lacks
                found = {
                    name: str(cell) if name == text and cell else number(cell)
                    for name, cell in row.items()
                    if cell != ""
                }
                rows.append({required: found.pop(required), **found})
            except (ValueError, AttributeError, KeyError):
                bad.append(str(reader.line_num))
    except csv.Error:
        bad.append(str(reader.line_num))
    if bad:
        more = f" and {len(bad) - _SHOWN_LINES} more" if len(bad) > _SHOWN_LINES else ""
        lines = f"line{'s'[: len(bad) > 1]} {', '.join(bad[:_SHOWN_LINES])}{more}"
        problems.append(f"{path}: {lines} cannot be read and left out")
    elif content is not None and required not in (reader.fieldnames or ()):
        problems.append(f"{path} is damaged: it has no column {required}")
    return rows


def read_figure(path: Path, problems: list[str]) -> str | None:
    """A PNG as the address of an image that needs no file.

    Args:
        path: The file; it need not exist.
        problems: Gets a line if the file is damaged.
    """
    from PIL import Image

    if not path.is_file():
        return None
    small = io.BytesIO()
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.convert("RGB").quantize(COLORS).save(small, "PNG", optimize=True)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        problems.append(f"{path} is damaged: no PNG that can be read")
        return None
    return "data:image/png;base64," + base64.b64encode(small.getvalue()).decode()


def _read(path: Path, problems: list[str]) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        problems.append(f"{path} is damaged: no text")
    except OSError as error:
        problems.append(f"{path} cannot be read: {error.strerror}")
    return None


def _read_dict(
    path: Path, parse: Callable[[str], Any], what: str, problems: list[str]
) -> dict[str, Any]:
    text = _read(path, problems)
    if text is None:
        return {}
    try:
        found = parse(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        problems.append(f"{path} is damaged: no {what} object")
        return {}
    return found
