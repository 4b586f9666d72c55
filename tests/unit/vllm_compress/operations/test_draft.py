"""How far a draft writes ahead, and which drafts are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from compress_methods.errors import CheckpointError, CompressError
from tests.e2e.support.tiny import make_model
from vllm_compress.operations.draft import (
    Draft,
    best_ahead,
    draft_in,
    make_draft,
    tokens_per_step,
)


def test_expected_tokens_are_those_of_guesses_that_fail_at_random() -> None:
    draw = np.random.default_rng(0)
    for acceptance, ahead in ((0.3, 2), (0.8, 4)):
        right = draw.random((200_000, ahead)) < acceptance
        said = 1 + np.cumprod(right, axis=1).sum(1).mean()
        assert tokens_per_step(acceptance, ahead) == pytest.approx(said, rel=0.01)
    assert tokens_per_step(1.0, 3) == 4


def test_better_and_cheaper_drafts_write_further_ahead() -> None:
    assert best_ahead(0.94, 0.25) > best_ahead(0.7, 0.25) > best_ahead(0.7, 0.9)
    assert best_ahead(0.1, 0.9) == 1


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and a draft that is half as large and was measured."""
    model = make_model("Llama", tmp_path / "model", num_hidden_layers=4)
    draft = make_model("Llama", tmp_path / "draft", num_hidden_layers=1)
    (draft / "report.json").write_text(json.dumps({"held_out": {"acceptance": 0.9}}))
    return model, draft


def test_what_was_measured_decides(pair: tuple[Path, Path]) -> None:
    model, draft = map(str, pair)
    made = make_draft(model, draft, None, ())
    assert made.acceptance == 0.9
    sizes = [(Path(p) / "model.safetensors").stat().st_size for p in (draft, model)]
    assert made.ahead == best_ahead(0.9, sizes[0] / sizes[1]) > 1
    assert f"writes {made.ahead} tokens ahead; 90% accepted" in made.line()
    assert make_draft(model, draft, 2, ()) == Draft(pair[1], 2, 0.9, tokens_per_step(0.9, 2))
    (pair[1] / "report.json").unlink()
    unknown = make_draft(model, draft, None, ())
    assert (unknown.ahead, unknown.acceptance) == (3, None)
    assert draft_in(["--port", "1", *unknown.options()]) == [draft]
    assert draft_in(["--speculative-config", '{"method": "ngram"}']) == []


def test_what_is_no_draft_is_one_line(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model, draft = map(str, pair)
    with pytest.raises(CheckpointError, match="nowhere is no directory"):
        make_draft(model, "nowhere", None, ())
    with pytest.raises(CompressError, match="--draft-tokens is 0, expected a number from 1"):
        make_draft(model, draft, 0, ())
    with pytest.raises(CompressError, match="--draft and --speculative-config say the same"):
        make_draft(model, draft, None, ["speculative-config"])
    other = make_model("Llama", tmp_path / "other", num_hidden_layers=1, vocab_size=300)
    with pytest.raises(CheckpointError, match=r"other has a vocabulary of 300, .*model one of 512"):
        make_draft(model, str(other), None, ())


def test_a_draft_has_the_models_tokens(novels_8m: Path, tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    shutil.copytree(novels_8m, draft)
    assert make_draft(str(novels_8m), str(draft), None, ()).ahead == 3
    file = draft / "tokenizer.json"
    tokens = json.loads(file.read_text())
    vocabulary = tokens["model"]["vocab"]
    first, second, *_ = vocabulary
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokens))
    with pytest.raises(CheckpointError, match=r"draft/tokenizer\.json names other tokens than"):
        make_draft(str(novels_8m), str(draft), None, ())
