"""A file of seeds is read in all its forms, or refused in one line that names file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress_methods.errors import CompressError
from vllm_compress.operations.teaching.seeds import read_seeds

USER = '{"role": "user", "content": "q"}'


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ('{"prompt": "q"}', "q", None),
        ('{"prompt": "q", "answer": 4}', "q", "4"),
        ('{"prompt": "q", "completion": " a"}', "q", " a"),
        ('{"instruction": "q", "input": "x", "output": "a"}', "q\n\nx", "a"),
        ('{"instruction": "q", "input": "", "answer": null}', "q", None),
        (f'{{"messages": [{USER}]}}', "q", None),
        (f'{{"messages": [{USER}, {{"role": "assistant", "content": "a"}}]}}', "q", "a"),
        (f'{{"messages": [{{"role": "system", "content": "s"}}, {USER}], "answer": 5}}', "q", "5"),
    ],
)
def test_questions_and_answers_come_in_several_forms(
    tmp_path: Path, row: str, question: str, answer: str | None
) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(f"\n{row}\n")
    (seed,) = read_seeds(path).seeds
    assert (seed.question, seed.answer, seed.line) == (question, answer, 2)
    assert seed.messages[-1]["role"] == "user"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\n\n{"prompt": \n', "s.jsonl:3: not JSON"),
        ('{"prompt": "a"}\n{"text": "b"}\n', "s.jsonl:2: found the keys 'text', expected one of"),
        ('{"prompt": 7}\n', "s.jsonl:1: prompt is 7, expected text"),
        ('{"prompt": "a", "instruction": "b"}\n', "prompt and instruction are both a question"),
        ('{"prompt": "a", "answer": "b", "output": "c"}\n', "answer and output are both an answer"),
        ('{"prompt": "a", "answer": [1]}\n', "answer is [1], expected text or a number"),
        ('{"prompt": "a", "answer": true}\n', "answer is True, expected text or a number"),
        ('{"messages": []}\n', "messages is [], expected a list of messages"),
        ('{"messages": ["a"]}\n', "messages[0] is 'a', expected an object with role"),
        ('{"messages": [{"role": "me", "content": "a"}]}\n', "messages[0].role is 'me', expected"),
        ('{"messages": [{"role": "user"}]}\n', "messages[0].content is None, expected text"),
        ('{"messages": [{"role": "system", "content": "a"}]}\n', "messages has no question"),
        ('{"prompt": "\\ud800"}\n', "s.jsonl:1: half a character ('\\ud800')"),
        ("[1]\n", "s.jsonl:1: expected an object, found list"),
        ("\n", "s.jsonl: holds no seed"),
        ('{"prompt": "a"}\n{"prompt": "\xff"}\n', "s.jsonl:2: not UTF-8"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CompressError) as problem:
        read_seeds(path)
    assert said in str(problem.value)


def test_a_question_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text('{"prompt": "a", "answer": 1}\n{"prompt": "b"}\n{"prompt": "a", "answer": 2}\n')
    found = read_seeds(path)
    assert [(seed.line, seed.answer) for seed in found.seeds] == [(1, "1"), (2, None)]
    assert found.repeated == 1
