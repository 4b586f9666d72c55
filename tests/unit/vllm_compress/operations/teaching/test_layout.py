"""A chat as text keeps each question beside its answer."""

from __future__ import annotations

from vllm_compress.operations.teaching.layout import as_text


def said(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def test_blocks_stand_apart_and_the_question_is_last() -> None:
    assert as_text(said("Q: a\nA:", "b", "Q: c\nA:")) == "Q: a\nA: b\n\nQ: c\nA:"
    assert as_text(said("Q ", "b", "Q")) == "Q b\n\nQ"
    assert as_text(said("Q", " b", "Q")) == "Q b\n\nQ"
    assert as_text([{"role": "system", "content": "s"}, *said("Q")]) == "s\n\nQ"
