"""What `teach` refuses before any server is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.vllm_compress.operations.teaching.conftest import Teach

NOWHERE = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("style", "option", "value", "said"),
    [
        ("icl", "--demonstrations", "0", "--demonstrations is 0, expected a number from 1"),
        ("icl", "--demonstrations", "20", "20 seeds with an answer, expected 21"),
        ("icl", "--samples", "3", "--samples is for cot, found --style icl"),
        ("cot", "--samples", "0", "--samples is 0, expected a number from 1"),
        ("cot", "--mark", " ", "--mark is ' ', expected text"),
        ("cot", "--check", "none.py:f", "none.py: no such file"),
        ("instruct", "--check", "exact", "--check is for icl and cot, found --style instruct"),
        ("instruct", "--count", "-1", "--count is -1, expected a number from 1"),
        ("cot", "--temperature", "nan", "--temperature is nan, expected 0 to 2"),
        ("cot", "--rate", "0", "--rate is 0.0, expected a number above 0"),
        ("cot", "--price-in", "-1", "--price-in is -1.0, expected a number from 0"),
        ("cot", "--parallel", "0", "--parallel is 0, expected a number from 1"),
        ("cot", "--stop", "", "--stop is ('',), expected text"),
        ("cot", "--logprobs", "-1", "--logprobs is -1, expected a number from 0"),
        ("cot", "--held-out", "none.txt", "none.txt: no such file"),
        ("cot", "--seeds", "none.jsonl", "none.jsonl: no such file"),
        ("cot", "-o", "data.json", "data.json: ends in '.json', expected .jsonl"),
        ("cot", "-o", "no/data.jsonl", "no: no such directory to write to"),
    ],
)
def test_options_are_checked_before_any_server_is_asked(
    teach: Teach, style: str, option: str, value: str, said: str
) -> None:
    assert said in teach.fails(NOWHERE, style, option, value)
    assert not teach.journal.parent.exists()


def test_a_seed_without_an_answer_is_named(teach: Teach) -> None:
    teach.seeds.write_text('{"prompt": "a", "answer": 1}\n{"prompt": "b"}\n')
    for style in ("cot", "icl"):
        said = teach.fails(NOWHERE, style, "--check", "exact")
        assert "seeds.jsonl:2: has no answer to check by" in said


def test_a_password_in_the_url_is_refused_and_not_said(teach: Teach) -> None:
    said = teach.fails("http://me:secret@127.0.0.1:9", "cot")
    assert "expected the key in VLLM_API_KEY" in said
    assert "secret" not in said
    assert not teach.journal.parent.exists()


def test_chats_are_not_plain_text(teach: Teach) -> None:
    row = {"messages": [{"role": "user", "content": "a"}], "answer": 1}
    teach.seeds.write_text(json.dumps(row) + "\n")
    said = teach.fails(NOWHERE, "cot", "--completions")
    assert "seeds.jsonl:1: found messages, expected prompt or instruction" in said


def test_a_directory_in_place_of_the_data_is_named(teach: Teach, tmp_path: Path) -> None:
    teach.out.mkdir()
    assert "data.jsonl: is a directory" in teach.fails(NOWHERE, "cot")
