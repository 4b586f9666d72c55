"""Send every prompt to both servers and journal the answers, pair by pair.

One at a time (the default): a prompt goes to one server, then to the other, which of them first is
drawn for every prompt. So both see the same prompts in the same minutes, and a machine that slows
down or a clock that drifts hits both alike, even on one machine.

At a rate: arrivals as users make them, a Poisson process that does not wait for answers. Every
prompt is sent to both servers at the same moment, so both meet the very same load; they must not
share hardware then. With more than `concurrency` prompts unanswered the next ones wait (the report
says how many did): the servers cannot keep up, and latencies would only measure the client's queue.

Afterwards, so as not to disturb the times, prompts are sent once more for their log-probabilities
(`score`). An answer that breaks off, and any HTTP status but 4xx, is tried again a few times, so
that there is an output to compare; the first try alone decides whether the prompt is an error of
that server, and no latency is taken from a later one. If the server is gone then, the failure is
noted, the run stops with one line and the same command continues it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any, TypeVar

import httpx

from compress_methods.evaluation.served import ServerError, prompt_logprobs
from compress_methods.system.http import HttpError
from compress_methods.system.progress import Progress
from vllm_compress.operations.abtest.replay.client import (
    TIMEOUT,
    Answer,
    Broken,
    Refused,
    Server,
    stream_answer,
)
from vllm_compress.operations.abtest.replay.prompts import Prompt
from vllm_compress.operations.abtest.scoring.logprobs import compare_logprobs
from vllm_compress.operations.journal import Journal

ANSWERS, SCORES, GONE = "answers", "scores", "gone"
RETRY_WAITS = (1.0, 2.0, 4.0, 8.0)
WARM_UP = 2
WARM_UP_TRIES = 5
Pair = tuple[Server, Server]
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """How prompts are replayed. `rate` in prompts per second, None: one at a time. `logprobs` per
    token: 0 leaves them out, -1 is all."""

    rate: float | None = None
    concurrency: int = 64
    logprobs: int = 20
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Prompts to send, the phase of the journal for their answers and the key of each there, its
    number by default. `warm_up`: with two requests to each server before, that do not count."""

    prompts: list[Prompt]
    phase: str = ANSWERS
    keys: tuple[str, ...] = ()
    warm_up: bool = True

    def key(self, i: int) -> str:
        return self.keys[i] if self.keys else str(i)


def replay(
    pair: Pair, batch: Batch, options: Options, journal: Journal, progress: Progress
) -> None:
    """Answer all prompts that have no answer in the journal; raises `ServerError`."""
    every = range(len(batch.prompts))
    left = [i for i in every if not journal.done(batch.phase, batch.key(i))]
    progress.skip(len(every) - len(left))
    if left:
        asyncio.run(_Run(pair, batch, options, journal, progress).all(left))


