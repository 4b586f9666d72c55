"""A model behind an OpenAI-compatible endpoint, asked as often and as fast as it allows.

A request that meets 408, 429, a 5xx, no answer or half of one is sent again: after what Retry-After
says, else after 1, 2, 4, … 60 seconds, drawn from the upper half of each, so that many requests do
not come back at once. While a server names a time no other request is sent either. After eight
tries it has stopped answering; 429 does not count as long as other requests are answered.

Other statuses of 4xx are about the request (`Refused`), or, where the key or the model is at fault,
about all of them (`ServerError`). What an endpoint does not know is left out from then on:
log-probabilities, where the user did not insist, and the old name of the limit on tokens.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from compress_methods.evaluation.served import ServerError, served_model
from compress_methods.system.http import KEY_VARIABLE, REFUSED, HttpError, headers, refusal
from compress_methods.system.words import duration
from vllm_compress.operations.teaching.layout import as_text
from vllm_compress.operations.teaching.logprobs import read_logprobs
from vllm_compress.operations.teaching.seeds import Message

TIMEOUT = httpx.Timeout(600, connect=10)
FIRST_WAIT, LONGEST_WAIT, TRIES = 1.0, 60.0, 8
BUSY = 429
"""A server that limits rates is there, so its requests wait as long as any is answered."""
LONGEST_NUMBER = 12
PATIENCE = 600.0
"""Seconds; a server that wants more of it, or only limits for so long, is asked another day."""
AGAIN = (408, 425, BUSY)
NOT_THERE, UNPAID = (404, 405), 402
TOP = 20
NEW_LIMIT, OLD_LIMIT = "max_completion_tokens", "max_tokens"


class Refused(Exception):
    """The server answers, but not this request."""


@dataclass(frozen=True)
class Request:
    """What is asked; `name` tells it from all others of a run."""

    name: str
    messages: tuple[Message, ...]
    temperature: float


@dataclass(frozen=True)
class Answer:
    """What came back. Token counts are None where the server keeps them to itself; `whole` is
    false where the limit on tokens cut it off; `logprobs` is JSON, which takes a tenth of the
    memory of its values."""

    text: str
    whole: bool
    tokens_in: int | None = None
    tokens_out: int | None = None
    logprobs: str | None = None


@dataclass(frozen=True)
class Endpoint:
    """Where a teacher is, and how it is asked. `top` log-probabilities per token, None: as many as
    it gives, up to 20. `rate`: requests per second at most. `stop`: texts that end an answer."""

    url: str
    completions: bool = False
    max_tokens: int = 512
    top: int | None = None
    rate: float | None = None
    stop: tuple[str, ...] = ()
    say: Callable[[str], None] = field(default=lambda line: None)


def find_model(url: str, wanted: str | None) -> tuple[str, bool]:
    """The served name of the teacher, and whether vLLM serves it; raises `ServerError`."""
    key = os.environ.get(KEY_VARIABLE, "")
    if not (key.isascii() and key.isprintable()):
        raise ServerError(f"{KEY_VARIABLE} holds characters that no HTTP header can carry")
    try:
        card = served_model(url, wanted)
    except ServerError as problem:
        cause = problem.__cause__
        if wanted is None or not isinstance(cause, HttpError) or cause.status not in NOT_THERE:
            raise ServerError(without_key(str(problem))) from problem
        return wanted, False  # an endpoint without a list of models
    return card["id"], card.get("owned_by") == "vllm"


def without_key(text: str) -> str:
    """A server may quote the key that it refuses."""
    key = os.environ.get(KEY_VARIABLE)
    return text.replace(key, "…") if key else text


class Teacher:
    """Asks one endpoint, as the `model` that it serves. `stopped` makes requests under way end with
    their present try."""

    def __init__(self, endpoint: Endpoint, client: httpx.AsyncClient) -> None:
        self.endpoint, self.client = endpoint, client
        self.model, self.is_vllm = "", False
        self.stopped = False
        self.retries = 0
        self.top = TOP if endpoint.top is None else endpoint.top
        self._answered = time.monotonic()
        self._limit = OLD_LIMIT
        self._pace = _Pace(endpoint.rate)

    async def ask(self, request: Request) -> Answer:
        """The answer to one request; raises `Refused`, or `ServerError` where the server is gone
        or would refuse every other one, too."""
        tries = 0
        while True:
            await self._pace.turn()
            try:
                answer = await self._once(*self.body(request))
                self._answered = time.monotonic()
                return answer
            except _Otherwise:
                continue
            except _Later as problem:
                tries += 1
                wanted, wait = problem.wait, _wait(tries, problem.wait)
                silent = time.monotonic() - self._answered
                gone = silent > PATIENCE if problem.busy else tries >= TRIES
                if gone or wait > PATIENCE or self.stopped:
                    raise ServerError(f"{self.endpoint.url}: {_gave_up(problem, tries)}") from None
                if problem.busy:
                    self.endpoint.say(f"{self.endpoint.url} limits rates (HTTP {BUSY}); waiting")
            self.retries += 1
            if wanted:
                self._pace.pause(wait)
            else:
                await asyncio.sleep(wait)

    def body(self, request: Request) -> tuple[str, dict[str, Any]]:
        """Path and body of a request."""
        asked: dict[str, Any] = {
            "model": self.model,
            "temperature": request.temperature,
            self._limit: self.endpoint.max_tokens,
        }
        if self.top and self.is_vllm:
            asked["return_tokens_as_token_ids"] = True
        if self.endpoint.stop:
            asked["stop"] = list(self.endpoint.stop)
        if self.endpoint.completions:
            counts = {"logprobs": self.top} if self.top else {}
            text = {"prompt": as_text(request.messages)}
            return "/v1/completions", {**asked, **text, **counts}
        counts = {"logprobs": True, "top_logprobs": self.top} if self.top else {}
        return "/v1/chat/completions", {**asked, "messages": list(request.messages), **counts}

    async def _once(self, path: str, body: Mapping[str, Any]) -> Answer:
        try:
            url = f"{self.endpoint.url}{path}"
            response = await self.client.post(url, json=body, headers=headers())
        except (httpx.HTTPError, httpx.InvalidURL) as problem:
            raise _Later(without_key(str(problem)) or type(problem).__name__) from problem
        if response.status_code != 200:
            self._refuse(response, body)
        try:
            return _read(response.json())
        except (ValueError, LookupError, TypeError, AttributeError) as problem:
            raise _Later(f"an answer that is not OpenAI's ({problem!r:.80})") from problem

    def _refuse(self, response: httpx.Response, body: Mapping[str, Any]) -> None:
        """Raise what a status that is not 200 means."""
        status = response.status_code
        said = without_key(refusal(response.content)) or response.reason_phrase
        reason = f"HTTP {status}: {said}"
        if status in AGAIN or status >= 500:
            wait = retry_after(response.headers.get("Retry-After"), time.time())
            raise _Later(reason, wait, busy=status == BUSY)
        if status in REFUSED:
            raise ServerError(f"{self.endpoint.url}: {reason} ({_held()})")
        if status in (*NOT_THERE, UNPAID) or not 400 <= status < 500:
            raise ServerError(f"{self.endpoint.url}: {reason}")
        if NEW_LIMIT in said and OLD_LIMIT in body:
            self._limit = NEW_LIMIT
            raise _Otherwise
        if "logprobs" in said and "logprobs" in body:
            if self.endpoint.top is not None:
                raise ServerError(f"{self.endpoint.url}: {reason}; give another --logprobs")
            self.top = 0
            self.endpoint.say(f"{self.endpoint.url} gives no log-probabilities ({said})")
            raise _Otherwise
        raise Refused(reason)


class _Otherwise(Exception):
    """The same may be asked in another way, at once."""


class _Later(Exception):
    """No answer, or not a whole one; another try may get one. `wait` is what the server wants,
    `busy` that it only has too much to do."""

    def __init__(self, reason: str, wait: float | None = None, busy: bool = False) -> None:
        self.wait, self.busy = wait, busy
        super().__init__(reason)


class _Pace:
    """Lets requests go at most so many a second, and none while the server wants none."""

    def __init__(self, rate: float | None) -> None:
        self._apart = 0.0 if rate is None else 1 / rate
        self._next = self._paused = 0.0

    async def turn(self) -> None:
        """Wait until another request may go."""
        while (start := self._paused - time.monotonic()) > 0:
            await asyncio.sleep(start)
        start = max(self._next, time.monotonic())
        self._next = start + self._apart
        await asyncio.sleep(max(0.0, start - time.monotonic()))

    def pause(self, seconds: float) -> None:
        self._paused = max(self._paused, time.monotonic() + seconds)


def _gave_up(problem: _Later, tries: int) -> str:
    if problem.wait is not None and problem.wait > PATIENCE:
        return f"asks to come back in {duration(problem.wait)} ({problem})"
    return f"stopped answering ({problem}; {tries} {'tries' if tries > 1 else 'try'})"


def _wait(tries: int, wanted: float | None) -> float:
    """Seconds before another try."""
    if wanted:
        return wanted
    longest = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (tries - 1))
    return random.uniform(longest / 2, longest)


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds that a Retry-After asks for at the time `now`: a number, or a date."""
    if value is None:
        return None
    if value.strip().isdecimal() and len(value) < LONGEST_NUMBER:
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None


def _read(block: Any) -> Answer:
    """The answer in a response's JSON."""
    choice = block["choices"][0]
    message = choice.get("message")
    text = choice["text"] if message is None else message.get("content")
    if text is not None and not isinstance(text, str):
        raise TypeError(f"content of the kind {type(text).__name__}")
    usage = block.get("usage") or {}
    try:
        logprobs = read_logprobs(choice)
    except (LookupError, TypeError, AttributeError, ValueError):
        logprobs = None  # in a form of the endpoint's own; the answer is one all the same
    return Answer(
        text or "",
        choice.get("finish_reason") != "length",
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
        None if logprobs is None else json.dumps(logprobs, separators=(",", ":")),
    )


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _held() -> str:
    held = "holds another key" if os.environ.get(KEY_VARIABLE) else "is not set"
    return f"{KEY_VARIABLE}, which is sent as the server's key, {held}"
