"""What a test set holds is found in runs of words, whatever stands around and between them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_methods.errors import CompressError
from vllm_compress.operations.teaching.overlap import HeldOut, read_held_out
from vllm_compress.operations.teaching.similarity import words

TEXTS = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), max_size=12).map(" ".join)


@given(TEXTS, TEXTS, st.integers(1, 5))
def test_questions_overlap_where_they_share_n_words_in_a_row(one: str, other: str, n: int) -> None:
    held = HeldOut(n)
    held.add(one, True)
    mine, theirs = words(one), words(other)
    runs = [tuple(mine[i : i + n]) for i in range(len(mine) - n + 1)]
    shared = any(tuple(theirs[i : i + n]) in runs for i in range(len(theirs) - n + 1))
    whole = 0 < len(mine) < n and mine == theirs
    assert held.overlaps(other) == (shared or whole)
    assert held.overlaps("zzz", other) == shared


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("h.jsonl", '{"prompt": "What is two plus two?", "answer": 4}\n'),
        ("h.jsonl", '{"messages": [{"role": "user", "content": "What is two plus two?"}]}\n'),
        ("h.jsonl", '{"instruction": "What is two plus two?", "output": "4"}\n'),
        ("h.jsonl", '{"text": "What is two plus two?"}\n'),
        ("h.txt", "What is two\nplus two?"),
    ],
)
def test_a_test_set_is_read_in_every_form(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    held = read_held_out(tmp_path / name, 13)
    assert held.overlaps("what is TWO plus two")
    assert not held.overlaps("what is two plus three")
    assert not held.overlaps("4", "4"), "short answers are those to many questions"


def test_a_broken_test_set_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "h.jsonl").write_text('{"text": "a"}\n{"nothing": 1}\n')
    with pytest.raises(CompressError, match=r"h\.jsonl:2: has neither text nor messages"):
        read_held_out(tmp_path / "h.jsonl", 13)
    for name, said in (("h.csv", "expected .jsonl or .txt"), ("none.txt", "no such file")):
        with pytest.raises(CompressError, match=said):
            read_held_out(tmp_path / name, 13)
