"""Embeddings by cosine, labels by KL: the right values, and what counts as a text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods.calibration.tokenizer import load_tokenizer
from compress_methods.errors import CalibrationError, CheckpointError
from compress_methods.evaluation.outputs.classes import compare_classes, summarize_classes
from compress_methods.evaluation.outputs.embeddings import cosine, summarize_cosines
from compress_methods.evaluation.outputs.masked import Mask
from compress_methods.evaluation.outputs.pairs import interval, read_pairs, spearman
from compress_methods.evaluation.outputs.pooling import FIRST, LAST, MEAN, pooled, pooling_of
from compress_methods.model.architecture import architecture_of


def test_cosine_is_of_directions() -> None:
    assert cosine(torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0])) == pytest.approx(1)
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])) == pytest.approx(0.5**0.5)
    found = summarize_cosines([1.0, 0.9, 0.8, 0.9])
    assert found.cosine == pytest.approx(0.9)
    low, high = found.intervals["cosine"]
    assert low < 0.9 < high <= 1
    assert 0.8 <= found.cosine_p05 < 0.9


def test_classes_by_text_and_by_token() -> None:
    base, other = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([0.0, 1.0, -1.0])
    p, q = base.softmax(-1), other.softmax(-1)
    expected = float((p * (p / q).log()).sum())
    one = compare_classes(base, other)
    assert (one.kl, one.top1, one.tokens) == (pytest.approx(expected, rel=1e-5), 0, 1)
    tokens = compare_classes(torch.stack([base, base]), torch.stack([base, other]))
    assert (tokens.kl, tokens.top1, tokens.tokens) == (pytest.approx(expected, rel=1e-5), 1, 2)
    found = summarize_classes([one, tokens])
    assert (found.decisions, found.sequences) == (3, 2)
    assert found.kl == pytest.approx(2 * expected / 3, rel=1e-5)
    assert found.top1_agreement == pytest.approx(1 / 3)


def test_one_label_is_a_score_of_yes_against_no() -> None:
    p, q = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    found = compare_classes(torch.tensor([1.0]), torch.tensor([-1.0]))
    assert (found.kl, found.top1) == (pytest.approx(expected, rel=1e-5), 0)


POOLINGS: list[tuple[dict[str, Any], str]] = [
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, FIRST),
    ({"pooling_mode_mean_tokens": True}, MEAN),
    ({"pooling_mode_lasttoken": True}, LAST),
]


@pytest.mark.parametrize(("config", "expected"), POOLINGS)
def test_pooling_is_what_lies_beside_the_weights(
    config: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    bert = architecture_of({"model_type": "bert"})
    assert pooling_of(tmp_path, bert) == FIRST
    assert pooling_of(tmp_path, architecture_of({"model_type": "qwen2"})) == LAST
    write(tmp_path, config)
    assert pooling_of(tmp_path, bert) == expected


def test_a_pooling_that_is_not_known_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"pooling_mode_weightedmean_tokens": True})
    with pytest.raises(CheckpointError, match="pooling is pooling_mode_weightedmean_tokens"):
        pooling_of(tmp_path, architecture_of({"model_type": "bert"}))


def test_pooled() -> None:
    states = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 4.0]])
    assert pooled(states, FIRST).tolist() == [1, 0]
    assert pooled(states, MEAN).tolist() == [3, 2]
    assert pooled(states, LAST).tolist() == [5, 4]


def write(folder: Path, config: dict[str, Any]) -> None:
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "x.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


def test_hidden_places_are_no_special_tokens_and_the_same_again(novels_8m: Path) -> None:
    tokenizer = load_tokenizer(novels_8m)
    with pytest.raises(CalibrationError, match="the tokenizer has no mask token"):
        Mask(tokenizer)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokens = torch.cat([torch.zeros(10, dtype=torch.int64), torch.arange(100, 190)])
    hidden, places = Mask(tokenizer).hide(tokens)
    assert len(places) == 15
    assert int(places.min()) >= 10
    assert (hidden[places] == tokenizer.mask_token_id).all()
    assert int((hidden != tokens).sum()) == 15
    assert torch.equal(Mask(tokenizer).hide(tokens)[1], places)


def test_rank_correlation_is_scipys() -> None:
    from scipy.stats import spearmanr

    a, b = [0.1, 0.4, 0.4, 0.9, -0.3], [1.0, 0.0, 3.0, 5.0, 2.0]
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman(a, [1.0] * 5) == 0
    low, high = interval(0.8, 50)
    assert low < 0.8 < high
    assert math.atanh(high) - math.atanh(low) == pytest.approx(
        2 * 1.959964 * math.sqrt((1 + 0.32) / 47), rel=1e-5
    )


PAIR = {"sentence1": "a", "sentence2": "b"}
BAD: list[tuple[list[dict[str, Any]], str]] = [
    ([{"sentence1": "a"}] * 4, "pairs.jsonl:1: expected texts under sentence1 and sentence2"),
    ([PAIR, {**PAIR, "score": 1}, PAIR, PAIR], "pairs.jsonl:2: expected a score in all lines"),
    ([{**PAIR, "score": True}] * 4, "pairs.jsonl:1: score is True, expected a number"),
    ([PAIR] * 3, "pairs.jsonl: 3 pairs, expected 4 or more"),
]


@pytest.mark.parametrize(("rows", "said"), BAD)
def test_wrong_pairs_are_named(rows: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(CalibrationError, match=said):
        read_pairs(path)
