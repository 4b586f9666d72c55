"""The documents' figures are those that the benchmarks have kept, and what they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from compress_methods.recipe.stages import load_staged
from tests.benchmarks.readme import (
    BLOCK,
    DOCUMENTS,
    PICTURE,
    README,
    RESULTS,
    SEVERAL,
    filled,
    picture,
)
from vllm_compress.cli import COMMANDS
from vllm_compress.metrics.deployment import VARIABLES

REPOSITORY = README.parent
RECIPES = REPOSITORY / "configs" / "README.md"
FIGURE = re.compile(r"\d\.\d|\d ?%|\dx\b|\d (ms|s|GB|MB)\b")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)")
READ_IN_FIVE_MINUTES = 220
SETUP = {"VLLM_COMPRESS_DEVICE"}
"""What `deploy/setup.sh` reads and no server."""


def relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_tables_are_those_of_the_results(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert BLOCK.search(text)
    assert filled(text) == text


def test_picture_has_the_figures_of_the_results() -> None:
    assert PICTURE.read_text(encoding="utf-8") == picture()
    assert relative(PICTURE) in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_no_table_has_figures_that_no_benchmark_keeps(document: Path) -> None:
    lines = BLOCK.sub("", document.read_text(encoding="utf-8")).splitlines()
    cells = [line for line in lines if line.startswith("|")]
    assert not [line for line in cells if FIGURE.search(line)]


def test_every_result_is_in_the_document_beside_it() -> None:
    said = (RESULTS / "README.md").read_text(encoding="utf-8")
    shown = [found[2] for found in BLOCK.finditer(said)]
    parts = {part for name in shown for part in SEVERAL.get(name, (name,))}
    assert parts == {path.stem for path in RESULTS.glob("*.json")}


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= READ_IN_FIVE_MINUTES


@pytest.mark.parametrize("document", [*DOCUMENTS, RECIPES], ids=relative)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for path, anchor in LINK.findall(text):
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), path
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor[1:] in {title.lower().replace(" ", "-") for title in titles}, anchor


def test_readme_names_every_command_and_no_other() -> None:
    text = README.read_text(encoding="utf-8")
    named = re.findall(r"(?:^|`)vllm-compress ([a-z][a-z-]*)", text, re.MULTILINE)
    prose = {"is", "converts"}
    assert set(named) - prose == set(COMMANDS)


def test_variables_of_the_readme_are_those_that_vllm_is_told_of() -> None:
    named = set(re.findall(r"\bVLLM_COMPRESS_\w+", README.read_text(encoding="utf-8")))
    assert named - SETUP <= set(VARIABLES)


@pytest.mark.parametrize(("document", "count"), [(README, 1), (RECIPES, 9)])
def test_recipes_of_the_documents_are_valid(document: Path, count: int) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == count
    for block in blocks:
        load_staged(yaml.safe_load(block))
