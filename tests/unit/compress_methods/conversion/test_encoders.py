"""Conversions of models that predict no next token: what they are judged by, and what they cannot
be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress_methods import convert
from compress_methods.errors import CalibrationError, CompressError, RecipeError
from tests.e2e.support.encoders import make_encoder

W3 = {"format": "integer", "bits": 3, "group_size": 32}
CALIBRATION = {"samples": 32, "length": 64, "held_out": 4}


def recipe(algorithm: str = "gptq", **more: Any) -> dict[str, Any]:
    rules = [{"match": "blocks", "format": "w3", "algorithm": algorithm}]
    return {"formats": {"w3": W3}, "modules": rules, "calibration": CALIBRATION, **more}


@pytest.mark.parametrize(
    ("name", "measure", "best"),
    [("bert", "cosine", 1.0), ("roberta-classes", "kl", 0.0), ("modernbert", "cosine", 1.0),
     ("distilbert", "cosine", 1.0), ("bert-tokens", "kl", 0.0), ("qwen2-model", "cosine", 1.0)],
)  # fmt: skip
def test_gptq_brings_outputs_closer(
    name: str, measure: str, best: float, some_text: Path, tmp_path: Path
) -> None:
    model = make_encoder(name, tmp_path / "model")
    lost = {}
    for algorithm in ("rtn", "gptq"):
        out = tmp_path / algorithm
        report = convert(model, recipe(algorithm), out, calibration=some_text, quiet=True)
        lost[algorithm] = abs(report["held_out"][measure] - best)
        assert "perplexity" not in report["held_out"]
        card = (out / "README.md").read_text()
        assert "perplexity" not in card
        assert ("cosine to the original's embeddings" in card) == (measure == "cosine")
    assert 0 < lost["gptq"] < lost["rtn"] / 2


REFUSED: list[tuple[dict[str, Any], type[CompressError], str]] = [
    ({}, CalibrationError, "BertModel writes no text; give --calibration FILE"),
    ({"accept": {"kl": 0.1}, "calibration": {**CALIBRATION, "held_out": 32}}, RecipeError,
     "accept: judges by the probability of tokens, which BertModel does not give"),
    ({"budget": {"size": "60%"}}, RecipeError, "budget: judges by the probability of tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "kind", "said"), REFUSED)
def test_what_needs_tokens_is_refused(
    more: dict[str, Any], kind: type[CompressError], said: str, tmp_path: Path
) -> None:
    model = make_encoder("bert", tmp_path / "model")
    block = recipe(**more)
    if "budget" in more:
        block["formats"]["w8"] = {"format": "integer", "bits": 8, "group_size": -1}
        block["modules"][0]["format"] = ["w3", "w8"]
    with pytest.raises(kind, match=said):
        convert(model, block, tmp_path / "out", quiet=True)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_what_lies_outside_the_blocks_stays_as_it_is(tmp_path: Path) -> None:
    model = make_encoder("bert-classes", tmp_path / "model")
    block = recipe("rtn")
    block["modules"].append({"match": "embedding", "format": "w3"})
    with pytest.raises(RecipeError, match="keeps all that lies outside the blocks as it is"):
        convert(model, block, tmp_path / "out", quiet=True)
