"""The vote does not depend on the order of its samples, and picks no answer that does not lead."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_compress.operations.teaching.voting import final_answer, majority, plain, same_answer

ANSWERS = st.lists(st.sampled_from(["4", "5", "6", "Paris", None]), max_size=9)


@given(ANSWERS, st.randoms())
def test_the_vote_is_a_count_in_any_order(answers: list[str | None], chance: object) -> None:
    won = majority(answers)
    counts = Counter(answer for answer in answers if answer is not None)
    most = max(counts.values(), default=0)
    leading = [answer for answer, count in counts.items() if count == most]
    assert won == (leading[0] if len(leading) == 1 else None)
    shuffled = list(answers)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    assert majority(shuffled) == won


@given(ANSWERS, st.integers(0, 9))
def test_more_of_what_leads_changes_nothing(answers: list[str | None], more: int) -> None:
    won = majority(answers)
    if won is not None:
        assert majority([*answers, *[won] * more]) == won


@given(st.text(max_size=12))
def test_what_is_written_in_two_ways_votes_together(answer: str) -> None:
    assert plain(plain(answer)) == plain(answer) or answer.count(".") > 1
    assert same_answer(answer, f"  **{answer}** ")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Paris.", "**paris**", True),
        ("1,234", "1234", True),
        ("$5$", "5", True),
        ("4", "4.0", False),
        ("-4", "4", False),
        ("a, b", "a b", False),
    ],
)
def test_what_counts_as_the_same(one: str, other: str, same: bool) -> None:
    assert same_answer(one, other) is same


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so\nAnswer: 4", "4"),
        ("Answer: 3? No.\n**Answer:** 4 \nthanks", "4"),
        ("ANSWER:\n`4`", "4"),
        ("so it is 4", None),
        ("Answer:", None),
        ("İ" * 9 + " answer: 4", "4"),
    ],
)
def test_the_last_marked_answer_counts(text: str, answer: str | None) -> None:
    assert final_answer(text, "Answer:") == answer