class _Run:
    """The clients and the clock of one call of `replay`: times are seconds since 1970, so that
    they stay in order when a later call goes on, but measured by a steady clock."""

    def __init__(
        self,
        pair: Pair,
        batch: Batch,
        options: Options,
        journal: Journal,
        progress: Progress,
    ) -> None:
        self.pair, self.batch, self.options = pair, batch, options
        self.prompts = batch.prompts
        self.journal, self.progress = journal, progress
        self.zero = 0.0
        self.clients: dict[str, httpx.AsyncClient] = {}

    async def all(self, left: list[int]) -> None:
        """Answer the prompts of these numbers, after a warm-up of both servers."""
        # The server's limit on connections is its own affair, and one at a time needs one.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with AsyncExitStack() as stack:
            for server in self.pair:
                client = httpx.AsyncClient(timeout=TIMEOUT, limits=limits)
                self.clients[server.side] = await stack.enter_async_context(client)
                if self.batch.warm_up:
                    await self.warm_up(server)
            self.zero = time.perf_counter() - time.time()
            if self.options.rate is None:
                for i in left:
                    await self.one_after_the_other(i)
            else:
                await self.open_loop(left, self.options.rate)

    async def warm_up(self, server: Server) -> None:
        """Send requests that do not count. A server that refuses them all would refuse the rest."""
        answered = 0
        for prompt in self.prompts[:WARM_UP_TRIES]:
            answer = await self.answer(server, prompt)
            answered += not answer.error
            if answered == WARM_UP:
                return
        if not answered:
            raise ServerError(f"{server.url}: answers no prompt; the last time {answer.error}")

    def order(self, i: int) -> Pair:
        """Choose who is first for prompt i: by chance, and the same after a restart."""
        first, second = self.pair
        swap = random.Random(f"{self.options.seed}/{i}").random() < 0.5
        return (second, first) if swap else (first, second)

    async def one_after_the_other(self, i: int) -> None:
        servers = self.order(i)
        self.keep(i, servers, [await self.timed(s, i) for s in servers], False)

    async def open_loop(self, left: list[int], rate: float) -> None:
        """Send prompts at moments drawn beforehand: a slow answer must not delay the next one."""
        chance = random.Random(f"{self.options.seed}/{left[0]}/arrivals")
        places = asyncio.Semaphore(self.options.concurrency)
        due = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                for i in left:
                    due += chance.expovariate(rate)
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
                    late = places.locked()
                    await places.acquire()
                    group.create_task(self.both(i, late, places))
        except ExceptionGroup as problems:
            raise problems.exceptions[0] from None

    async def both(self, i: int, late: bool, places: asyncio.Semaphore) -> None:
        try:
            servers = self.order(i)
            answers = [self.timed(server, i) for server in servers]
            self.keep(i, servers, await asyncio.gather(*answers), late)
        finally:
            places.release()

    def keep(self, i: int, servers: Pair, answers: list[Answer], late: bool) -> None:
        sides = {s.side: a for s, a in zip(servers, answers, strict=True)}
        _same_tokens(self.pair, sides, self.prompts[i])
        facts = {side: asdict(answer) for side, answer in sides.items()}
        self.journal.record(
            self.batch.phase, self.batch.key(i), first=servers[0].side, late=late, **facts
        )
        self.progress.step()

    async def timed(self, server: Server, i: int) -> Answer:
        """The answer to prompt i, with the failure of an earlier run that ended at it."""
        key = f"{self.batch.key(i)}/{server.side}"
        try:
            answer = await self.answer(server, self.prompts[i])
        except ServerError as problem:
            self.journal.record(GONE, key, reason=str(problem.__cause__ or problem))
            raise
        earlier = self.journal.records.get(GONE, {}).get(key)
        return answer if earlier is None else replace(answer, failed="stopped answering")

    async def answer(self, server: Server, prompt: Prompt) -> Answer:
        """The answer, or the error that is the prompt's; `ServerError` if the server is gone."""
        failed = ""
        for tries, wait in enumerate((*RETRY_WAITS, None), 1):
            try:
                answer = await stream_answer(self.clients[server.side], server, prompt, self.zero)
                return replace(answer, tries=tries, failed=failed)
            except Refused as problem:
                return Answer(error=str(problem), tries=tries, failed=failed)
            except Broken as problem:
                failed = failed or str(problem)
                if wait is None:
                    await asyncio.to_thread(_still_there, server, str(problem), tries)
                    return Answer(error=str(problem), tries=tries, failed=failed)
            await asyncio.sleep(wait)
        raise AssertionError("unreachable")


def score(
    pair: Pair, prompts: list[Prompt], options: Options, journal: Journal, progress: Progress
) -> None:
    """Get log-probabilities of all answered prompts that have none; raises `ServerError`."""
    with ThreadPoolExecutor(2) as pool:
        for i in range(len(prompts)):
            if journal.done(SCORES, i):
                progress.skip(1)
                continue
            result = None
            if tokens := _scorable(journal.records[ANSWERS][str(i)]):
                a, b = pool.map(_logprobs, pair, repeat(tokens), repeat(options))
                whole = options.logprobs == -1
                result = asdict(compare_logprobs(a, b, tokens[1:], whole))
            journal.record(SCORES, i, score=result)
            progress.step()


def _scorable(line: dict[str, Any]) -> list[int] | None:
    """The prompt's tokens, where both servers answered it and it has one to predict."""
    tokens = list(line["a"]["prompt_tokens"])
    return tokens if len(tokens) > 1 and not (line["a"]["error"] or line["b"]["error"]) else None


def _logprobs(server: Server, tokens: list[int], options: Options) -> list[dict[int, float]]:
    ask = partial(prompt_logprobs, server.url, server.model, tokens, options.logprobs)
    return ask_patiently(ask)


def ask_patiently(ask: Callable[[], T]) -> T:
    """What `ask` returns, asked again after a `ServerError` that may pass."""
    for wait in (*RETRY_WAITS, None):
        try:
            return ask()
        except ServerError as problem:
            cause = problem.__cause__
            status = cause.status if isinstance(cause, HttpError) else None
            if wait is None or (status is not None and status < 500):
                raise
        time.sleep(wait)
    raise AssertionError("unreachable")


def _still_there(server: Server, problem: str, tries: int) -> None:
    try:
        server.check()
    except ServerError as gone:
        raise ServerError(f"{server.url}: stopped answering ({problem}; {tries} tries)") from gone


def _same_tokens(pair: Pair, answers: dict[str, Answer], prompt: Prompt) -> None:
    """Raise `ServerError` where two answers are to different tokens."""
    a, b = answers["a"], answers["b"]
    if not (a.error or b.error) and a.prompt_tokens != b.prompt_tokens:
        raise ServerError(
            f"{prompt.where}: {len(a.prompt_tokens)} tokens at {pair[0].url}, "
            f"{len(b.prompt_tokens)} others at {pair[1].url}; "
            "expected the same tokenizer and chat template"
        )
