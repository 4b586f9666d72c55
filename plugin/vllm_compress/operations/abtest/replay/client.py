"""One server of a comparison: what it serves, what it costs, and one timed answer at a time.

Answers are streamed from vLLM's OpenAI endpoint with `return_token_ids`, so that tokens are its
own and need no tokenizer here. Times are the client's, network included: ttft from sending the
request to the first token, tpot from there to the last token over the tokens between.

Every request carries a `cache_salt` of its own: no prefix is ever found in a cache, neither from
another prompt nor from an earlier run, on any server. Prompts that share a beginning are therefore
slower than they would be in service, for A and B alike.

Fails where: the server is not vLLM, or one before 0.11 (no token ids).
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx

from compress_methods.evaluation.served import served_model
from compress_methods.system.http import HttpError, headers, refusal
from vllm_compress.metrics.series import NAMES
from vllm_compress.operations.abtest.replay.prompts import Prompt
from vllm_compress.operations.prometheus import scrape

LENGTH = "length"
SEQUENCES = {"tokens", "prompt_tokens", "tool_calls"}
TIMEOUT = httpx.Timeout(600, connect=10)


class Refused(Exception):
    """The server answers, but not this prompt."""


class Broken(Exception):
    """No answer, or not a whole one; another try may get one."""


@dataclass(frozen=True)
class Server:
    """A model behind a URL. `side` is "a" or "b"."""

    side: str
    url: str
    model: str
    root: str
    info: dict[str, str]
    price_per_hour: float | None

    def check(self) -> None:
        """Raise `ServerError` unless it still answers and serves the model."""
        served_model(self.url, self.model)

    def same_model(self, other: Server) -> bool:
        """Tell whether both serve the same, as far as servers say."""
        keys = ("formats", "bits_per_weight", "base_model")
        mine, others = ([s.info.get(key) for key in keys] for s in (self, other))
        return (self.model, self.root, mine) == (other.model, other.root, others)


@dataclass(frozen=True)
class Answer:
    """What came back for a prompt: `text` is what a user reads, `reasoning` what came before it,
    `tool_calls` the functions called, as {"name": ..., "arguments": "JSON"}. Times in seconds,
    `started` since 1970; an answer that was refused has the reason in `error` and nothing else.
    `failed` is why the first try gave none: what came later is an output to compare, but its times
    are nobody's."""

    started: float = 0.0
    seconds: float = 0.0
    ttft: float | None = None
    tpot: float | None = None
    text: str = ""
    tokens: tuple[int, ...] = ()
    prompt_tokens: tuple[int, ...] = ()
    finish: str = ""
    tries: int = 1
    error: str = ""
    failed: str = ""
    reasoning: str = ""
    tool_calls: tuple[dict[str, str], ...] = ()

    @property
    def output(self) -> str:
        """What is scored: the text, or the calls as JSON where there is none."""
        if self.text.strip() or not self.tool_calls:
            return self.text
        return json.dumps(self.tool_calls, ensure_ascii=False)

    @property
    def shown(self) -> str:
        """For people: all of it."""
        calls = json.dumps(self.tool_calls, ensure_ascii=False) if self.tool_calls else ""
        thought = f"[reasoning] {self.reasoning} [/reasoning]\n" if self.reasoning else ""
        return f"{thought}{self.text}{calls}"

    @property
    def empty(self) -> bool:
        """Whether a user got nothing, neither words nor a call."""
        return not (self.error or self.text.strip() or self.tool_calls)

    @property
    def cut(self) -> bool:
        """Whether it ended because no more tokens were allowed."""
        return self.finish == LENGTH

    @property
    def problem(self) -> str:
        """Why the first try gave no answer; empty where it did."""
        return self.failed or self.error or ("failed at first" if self.tries > 1 else "")

    @staticmethod
    def from_dict(value: dict[str, Any]) -> Answer:
        tokens = {key: tuple(value[key]) for key in value.keys() & SEQUENCES}
        return Answer(**{**value, **tokens})


def open_server(side: str, url: str, model: str | None) -> Server:
    """Find out what is served at `url`; raises `ServerError`."""
    base = url.rstrip("/").removesuffix("/v1")
    card = served_model(base, model, f"--model-{side}")
    try:
        samples = scrape(base, headers=headers())
    except (HttpError, ValueError):  # other servers may have none
        samples = []
    found = {sample.name: sample for sample in samples}
    info = found[NAMES.info].labels if NAMES.info in found else {}
    price = None
    if NAMES.price in found and NAMES.devices in found:
        price = found[NAMES.price].value * found[NAMES.devices].value
    return Server(side, base, card["id"], str(card.get("root") or card["id"]), dict(info), price)


