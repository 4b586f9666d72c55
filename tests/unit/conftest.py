"""Fixtures of the tests that start no server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress_methods.evaluate import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(novels_8m: Path) -> Any:
    return load_tokenizer(novels_8m)


@pytest.fixture(scope="module")
def with_bos(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same tokenizer, putting BOS before every text as Llama's does."""
    folder = tmp_path_factory.mktemp("bos")
    for path in novels_8m.glob("*.json"):
        (folder / path.name).write_text(path.read_text())
    block = json.loads((folder / "tokenizer.json").read_text())
    bos = "<|endoftext|>"
    block["post_processor"]["special_tokens"] = {bos: {"id": bos, "ids": [0], "tokens": [bos]}}
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    block["post_processor"]["single"].insert(0, special)
    (folder / "tokenizer.json").write_text(json.dumps(block))
    return load_tokenizer(folder)
