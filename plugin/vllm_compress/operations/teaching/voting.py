"""The final answer of a text, and the one that most of several texts agree on.

Self-consistency (Wang et al., ICLR 2023, arXiv:2203.11171): of several rationales, sampled
independently, the answer that most of them end with is likelier to be right than any one's.

Fails where: answers are free text, of which no two are alike.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

ORNAMENT = "*_`$\"' \t"
"""What surrounds an answer and is no part of it: marks of emphasis, code, mathematics, quotes."""


def final_answer(text: str, mark: str) -> str | None:
    """What follows the last `mark` on its line, upper or lower case; None where there is none."""
    places = [found.end() for found in re.finditer(re.escape(mark), text, re.IGNORECASE)]
    if not places:
        return None
    rest = text[places[-1] :].lstrip(ORNAMENT + "\n")
    line = rest.splitlines()[0] if rest else ""
    return line.strip(ORNAMENT) or None


def plain(answer: str) -> str:
    """An answer without what does not count when two are compared: spaces, case, a full stop at
    the end, ornament, commas between digits."""
    words = " ".join(answer.split()).strip(ORNAMENT).removesuffix(".").strip(ORNAMENT)
    if words.replace(",", "").replace(".", "", 1).lstrip("-").isdecimal():
        words = words.replace(",", "")
    return words.casefold()


def same_answer(one: str, other: str) -> bool:
    """Tell whether two answers are the same."""
    return plain(one) == plain(other)


def majority(answers: Sequence[str | None]) -> str | None:
    """The answer, as its first sample writes it, that more samples gave than any other; None where
    two lead, or none has an answer."""
    votes = Counter(plain(answer) for answer in answers if answer is not None)
    leading = votes.most_common(2)
    if not leading or (len(leading) == 2 and leading[0][1] == leading[1][1]):
        return None
    won = leading[0][0]
    return next(answer for answer in answers if answer is not None and plain(answer) == won)
