"""The task that ships: right answers, no question twice, the same ones every time."""

from __future__ import annotations

import pytest

from tests.benchmarks.loss.arithmetic import MARK, NUMBERS, SIGNS, questions


@pytest.mark.parametrize(("steps", "count"), [(1, 132), (2, 1452)])
def test_answers_are_right_and_end_the_steps(steps: int, count: int) -> None:
    found = questions(steps)
    assert len({question.prompt for question in found}) == len(found) == count
    for question in found:
        first, *rest = question.prompt.removeprefix("What is ").removesuffix("?").split()
        values = [NUMBERS.index(first) + 1]
        for sign, number in zip(rest[::2], rest[1::2], strict=True):
            values.append(values[-1] + SIGNS[sign] * (NUMBERS.index(number) + 1))
        assert NUMBERS[values[-1] - 1] == question.answer
        thought, _, answer = question.thought.partition(f". {MARK} ")
        assert answer == question.answer
        ends = [step.rpartition(" is ")[2] for step in thought.split(",")]
        assert ends == [NUMBERS[value - 1] for value in values[1:]]


def test_the_order_comes_from_the_seed() -> None:
    assert questions(2, 1) == questions(2, 1) != questions(2, 2)
