"""How far a draft writes ahead, and which drafts are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from compress_methods.errors import CheckpointError, CompressError
from tests.e2e.support.tiny import make_model
from vllm_compress.operations.capacity.throughput.speculation import best_ahead, tokens_per_step
from vllm_compress.operations.draft import Draft, draft_in, make_draft


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
    cost = sizes[0] / sizes[1]
    ahead = best_ahead(0.9, lambda ahead: 1 + ahead * cost)
    assert made.schedule == ((1, ahead),)
    assert ahead > 1
    assert f"writes {ahead} tokens ahead; 90% accepted" in made.line()
    assert make_draft(model, draft, 2, ()) == Draft(
        pair[1], ((1, 2),), 0.9, tokens_per_step(0.9, 2)
    )
    (pair[1] / "report.json").unlink()
    unknown = make_draft(model, draft, None, ())
    assert (unknown.schedule, unknown.acceptance) == (((1, 3),), None)
    assert draft_in(["--port", "1", *unknown.options()]) == [draft]
    assert draft_in(["--speculative-config", '{"method": "ngram"}']) == []


def test_many_requests_may_be_drafted_for_less(pair: tuple[Path, Path]) -> None:
    model, draft = map(str, pair)
    made = make_draft(model, draft, "4,3:2,6:0", ())
    said = json.loads(made.options()[1])
    assert said["num_speculative_tokens"] == 4
    schedule = said["num_speculative_tokens_per_batch_size"]
    assert [entry[::2] for entry in schedule] == [[1, 4], [3, 2], [6, 0]]
    assert [entry[1] for entry in schedule[:2]] == [2, 5]
    assert build_dynamic_sd_schedule_lookup(schedule, 8, 4)[1:] == [4, 4, 2, 2, 2, 0, 0, 0]


def test_what_is_no_draft_is_one_line(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model, draft = map(str, pair)
    with pytest.raises(CheckpointError, match="nowhere is no directory"):
        make_draft(model, "nowhere", None, ())
    with pytest.raises(CompressError, match="--draft-tokens is '0', expected tokens such as 5"):
        make_draft(model, draft, 0, ())
    with pytest.raises(CompressError, match="--draft and --speculative-config say the same"):
        make_draft(model, draft, None, ["speculative-config"])
    other = make_model("Llama", tmp_path / "other", num_hidden_layers=1, vocab_size=300)
    with pytest.raises(CheckpointError, match=r"other has a vocabulary of 300, .*model one of 512"):
        make_draft(model, str(other), None, ())


def test_a_draft_has_the_models_tokens(novels_8m: Path, tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    shutil.copytree(novels_8m, draft)
    assert make_draft(str(novels_8m), str(draft), None, ()).schedule == ((1, 3),)
    file = draft / "tokenizer.json"
    tokens = json.loads(file.read_text())
    vocabulary = tokens["model"]["vocab"]
    first, second, *_ = vocabulary
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokens))
    with pytest.raises(CheckpointError, match=r"draft/tokenizer\.json names other tokens than"):
        make_draft(str(novels_8m), str(draft), None, ())
