"""The documentation: every command in it is run or composed, every link leads somewhere.

Calls of `escaip` and `python` are carried out in this process on tiny data; of `fairchem`, the
configuration is composed and, on a CPU, the model built; the quick start's training runs for real.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from docs_helpers import BLOCK, ROOT, blocks, calls, carry_out, quick_start_calls
from escaip_fairchem.config import EScAIPConfig
from escaip_fairchem.data.datasets import PUBLISHED
from escaip_fairchem.reference import MEANINGS, RECIPE_KEYS, markdown, recipe_keys

if TYPE_CHECKING:
    from pathlib import Path

# The tutorial of fine-tuning has a test of its own.
PAGES = [ROOT / "README.md", *sorted({*ROOT.glob("docs/*.md")} - {ROOT / "docs/finetuning.md"})]
REASONS = {"needs the network", "needs a browser", "needs the published files", "takes minutes"}
LANGUAGES = {"bash", "python", "text", "yaml"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(
    page: Path, quick_start: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a copy of the folder where README's quick start was carried out."""
    folder = tmp_path / "work"
    shutil.copytree(quick_start[0], folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ESCAIP_DATA", "data")
    done = quick_start_calls(tmp_path / "bash")
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.code, str(page), "exec"), names)
        elif block.language == "bash" and not block.excuse:
            for call in calls(block.code, tmp_path / "bash"):
                if call not in done:
                    carry_out(call, monkeypatch)


def test_restart_is_the_same_command(tmp_path: Path) -> None:
    """What that does is seen in test_training."""
    _, _, section = (ROOT / "docs" / "training.md").read_text().partition("## Interruptions")
    (_, _, code) = BLOCK.search(section).groups()
    (call,) = calls(code, tmp_path)
    assert call in quick_start_calls(tmp_path)


def test_every_block_is_known() -> None:
    """No code escapes the tests above by its language, its excuse, or its indentation."""
    found = [block for page in PAGES for block in blocks(page)]
    assert {block.language for block in found} <= LANGUAGES
    assert {block.excuse for block in found if block.excuse} <= REASONS
    for page in PAGES:
        text = page.read_text()
        assert text.count("```") == 2 * len(blocks(page))
        assert text.count("not run:") == sum(bool(block.excuse) for block in blocks(page))
        outside = BLOCK.sub("", text)
        assert not re.search(r"^ {4,}(\$ )?(escaip|fairchem|pip|python) ", outside, flags=re.M)


def test_commands_for_published_data_are_those_of_the_error(tmp_path: Path) -> None:
    """Whoever lacks a recipe's data is told the command that the documentation explains."""
    found = set()
    for block in [b for page in ("data", "evaluation") for b in blocks(ROOT / f"docs/{page}.md")]:
        if block.excuse:
            for call in calls(block.code, tmp_path / "bash"):
                found.add(" ".join([call.program, *call.arguments]))
    for name, arguments in PUBLISHED.items():
        assert f"escaip convert {arguments.format(out=f'data/{name}')}" in found
        configs = ROOT / "src/escaip_fairchem/configs"
        if "--unlabelled" in arguments:
            evaluations = [path.read_text() for path in configs.glob("*/evaluation/val.yaml")]
            assert sum(f": {name}/test\n" in text for text in evaluations) == 1
            continue
        groups = [*configs.glob(f"*/dataset/{name}.yaml")]
        (dataset,) = (yaml.safe_load(group.read_text())["dataset"] for group in groups)
        assert (dataset["train"], dataset["val"]) == (f"{name}/train", f"{name}/val")


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text()))
    for link in links:
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for page in sorted(ROOT.glob("docs/*.md")):
        assert page.name == "index.md" or f"({page.name})" in index


def test_configuration_page_is_what_the_code_says() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == markdown(), (
        "run: escaip config-reference > docs/configuration.md"
    )


def test_every_key_has_a_meaning() -> None:
    assert list(MEANINGS) == [field.name for field in dataclasses.fields(EScAIPConfig)]
    assert recipe_keys() <= set(RECIPE_KEYS)
    for recipe in ROOT.glob("configs/*/*.yml"):
        keys = set(re.findall(r"^(\w+):", recipe.read_text(), flags=re.M))
        assert keys - {"hydra", "defaults"} <= set(RECIPE_KEYS), recipe


def test_table_of_keys_against_the_presets() -> None:
    """Some rows by hand."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    for row in (
        "| `cutoff` | float | 12.0 | 6.0 |",
        "| `max_neighbors` | int | 20 | 30 |",
        "| `graph` | knn \\| soft_knn | knn | soft_knn |",
        "| `attention_dropout` | float | 0.1 | 0.0 |",
        "| `frequency_list` | list of int |  | [20, 10, 4, 10, 20] |",
        "| `cluster` | `cpu` | This machine, without a GPU |",
        "| `dataset` of `oc20` | `oc20_2m` |",
        "| `knn_k` | `max_neighbors` |",
    ):
        assert row in text
