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
import urllib.request
import uuid
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from compress_methods.evaluate_served import headers, served_model
from vllm_compress.abtest.prompts import Prompt

TIMEOUT = httpx.Timeout(600, connect=10)
PRICE = "vllm_compress_device_price_per_hour"
DEVICES = "vllm_compress_devices"
INFO = "vllm_compress_deployment_info"


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

    def identity(self) -> list[Any]:
        """What a comparison with this server is about."""
        keys = ("formats", "bits_per_weight", "base_model")
        return [self.url, self.model, self.root, [self.info.get(key) for key in keys]]


@dataclass(frozen=True)
class Answer:
    """What came back for a prompt. Times in seconds, `started` since 1970; an answer that
    was refused has the reason in `error` and nothing else."""

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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(value: dict[str, Any]) -> Answer:
        tokens = {key: tuple(value[key]) for key in ("tokens", "prompt_tokens")}
        return Answer(**{**value, **tokens})


def open_server(side: str, url: str, model: str | None, price: float | None) -> Server:
    """Find out what is served at `url`; raises `ServerError`. `price` per hour overrides the
    server's own."""
    base = url.rstrip("/").removesuffix("/v1")
    card = served_model(base, model, f"--model-{side}")
    series = _series(base)
    info = next((labels for name, labels, _ in series if name == INFO), {})
    if price is None:
        prices = [value for name, _, value in series if name == PRICE]
        devices = [value for name, _, value in series if name == DEVICES]
        price = prices[0] * devices[0] if prices and devices else None
    return Server(side, base, card["id"], str(card.get("root") or card["id"]), info, price)


def _series(base: str) -> list[tuple[str, dict[str, str], float]]:
    """What /metrics shows of ours; empty where there is none."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        request = urllib.request.Request(f"{base}/metrics", headers=headers())
        with urllib.request.urlopen(request, timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            samples = [sample for family in families for sample in family.samples]
    except (OSError, ValueError):
        return []
    wanted = (PRICE, DEVICES, INFO)
    return [(s.name, dict(s.labels), s.value) for s in samples if s.name in wanted]


def body(server: Server, prompt: Prompt) -> tuple[str, dict[str, Any]]:
    """Path and body of the request for a prompt: greedy, streamed, never from the cache."""
    request = {
        "model": server.model,
        "max_tokens": prompt.max_tokens,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
        "cache_salt": uuid.uuid4().hex,
    }
    if prompt.messages is not None:
        return "/v1/chat/completions", {**request, "messages": prompt.messages}
    return "/v1/completions", {**request, "prompt": prompt.text}


async def ask(client: httpx.AsyncClient, server: Server, prompt: Prompt, zero: float) -> Answer:
    """One streamed answer, with times since `zero`; raises `Refused` or `Broken`."""
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
    try:
        error = json.loads(content)
        message = " ".join(str(error.get("error", error)["message"]).split())
    except (ValueError, KeyError, TypeError, AttributeError):
        message = " ".join(content.decode(errors="replace").split())[:200]
    kind = Refused if 400 <= status < 500 and status not in (408, 429) else Broken
    raise kind(f"HTTP {status}: {message}")


class _Reader:
    """Collects the chunks of one answer."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.tokens: list[int] = []
        self.prompt_tokens: list[int] = []
        self.finish = ""
        self.first = self.last = 0.0
        self.in_first = 0

    def take(self, chunk: dict[str, Any], now: float) -> None:
        self.prompt_tokens = self.prompt_tokens or chunk.get("prompt_token_ids") or []
        for choice in chunk["choices"]:
            self.prompt_tokens = self.prompt_tokens or choice.get("prompt_token_ids") or []
            self.text.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
            self.finish = choice.get("finish_reason") or self.finish
            if tokens := choice.get("token_ids"):
                self.in_first, self.first = self.in_first or len(tokens), self.first or now
                self.tokens += tokens
                self.last = now

    def answer(self, started: float, zero: float) -> Answer:
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
        )
