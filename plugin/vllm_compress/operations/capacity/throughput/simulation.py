"""Continuous batching as vLLM's scheduler does it, event by event.

Every step has at most `max_tokens` tokens: first one for each decoding request, then the prompts
that are begun, then waiting ones in order of arrival while there are sequences and KV blocks left;
a prompt that does not fit is cut (chunked prefill). When a decoding request finds no block, the
youngest running one is preempted: it gives its blocks back, waits in front and is computed again.
A request's first token comes with the step that ends its prompt, each other one with one step.

Arrivals are those of a trace, each with its lengths; or Poisson with a seed; or a fixed number of
clients who each send the next request when they have the last answer, those of one step a
millisecond apart, so that the first of them does not wait for the others. All requests but a
trace's are equally long, and percentiles come out too good for that. A share of every prompt may be
found in the prefix cache: it is read, and holds blocks, but is not computed. Steps in which nothing
can change but the lengths are taken together, which is what makes a run of hundreds of requests
take milliseconds.

Fails to see: blocks that requests share, and time that the scheduler itself takes beyond what the
step model holds. With a draft a step is one token's part of a real one (`speculation`).
"""

from __future__ import annotations

import bisect
import heapq
import math
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from vllm_compress.operations.capacity.throughput.load import Arrival, Load, cached_tokens
from vllm_compress.operations.capacity.throughput.performance import Step

WARM_UP = 10
GROWTH = 0.05
APART = 1e-3
MAX_EVENTS = 100_000


class Pages(Protocol):
    """KV blocks that a request of a length holds."""

    def blocks(self, length: int) -> int: ...


@dataclass(frozen=True)
class Engine:
    """Limits of one engine: those of vLLM's flags, and the KV blocks it has."""

    max_tokens: int
    max_sequences: int
    pool: int
    pages: Pages


@dataclass(eq=False)
class Request:
    """One request. Of a prompt that is begun, `context` of `target` tokens are computed, those
    `cached` from the start.

    Of a decoding one, `context` and `generated` are what they were at the tick it `joined` at: all
    decoding requests grow by one token a tick.
    """

    sent: float
    prompt: int
    output: int
    target: int
    cached: int = 0
    context: int = 0
    generated: int = 0
    joined: int = 0
    first: float = math.nan
    last: float = math.nan


@dataclass(frozen=True)
class Outcome:
    """Seconds by request, in the order they finished, the first tenth left out as warm-up.

    `queue_grows` where requests came faster than they were answered, to the end; `busy` is the
    share of the time in which a step ran.
    """

    ttft: list[float]
    tpot: list[float]
    latency: list[float]
    seconds: float
    tokens: int
    preemptions: int
    mean_running: float
    queue_grows: bool = False
    busy: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def simulate(step: Step, engine: Engine, load: Load) -> Outcome:
    """Run a load to its end. Raises `ValueError` where one request alone does not fit."""
    if engine.pages.blocks(load.longest) > engine.pool:
        raise ValueError(f"a request does not fit {engine.pool} blocks")
    return _Run(step, engine, load).run()


def merge(outcomes: Iterable[Outcome]) -> Outcome:
    """What several engines with their own requests met, as if it were one."""
    every = list(outcomes)
    if len(every) == 1:
        return every[0]
    seconds = sum(out.seconds for out in every) or 1.0

    def mean(name: str) -> float:
        return sum(getattr(out, name) * out.seconds for out in every) / seconds

    return Outcome(
        ttft=[value for out in every for value in out.ttft],
        tpot=[value for out in every for value in out.tpot],
        latency=[value for out in every for value in out.latency],
        seconds=max(out.seconds for out in every),
        tokens=sum(out.tokens for out in every),
        preemptions=sum(out.preemptions for out in every),
        mean_running=mean("mean_running"),
        queue_grows=any(out.queue_grows for out in every),
        busy=mean("busy"),
    )