def body(server: Server, prompt: Prompt) -> tuple[str, dict[str, Any]]:
    """Path and body of the request for a prompt: greedy, streamed, never from the cache."""
    request = {
        "model": server.model,
        "max_tokens": prompt.max_tokens,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
        "cache_salt": uuid.uuid4().hex,
        **prompt.extra,
    }
    if prompt.messages is not None:
        return "/v1/chat/completions", {**request, "messages": prompt.messages}
    return "/v1/completions", {**request, "prompt": prompt.text}


async def stream_answer(
    client: httpx.AsyncClient, server: Server, prompt: Prompt, zero: float
) -> Answer:
    """Stream one answer, with times since `zero`; raises `Refused` or `Broken`."""
    path, request = body(server, prompt)
    reader = _Reader()
    started = time.perf_counter()
    try:
        async with client.stream(
            "POST", f"{server.url}{path}", json=request, headers=headers()
        ) as response:
            if response.status_code != 200:
                _refuse(response.status_code, await response.aread())
            async for chunk in _events(response):
                reader.take(chunk, time.perf_counter())
    except (httpx.HTTPError, httpx.InvalidURL) as problem:
        raise Broken(str(problem) or type(problem).__name__) from problem
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise Broken(f"an answer that is not vLLM's ({problem!r})") from problem
    return reader.answer(started, zero)


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of a server-sent event stream, up to its [DONE]."""
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            _refuse(int(event["error"].get("code") or 500), data.encode())
        yield event
    raise Broken("the stream ended early")


def _refuse(status: int, content: bytes) -> None:
    """Raise what a status that is not 200 means: other than 4xx may get better."""
    kind = Refused if 400 <= status < 500 and status not in (408, 429) else Broken
    raise kind(f"HTTP {status}: {refusal(content)}")


class _Reader:
    """Collects the chunks of one answer."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.calls: dict[int, dict[str, str]] = {}
        self.tokens: list[int] = []
        self.prompt_tokens: list[int] = []
        self.finish = ""
        self.first = self.last = 0.0
        self.in_first = 0

    def take(self, chunk: dict[str, Any], now: float) -> None:
        self.prompt_tokens = self.prompt_tokens or chunk.get("prompt_token_ids") or []
        for choice in chunk["choices"]:
            self.prompt_tokens = self.prompt_tokens or choice.get("prompt_token_ids") or []
            delta = choice.get("delta") or {}
            self.text.append(choice.get("text") or delta.get("content") or "")
            # Older vLLM calls it reasoning_content.
            self.reasoning.append(delta.get("reasoning") or delta.get("reasoning_content") or "")
            for call in delta.get("tool_calls") or []:
                self.take_call(call)
            self.finish = choice.get("finish_reason") or self.finish
            if tokens := choice.get("token_ids"):
                self.in_first, self.first = self.in_first or len(tokens), self.first or now
                self.tokens += tokens
                self.last = now

    def take_call(self, part: dict[str, Any]) -> None:
        """Join what comes of a call: its name in one piece, its arguments in many."""
        call = self.calls.setdefault(part.get("index") or 0, {"name": "", "arguments": ""})
        function = part.get("function") or {}
        call["name"] += function.get("name") or ""
        call["arguments"] += function.get("arguments") or ""

    def answer(self, started: float, zero: float) -> Answer:
        """Return the answer. The first chunk's tokens share one moment, so tpot skips them."""
        if not self.tokens or not self.prompt_tokens:
            raise Broken("an answer without token_ids; expected vLLM 0.11 or later")
        between = len(self.tokens) - self.in_first
        return Answer(
            started=started - zero,
            seconds=self.last - started,
            ttft=self.first - started,
            tpot=(self.last - self.first) / between if between else None,
            text="".join(self.text),
            tokens=tuple(self.tokens),
            prompt_tokens=tuple(self.prompt_tokens),
            finish=self.finish,
            reasoning="".join(self.reasoning),
            tool_calls=tuple(call for _, call in sorted(self.calls.items())),
        )
