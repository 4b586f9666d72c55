"""Regular expressions that others wrote, matched in a time that they cannot choose.

Python's `re` goes back and tries again, which takes for ever for patterns such as `(a+)+`. Those
with more than two places to go back to are followed by all their states at once instead (Thompson
1968), which gives the same answer for a whole text.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from compress_methods.errors import CompressError

# Private names, but the only parser of this syntax; they are what `re` itself compiles from.
from re import _constants as ops  # type: ignore[attr-defined] # isort: skip
from re import _parser as parser  # type: ignore[attr-defined] # isort: skip

MAX_LENGTH, MAX_STATES, MAX_CHOICES = 1000, 5000, 2
Test = Callable[[str, int], bool]
"""Of a text and a place in it."""


class PatternError(CompressError):
    """A regular expression that is none, or that cannot be followed in bounded time."""


def matches_whole(pattern: str, text: str) -> bool:
    """Whether a regular expression matches all of a text; raises `PatternError`."""
    return compile_pattern(pattern)(text)


@functools.lru_cache(1024)
def compile_pattern(pattern: str) -> Callable[[str], bool]:
    """A test of whole texts; raises `PatternError`."""
    if len(pattern) > MAX_LENGTH:
        raise PatternError(f"{len(pattern)} characters, expected at most {MAX_LENGTH}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = parser.parse(pattern)
            if _choices(tree) <= MAX_CHOICES:
                compiled = re.compile(pattern)
                return lambda text: compiled.fullmatch(text) is not None
        return _Machine(tree, tree.state.flags).matches
    except re.error as problem:
        raise PatternError(str(problem)) from problem
    except (RecursionError, OverflowError) as problem:
        raise PatternError("nested too deep, or a number too large") from problem


def _choices(tree: Any) -> float:
    """Places where a match could go another way; infinite where one lies in a repetition."""
    count: float = 0
    for op, value in tree:
        if op is ops.BRANCH:
            count += 1 + sum(map(_choices, value[1]))
        elif op in (ops.MAX_REPEAT, ops.MIN_REPEAT, ops.POSSESSIVE_REPEAT):
            least, most, body = value
            inside = _choices(body)
            count += (least != most) + (
                inside * (float("inf") if most != 1 else 1) if inside else 0
            )
            if most not in (1, ops.MAXREPEAT) and most > MAX_STATES:
                count = float("inf")
        elif op is ops.SUBPATTERN:
            count += _choices(value[3])
        elif op in (ops.ASSERT, ops.ASSERT_NOT):
            count += _choices(value[1])
        elif op is ops.ATOMIC_GROUP:
            count += _choices(value)
        elif op is ops.GROUPREF_EXISTS:
            count += 1 + sum(_choices(part) for part in value[1:] if part is not None)
    return count


@dataclass
class _State:
    """`then` follow once `test` holds; `takes` a character, or else only looks."""

    test: Test | None = None
    takes: bool = False
    then: list[int] = field(default_factory=list)


class _Machine:
    """The states of a pattern. State 0 is the end."""

    def __init__(self, tree: Any, flags: int) -> None:
        self.states = [_State()]
        self.start = self._sequence(tree, 0, flags)

    def matches(self, text: str) -> bool:
        return len(text) in self._ends(text, 0)

    def _ends(self, text: str, begin: int) -> set[int]:
        """Where a match that begins there can end."""
        ends = set()
        now = self._reach([self.start], text, begin)
        for at in range(begin, len(text) + 1):
            if 0 in now:
                ends.add(at)
            if not now or at == len(text):
                break
            taking = (self.states[number] for number in now)
            found = [s.then[0] for s in taking if s.takes and s.test and s.test(text, at)]
            now = self._reach(found, text, at + 1)
        return ends

    def _reach(self, numbers: Iterable[int], text: str, at: int) -> set[int]:
        """States to be in at a place, without taking a character."""
        seen: set[int] = set()
        left = list(numbers)
        while left:
            number = left.pop()
            state = self.states[number]
            if number not in seen:
                seen.add(number)
                if not state.takes and (state.test is None or state.test(text, at)):
                    left += state.then
        return seen

    def _add(self, test: Test | None, takes: bool, then: Iterable[int]) -> int:
        if len(self.states) >= MAX_STATES:
            raise PatternError("repeats too much")
        self.states.append(_State(test, takes, list(then)))
        return len(self.states) - 1

    def _sequence(self, tree: Any, then: int, flags: int) -> int:
        for op, value in reversed(list(tree)):
            then = self._item(op, value, then, flags)
        return then

    def _item(self, op: Any, value: Any, then: int, flags: int) -> int:
        """The first state of one element that goes on with `then`."""
        if op in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN):
            return self._add(_character(op, value, flags), True, [then])
        if op is ops.BRANCH:
            return self._add(None, False, [self._sequence(b, then, flags) for b in value[1]])
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            least, most, body = value
            return self._repeat((least, most), body, then, flags)
        if op is ops.SUBPATTERN:
            _, more, less, body = value
            return self._sequence(body, then, (flags | more) & ~less)
        if op is ops.AT:
            return self._add(_place(value), False, [then])
        if op in (ops.ASSERT, ops.ASSERT_NOT) and value[0] == 1:
            ahead, wanted = _Machine(value[1], flags), op is ops.ASSERT
            return self._add(lambda t, at: bool(ahead._ends(t, at)) is wanted, False, [then])
        raise PatternError(f"{str(op).lower()} beside so many repetitions is not supported")

    def _repeat(self, times: tuple[int, int], body: Any, then: int, flags: int) -> int:
        least, most = times
        if most is ops.MAXREPEAT:
            loop = self._add(None, False, [])
            self.states[loop].then = [self._sequence(body, loop, flags), then]
            then = loop
        else:
            end = then
            for _ in range(most - least):
                then = self._add(None, False, [self._sequence(body, then, flags), end])
        for _ in range(least):
            then = self._sequence(body, then, flags)
        return then


def _place(where: Any) -> Test:
    """A test of where in a text one is."""
    if where in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
        return lambda _, at: at == 0
    if where is ops.AT_END_STRING:
        return lambda text, at: at == len(text)
    if where is ops.AT_END:
        return lambda text, at: text[at:] in ("", "\n")
    expected = where is ops.AT_BOUNDARY

    def word(text: str, at: int) -> bool:
        return 0 <= at < len(text) and (text[at].isalnum() or text[at] == "_")

    return lambda text, at: (word(text, at) != word(text, at - 1)) is expected


def _character(op: Any, value: Any, flags: int) -> Test:
    """A test of one character, for which `re` itself is quick enough."""
    state = parser.State()
    state.flags, state.str = flags & ~re.DEBUG, ""
    compiled = re._compiler.compile(parser.SubPattern(state, [(op, value)]), flags)  # type: ignore[attr-defined]
    return lambda text, at: compiled.match(text[at]) is not None
