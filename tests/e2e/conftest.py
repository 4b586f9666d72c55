"""What the end-to-end tests share: compressed checkpoints and one engine process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.support.engine import Engine
from tests.e2e.support.tiny import compress

INT4 = {"w4": {"format": "integer", "bits": 4, "group_size": 128}}


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """vLLM, imported once for every test that loads models in a single process."""
    pytest.importorskip("vllm")
    with Engine() as running:
        yield running


@pytest.fixture(scope="session")
def novels_int4(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """novels-8m with 4-bit weights in groups of 128."""
    return compress(novels_8m, tmp_path_factory.mktemp("e2e") / "int4", INT4, {"blocks": "w4"})


@pytest.fixture(scope="session")
def novel_tokens(novels_8m: Path, validation_text: Path) -> list[list[int]]:
    """Eight passages of an unseen novel, 2,048 tokens together."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(novels_8m)
    text = validation_text.read_text(encoding="utf-8")[:40_000]
    ids = tokenizer(text)["input_ids"]
    return [ids[i : i + 256] for i in range(0, 2048, 256)]
