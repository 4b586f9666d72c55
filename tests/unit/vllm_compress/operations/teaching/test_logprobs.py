"""Log-probabilities of both endpoints become the same columns."""

from __future__ import annotations

import math

import pytest

from tests.unit.vllm_compress.operations.teaching.openai_server import logprobs
from vllm_compress.operations.teaching.logprobs import read_logprobs


@pytest.mark.parametrize("ids", [True, False])
def test_both_endpoints_give_the_same(ids: bool) -> None:
    chat, text = (
        read_logprobs({"logprobs": logprobs("one two three", 4, chat, ids)})
        for chat in (True, False)
    )
    assert chat == text
    assert chat is not None
    assert chat["ids"] is ids
    assert chat["tokens"] == ([0, 1, 2] if ids else ["one0", "two0", "three0"])
    assert chat["top_logprobs"] == [[-1.0, -2.0, -3.0, -4.0]] * 3
    assert [top[0] for top in chat["top_tokens"]] == chat["tokens"]


def test_the_likeliest_come_first_and_a_text_like_an_id_makes_all_texts() -> None:
    top = [{"token": "token_id:5", "logprob": -9.0}, {"token": "b", "logprob": -0.123456789}]
    entry = {"token": "b", "logprob": -0.123456789, "top_logprobs": top}
    found = read_logprobs({"logprobs": {"content": [entry]}})
    assert found == {
        "ids": False,
        "tokens": ["b"],
        "logprobs": [-0.12346],
        "top_tokens": [["b", "token_id:5"]],
        "top_logprobs": [[-0.12346, -9.0]],
    }


def test_what_is_ruled_out_can_be_written_as_json() -> None:
    top = [{"token": "a", "logprob": 0.0}, {"token": "b", "logprob": -math.inf}]
    found = read_logprobs(
        {"logprobs": {"content": [{"token": "a", "logprob": 0.0, "top_logprobs": top}]}}
    )
    assert found is not None
    assert found["top_logprobs"] == [[0.0, -9999.0]]


@pytest.mark.parametrize("choice", [{}, {"logprobs": None}, {"logprobs": {"content": None}}])
def test_none_are_none(choice: dict[str, object]) -> None:
    assert read_logprobs(choice) is None
