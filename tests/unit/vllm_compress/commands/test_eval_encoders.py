"""`vllm-compress eval` of models that predict no next token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress_methods import convert
from tests.e2e.support.encoders import make_encoder
from vllm_compress.cli import main

W4 = {"format": "integer", "bits": 4, "group_size": 32}
WORDS = ["a man sleeps", "someone is asleep", "the ship sank", "bread is baked", "he ran away"]


def evaluated(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[dict[str, Any], str]:
    """What --json prints, and the table for people."""
    model = make_encoder(name, folder / "model")
    rules = [{"match": "blocks", "format": "w4"}]
    block = {"formats": {"w4": W4}, "modules": rules, "calibration": {"held_out": 0}}
    convert(model, block, folder / "out", quiet=True)
    arguments = ["eval", str(folder / "out"), "--against", str(model), "--quiet", *options]
    assert main([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert main(arguments) == 0
    return found, capsys.readouterr().out


@pytest.fixture
def text(some_text: Path) -> list[str]:
    return ["--text", str(some_text), "--length", "32", "--tokens", "128"]


@pytest.fixture
def pairs(tmp_path: Path) -> list[str]:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"sentence1": a, "sentence2": b, "score": i * j}
        for i, a in enumerate(WORDS)
        for j, b in enumerate(WORDS[:i])
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return ["--pairs", str(path)]


def test_embeddings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: list[str], pairs: list[str]
) -> None:
    found, table = evaluated("modernbert", tmp_path, capsys, *text, *pairs)
    assert 0.9 < found["cosine_p05"] <= found["cosine"] < 1
    assert found["sequences"] == 4
    assert 0.5 < found["pairs"]["rank_correlation"] < 1
    assert found["pairs"]["pairs"] == 10
    assert -1 < found["pairs"]["spearman"] < 1
    assert "cosine of embeddings" in table
    assert "order by people" in table


def test_labels_and_a_reranker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: list[str], pairs: list[str]
) -> None:
    found, table = evaluated("xlm-roberta-classes", tmp_path, capsys, *text, *pairs)
    assert 0 < found["kl"] < 0.1
    assert found["decisions"] == 4
    assert "KL of the labels" in table
    assert 0.5 < found["pairs"]["rank_correlation"] <= 1


def test_hidden_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: list[str]) -> None:
    model = make_encoder("bert-masked", tmp_path / "model")
    arguments = ["eval", str(model), "--against", str(model), *text, "--quiet"]
    assert main(arguments) == 2
    assert "the tokenizer has no mask token" in capsys.readouterr().err
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(
        json.dumps({**config, "mask_token": "<|endoftext|>"})
    )
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kl"] == 0
    assert found["tokens"] == 4 * 5


def test_what_does_not_apply_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pairs: list[str]
) -> None:
    model = str(make_encoder("bert-classes", tmp_path / "model"))
    capsys.readouterr()
    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"prompt": "a", "choices": ["b", "c"], "answer": 1}) + "\n")
    asked = {
        "3 labels; pairs need one score or embeddings": pairs,
        "not a causal language model, has no next token": ["--tasks", str(questions)],
        "leave out --url": [*pairs, "--url", "http://localhost:1"],
        "expected --text FILE, --tasks FILE, --pairs FILE or several": [],
    }
    for said, options in asked.items():
        assert main(["eval", model, "--against", model, "--quiet", *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
