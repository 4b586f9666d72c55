"""A task that a model of a few million parameters can learn: sums in words, of one step or two.

    What is nine less four? nine less four is five. Answer: five
    What is two and five less three? two and five is seven, seven less three is four. Answer: four

Every number on the way is one of `NUMBERS`. The same seed gives the same questions in the same
order, those asked in tests first, and no question twice.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

NUMBERS = (
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve"),
)
SIGNS = {"and": 1, "less": -1}
MARK = "Answer:"


@dataclass(frozen=True)
class Question:
    """`thought` holds the steps and ends with the marked `answer`."""

    prompt: str
    thought: str
    answer: str


def questions(steps: int, seed: int = 0) -> list[Question]:
    """All there are of so many steps, in an order drawn from the seed."""
    found = list(_all(steps))
    random.Random(f"{seed}/{steps}").shuffle(found)
    return found


def _all(steps: int) -> Iterator[Question]:
    for first, *rest in itertools.product(range(1, len(NUMBERS) + 1), repeat=steps + 1):
        for signs in itertools.product(SIGNS, repeat=steps):
            value, asked, said = first, word(first), []
            for sign, number in zip(signs, rest, strict=True):
                before, value = value, value + SIGNS[sign] * number
                if not 1 <= value <= len(NUMBERS):
                    break
                asked += f" {sign} {word(number)}"
                said.append(f"{word(before)} {sign} {word(number)} is {word(value)}")
            else:
                answer = word(value)
                thought = f" {', '.join(said)}. {MARK} {answer}"
                yield Question(f"What is {asked}?", thought, answer)


def word(number: int) -> str:
    return NUMBERS[number - 1]


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
