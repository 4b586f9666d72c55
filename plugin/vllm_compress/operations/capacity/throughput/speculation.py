"""Self-speculation: how far a draft should write ahead, and what a step then takes.

A draft that guesses a token right with probability a (`acceptance`), k tokens ahead, makes

    (1 - a^(k + 1)) / (1 - a)   tokens in the time of   k passes of the draft, and one of the model
                                                        over k + 1 tokens of each request

(Leviathan et al., 2023, arXiv:2211.17192). With many requests at once the k + 1 tokens are no
longer free, so the best k falls with their number. vLLM takes such a schedule: it looks up k by the
requests that run. At k = 0 the draft still reads what is said, so that its cache is whole.

Assumed where nothing was measured: a pass of the draft has the overhead of one of the model's own
steps, and each token that is checked that of a request. Both are on the careful side.
Fails to see: acceptance that differs by request or falls along the text.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from compress_methods.errors import CompressError
from vllm_compress.operations.capacity.throughput.performance import Step

MOST_AHEAD = 8
Schedule = tuple[tuple[int, int], ...]
"""(requests at once, from which on; tokens ahead), from 1 request on."""


def tokens_per_step(acceptance: float, ahead: int) -> float:
    """Expected tokens that one step of the model yields."""
    if acceptance >= 1:
        return ahead + 1.0
    return float((1 - acceptance ** (ahead + 1)) / (1 - acceptance))


def best_ahead(acceptance: float, seconds: Callable[[int], float], least: int = 1) -> int:
    """How many tokens ahead win most; `seconds` is what a step of so many takes, in any unit."""
    counts = range(least, MOST_AHEAD + 1)
    return max(counts, key=lambda ahead: tokens_per_step(acceptance, ahead) / seconds(ahead))


def written(schedule: Sequence[tuple[int, int]]) -> str:
    """As `--draft-tokens` takes it: `5,8:2,32:0` is 5, from 8 requests at once on 2, then none."""
    return ",".join(f"{first}:{ahead}" if first > 1 else str(ahead) for first, ahead in schedule)


def read_schedule(text: str, where: str) -> Schedule:
    """What `written` writes; raises `CompressError` that says `where`."""
    expected = f"{where} is {text!r}, expected tokens such as 5, or by requests such as 5,8:2,32:0"
    schedule: list[tuple[int, int]] = []
    for i, part in enumerate(text.split(",")):
        first, colon, ahead = part.strip().rpartition(":")
        first = first if colon else "1"
        if not (first.isdecimal() and ahead.isdecimal()) or bool(colon) != (i > 0):
            raise CompressError(expected)
        schedule.append((int(first), int(ahead)))
    rising = all(a[0] < b[0] for a, b in itertools.pairwise(schedule))
    if not rising or max(ahead for _, ahead in schedule) < 1:
        raise CompressError(expected)
    return tuple(schedule)


@dataclass(frozen=True)
class SpeculativeStep:
    """One token of every decoding request: its part of a step that yields several of them.

    A step with prompts in it takes longer by all that they add, which is not shared.
    """

    target: Step
    draft: Step
    acceptance: float
    schedule: Schedule

    @property
    def request_seconds(self) -> float:
        return self.target.request_seconds

    def effective(self, length: float) -> float:
        return self.target.effective(length)

    @cached_property
    def _firsts(self) -> list[int]:
        return [first for first, _ in self.schedule]

    def ahead(self, requests: int) -> int:
        """Tokens ahead with so many requests at once."""
        return self.schedule[max(0, bisect.bisect_right(self._firsts, requests) - 1)][1]

    def seconds(self, tokens: int, sampled: int, context: float, pairs: float) -> float:
        """As `Step.seconds`; those sampled are taken for the requests that decode."""
        ahead = self.ahead(sampled)
        share = 1 / tokens_per_step(self.acceptance, ahead)
        prompts = max(0, tokens - sampled)
        alone = step_seconds(self.target, self.draft, ahead, sampled, context)
        if not prompts and not pairs:
            return share * alone
        both = step_seconds(self.target, self.draft, ahead, sampled, context, (prompts, pairs))
        return both - (1 - share) * alone


def step_seconds(
    target: Step,
    draft: Step,
    ahead: int,
    requests: int,
    context: float,
    prompts: tuple[int, float] = (0, 0.0),
) -> float:
    """A whole step: the draft's passes, the model's check; `prompts` are their tokens and pairs."""
    tokens, pairs = prompts
    checked = requests * (1 + ahead)
    first = draft.seconds(checked + tokens, requests, context, pairs)
    others = max(0, ahead - 1) * draft.seconds(requests, requests, context, 0.0)
    return target.seconds(checked + tokens, checked, context, pairs) + first + others


def speculate(
    target: Step, draft: Step, acceptance: float, most: int, context: float
) -> SpeculativeStep:
    """The best schedule for up to `most` requests at once, each with `context` tokens cached."""
    schedule: list[tuple[int, int]] = []
    for requests in (2**i for i in range(most.bit_length())):
        read = requests * target.effective(context)

        def seconds(ahead: int, requests: int = requests, read: float = read) -> float:
            return step_seconds(target, draft, ahead, requests, read)

        ahead = best_ahead(acceptance, seconds, least=0)
        if not schedule or schedule[-1][1] != ahead:
            schedule.append((requests, ahead))
    return SpeculativeStep(target, draft, acceptance, tuple(schedule))