def percentile(values: list[float], share: float) -> float:
    """The value that a share (0 to 1) of them does not exceed, between neighbours in proportion: as
    numpy's, which takes longer to import than a plan to make."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _poisson(load: Load) -> list[Arrival]:
    assert load.rate is not None
    draw = random.Random(load.seed)
    arrivals, now = [], 0.0
    for _ in range(load.requests):
        now += draw.expovariate(load.rate)
        arrivals.append(Arrival(now, load.prompt, load.output))
    return arrivals


@dataclass
class _Run:
    """The state of one simulation. `total` is what all decoding requests have cached."""

    step: Step
    engine: Engine
    load: Load
    now: float = 0.0
    ticks: int = 0
    total: int = 0
    sent: int = 0
    preemptions: int = 0
    area: float = 0.0
    worked: float = 0.0
    longest: int = 0
    arrivals: deque[tuple[float, Arrival]] = field(default_factory=deque)
    waiting: deque[Request] = field(default_factory=deque)
    begun: list[Request] = field(default_factory=list)
    decoding: dict[Request, None] = field(default_factory=dict)
    ends: list[tuple[int, int, Request]] = field(default_factory=list)
    done: list[Request] = field(default_factory=list)
    order: count[int] = field(default_factory=count)

    def run(self) -> Outcome:
        """Step until all requests are done, or hopelessly many steps were taken."""
        load = self.load
        at_once = load.requests if load.clients is None else min(load.clients, load.requests)
        if load.clients is None:
            extra = self.step.request_seconds
            self.arrivals.extend((a.sent + extra, a) for a in load.trace or _poisson(load))
            self.sent = load.requests
        else:
            self._send(at_once)
        self.longest = self.engine.pages.blocks(load.longest)
        for _ in range(MAX_EVENTS):
            if len(self.done) >= load.requests:
                break
            while self.arrivals and self.arrivals[0][0] <= self.now:
                self._receive(self.arrivals.popleft()[1])
            if self.running or self.waiting:
                self._advance()
            else:
                self.now = self.arrivals[0][0]
        return self._outcome()

    def _send(self, clients: int) -> None:
        """Let so many clients send a request; it reaches the engine a little later."""
        for i in range(min(clients, self.load.requests - self.sent)):
            ready = self.now + self.step.request_seconds + i * APART
            arrival = Arrival(self.now, self.load.prompt, self.load.output)
            bisect.insort(self.arrivals, (ready, arrival))
            self.sent += 1

    def _receive(self, arrival: Arrival) -> None:
        """Let a request wait, those of its tokens computed that a prefix cache has."""
        sent, prompt, output = arrival
        cached = cached_tokens(prompt, self.load.cached)
        self.waiting.append(Request(sent, prompt, output, prompt, cached, context=cached))

    @property
    def running(self) -> int:
        return len(self.decoding) + len(self.begun)

    def _advance(self) -> None:
        """One step, or several that only decode."""
        preempted = self._make_room()
        prompts = self._schedule(admit=not preempted)
        if not prompts:
            self._decode()
            return
        effective = self.step.effective
        tokens = len(self.decoding) + sum(n for _, n in prompts)
        pairs = sum(n * effective(r.context + n / 2) for r, n in prompts)
        for request, n in prompts:
            request.context += n
        ending = [r for r, _ in prompts if r.context >= r.target]
        sampled = len(self.decoding) + len(ending)
        self._elapse(self.step.seconds(tokens, sampled, self._read(0), pairs), 1)
        for request in ending:
            self.begun.remove(request)
            self._join(request)
        self._finish()

    def _elapse(self, seconds: float, ticks: int) -> None:
        self.area += seconds * self.running
        self.worked += seconds
        self.now += seconds
        self.ticks += ticks
        self.total += ticks * len(self.decoding)

    def _join(self, request: Request) -> None:
        """The prompt is computed: here is a token, and from now on one a tick."""
        if math.isnan(request.first):
            request.first = self.now
        request.generated += 1
        request.joined = self.ticks
        self.total += request.context
        self.decoding[request] = None
        end = self.ticks + request.output - request.generated
        heapq.heappush(self.ends, (end, next(self.order), request))

    def _length(self, request: Request) -> int:
        return request.context + self.ticks - request.joined

    def _free(self, ticks: int) -> int:
        """Blocks left after so many more ticks, begun prompts computed; negative: too few."""
        blocks = self.engine.pages.blocks
        held = sum(blocks(self._length(r) + ticks) for r in self.decoding)
        return self.engine.pool - held - sum(blocks(r.target) for r in self.begun)

    def _roomy(self) -> bool:
        """Tell whether all that run, and one more, fit at their longest: none need be counted."""
        return (self.running + 1) * self.longest <= self.engine.pool

    def _schedule(self, admit: bool) -> list[tuple[Request, int]]:
        """Prompts in this step and how many tokens of each; may `admit` those waiting."""
        engine = self.engine
        budget = engine.max_tokens - len(self.decoding)
        chosen = []
        for request in self.begun:
            n = min(budget, request.target - request.context)
            chosen.append((request, n))
            budget -= n
        while admit and self.waiting and budget > 0 and self.running < engine.max_sequences:
            request = self.waiting[0]
            if not self._roomy() and engine.pages.blocks(request.target) > self._free(1):
                break
            self.begun.append(self.waiting.popleft())
            n = min(budget, request.target - request.context)
            chosen.append((request, n))
            budget -= n
        return [(request, n) for request, n in chosen if n > 0]

    def _make_room(self) -> bool:
        """Preempt the youngest until every decoding request can have its next token."""
        before = self.preemptions
        while self.running > 1 and not self._roomy() and self._free(1) < 0:
            if self.begun:
                victim = self.begun.pop()
            else:
                victim, _ = self.decoding.popitem()
                self.total -= self._length(victim)
                victim.generated += self.ticks - victim.joined
                self.ends = [end for end in self.ends if end[2] is not victim]
                heapq.heapify(self.ends)
            victim.target = victim.prompt + victim.generated
            victim.context = victim.cached
            self.preemptions += 1
            self.waiting.appendleft(victim)
        return self.preemptions > before

    def _decode(self) -> None:
        ticks = self._alike()
        each = (self._decode_seconds(0) + self._decode_seconds(ticks - 1)) / 2
        self._elapse(ticks * each, ticks)
        self._finish()

    def _alike(self) -> int:
        """Ticks that pass before a request ends, one may arrive or blocks run out."""
        ticks = max(1, self.ends[0][0] - self.ticks)
        if not self._roomy() and self._free(ticks) < 0:
            fitting = bisect.bisect_left(range(1, ticks), True, key=lambda n: self._free(n) < 0)
            ticks = max(1, fitting)
        open_to_all = not self.waiting and self.running < self.engine.max_sequences
        if open_to_all and self.arrivals and ticks > 1:
            left = self.arrivals[0][0] - self.now
            guess = min(ticks, max(1, math.ceil(left / self._decode_seconds(0))))
            each = (self._decode_seconds(0) + self._decode_seconds(guess - 1)) / 2
            ticks = min(ticks, max(1, math.ceil(left / each)))
        return ticks

    def _decode_seconds(self, later: int) -> float:
        n = len(self.decoding)
        return self.step.seconds(n, n, self._read(later), 0.0)

    def _read(self, later: int) -> float:
        """Cached tokens that the decoding requests read in one step, `later` ticks from now."""
        n = len(self.decoding)
        return n * self.step.effective(self.total / n + later) if n else 0.0

    def _finish(self) -> None:
        before = len(self.done)
        while self.ends and self.ends[0][0] <= self.ticks:
            request = heapq.heappop(self.ends)[2]
            self.total -= self._length(request)
            del self.decoding[request]
            request.last = self.now
            self.done.append(request)
        if self.load.clients is not None:
            self._send(len(self.done) - before)

    def _outcome(self) -> Outcome:
        kept = self.done[len(self.done) // WARM_UP :]
        return Outcome(
            ttft=[r.first - r.sent for r in kept],
            tpot=[(r.last - r.first) / (r.output - 1) for r in kept if r.output > 1],
            latency=[r.last - r.sent for r in kept],
            seconds=self.now,
            tokens=sum(r.output for r in self.done),
            preemptions=self.preemptions,
            mean_running=self.area / self.now if self.now else 0.0,
            queue_grows=self._queue_grows(),
            busy=self.worked / self.now if self.now else 0.0,
        )

    def _queue_grows(self) -> bool:
        """Tell whether those who came in the last quarter waited longer than those of the second.

        A server that answers a share s fewer than come lets each second add about s to the wait.
        """
        if self.load.clients is not None:
            return False
        if len(self.done) < self.load.requests:
            return True
        if self.load.trace:  # it is as uneven as it is, and ends
            return False
        came = sorted(self.done, key=lambda request: request.sent)
        quarter = len(came) // 4
        if not quarter:
            return False
        early, late = came[quarter : 2 * quarter], came[-quarter:]
        waited = sum(r.first - r.sent for r in late) - sum(r.first - r.sent for r in early)
        passed = sum(r.sent for r in late) - sum(r.sent for r in early)
        return waited > GROWTH * passed
