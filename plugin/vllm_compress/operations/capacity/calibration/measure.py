"""Time a served model with one request at a time: the small load generator behind `--calibrate`.

A prompt of n tokens is one step with n tokens in it, and so, for the linear layers, costs what a
step of n decoding requests costs. That gives the whole curve from single requests, also where
kernels for few tokens give way to others for many, which is why short prompts are measured closely:

    T(n)   n prompt tokens, one token out       = request overhead + step(n)
    P(n)   what prompt_logprobs adds to it      = output head on the other n - 1 tokens
    D(c)   each further token after c tokens    = step(1) + c * (time per cached token)

so step(n) = T(n) - (T(1) - D(1)), n samples add P(n + 1) - P(2) to it, and the time per cached
token is the slope of D. prompt_logprobs also takes a log-softmax, where serving samples: about as
much. Rounds go through all lengths in turn, so that a disturbance of the machine meets all alike,
and end when the time is up. Medians.

Fails where: the server is busy with others (they are in the numbers), or is not vLLM.
"""

from __future__ import annotations

import random
import statistics
import time
import uuid
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from compress_methods.system.http import fetch, stream
from compress_methods.system.progress import Progress
from vllm_compress.metrics.series import NAMES
from vllm_compress.operations.capacity.calibration.fit import CalibrationSourceError
from vllm_compress.operations.prometheus import scrape

SECONDS = 90.0
ROUNDS = 15
TIMEOUT = 300.0
LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048)
HEADS = (2, 3, 5, 9, 17, 33)
STREAMED_TRIES = 5
TOKENS_OUT = 6
LONGEST_TURN = 0.3


@dataclass(frozen=True)
class ServedModel:
    """What a server says of itself. `blocks` and `block` are of its KV cache."""

    model: str
    root: str
    longest: int
    weight_bytes: int | None
    devices: int
    blocks: int | None
    block: int | None
    device_type: str | None


@dataclass(frozen=True)
class Timings:
    """Medians in seconds, as in the module's docstring."""

    steps: dict[int, float]
    heads: dict[int, float]
    decode: dict[int, float]


class Client(httpx.Client):
    """One connection to the OpenAI-compatible server at `url`, kept open."""

    def __init__(self, url: str) -> None:
        super().__init__(timeout=TIMEOUT)
        self.url = url.rstrip("/").removesuffix("/v1")


def inspect_server(client: Client) -> ServedModel:
    """Ask what is served; of several models, the first. Raises a `CompressError` where nothing is,
    or not by vLLM."""
    url = f"{client.url}/v1/models"
    try:
        card = fetch(url, client=client).json()["data"][0]
        model = card["id"]
    except (ValueError, LookupError, TypeError):
        raise CalibrationSourceError(
            f"{url}: not an OpenAI-compatible server, or one of no model"
        ) from None
    found = {sample.name: sample for sample in scrape(client.url, client=client)}

    def labels(name: str) -> Mapping[str, str]:
        return found[name].labels if name in found else {}

    cache = labels("vllm:cache_config_info")
    nbytes = found.get(NAMES.weight_bytes)
    return ServedModel(
        model=model,
        root=str(card.get("root") or model),
        longest=int(card.get("max_model_len") or max(LENGTHS)),
        weight_bytes=None if nbytes is None else int(nbytes.value),
        devices=int(found[NAMES.devices].value) if NAMES.devices in found else 1,
        blocks=_whole(cache.get("num_gpu_blocks")),
        block=_whole(cache.get("block_size")),
        device_type=labels(NAMES.info).get("device_type"),
    )


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def time_requests(
    client: Client, served: ServedModel, vocabulary: int, seconds: float, quiet: bool = False
) -> Timings:
    """Ask one request at a time for about `seconds`."""
    prompts = Prompts(client, served.model, vocabulary)
    prompts.complete(8, 2)
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    began = time.monotonic()
    lengths = [n for n in LENGTHS if n + TOKENS_OUT < served.longest]
    with Progress(seconds, "calibrating", quiet=quiet) as progress:
        for turn in range(ROUNDS):
            for kind, n in _round(lengths, served.longest):
                left = began + seconds - time.monotonic()
                if left < 0 and turn:
                    break
                if kind == "T" and n > 64 and _expected(found, n) > LONGEST_TURN * max(left, 0.0):
                    continue
                at = time.monotonic()
                for key, value in prompts.timings(kind, n):
                    found[key].append(value)
                spent = time.monotonic() - at
                progress.step(min(spent, max(0.0, seconds - progress.done)), f"{n} tokens")
        progress.step(max(0.0, seconds - progress.done))
    middle = {key: statistics.median(values) for key, values in found.items()}

    def of(kind: str) -> dict[int, float]:
        return {n: value for (each, n), value in middle.items() if each == kind}

    return Timings(of("T"), of("P"), of("D"))


def _round(lengths: list[int], longest: int) -> list[tuple[str, int]]:
    """Kinds and lengths of one round."""
    heads = [("P", n) for n in HEADS if n + 1 < longest]
    far = min(1024, longest - TOKENS_OUT - 2)
    decode = [("D", c) for c in (1, far // 4, far // 2) if c > 0]
    return [*decode, *[("T", n) for n in lengths], *heads]


def _expected(found: dict[tuple[str, int], list[float]], n: int) -> float:
    """Seconds for n prompt tokens, from the longest prompt so far."""
    known = max((m for kind, m in found if kind == "T"), default=1)
    return n / known * min(found.get(("T", known), [0.0]))


class Prompts:
    """Prompts of random tokens, each with a cache salt of its own, so that none is ever cached."""

    def __init__(self, client: Client, model: str, vocabulary: int, seed: int = 0) -> None:
        self.client, self.model = client, model
        self._draw = random.Random(seed)
        self._range = (min(10, vocabulary - 1), max(11, vocabulary // 2))

    def timings(self, kind: str, n: int) -> list[tuple[tuple[str, int], float]]:
        """Measurements of one request, or of two that are compared."""
        if kind == "T":
            return [(("T", n), self.complete(n, 1)[0])]
        if kind == "P":
            plain = self.complete(n, 1)[0]
            return [(("P", n), max(0.0, self.complete(n, 1, {"prompt_logprobs": 0})[0] - plain))]
        times = self._streamed(n, TOKENS_OUT)
        return [(("D", n), (times[-1] - times[0]) / (TOKENS_OUT - 1))]

    def _streamed(self, n: int, out: int) -> list[float]:
        """Seconds until each token; asked again if a server that is held up sends all at once."""
        for _ in range(STREAMED_TRIES):
            times = self.complete(n, out, streamed=True)
            if len(times) > 1:
                return times
        raise CalibrationSourceError(
            f"{self.client.url}: streamed {len(times)} tokens instead of {out}"
        )

    def complete(
        self, n: int, out: int, extra: dict[str, Any] | None = None, streamed: bool = False
    ) -> list[float]:
        """Return the seconds until the answer, or until each of its tokens."""
        body = {
            "model": self.model,
            "prompt": [self._draw.randrange(*self._range) for _ in range(n)],
            "max_tokens": out,
            "temperature": 0,
            "ignore_eos": True,
            "stream": streamed,
            "cache_salt": uuid.uuid4().hex,
            **(extra or {}),
        }
        began = time.perf_counter()
        with stream(f"{self.client.url}/v1/completions", body, client=self.client) as answer:
            if not streamed:
                answer.read()
                return [time.perf_counter() - began]
            times = [time.perf_counter() - began for line in answer.iter_lines() if _is_token(line)]
        return times


def _is_token(line: str) -> bool:
    return line.startswith("data: {") and '"choices":[{' in line.replace(" ", "")


def numbers(timings: Timings) -> dict[str, Any]:
    """The measured part of a `Calibration`."""
    first = min(timings.decode)
    slope = _slope(timings.decode)
    alone = timings.decode[first] - slope * (first + TOKENS_OUT / 2)
    overhead = max(0.0, timings.steps[1] - alone)
    steps = [[n, value - overhead] for n, value in timings.steps.items()]
    heads = sorted(timings.heads.items())
    one = heads[0][1] if heads else 0.0
    return {
        "tokens": steps,
        "head": [[1, 0.0], *([n - 1, extra - one] for n, extra in heads if n > 2)],
        "per_context": slope,
        "per_pair": min(slope, _bend(timings.steps)),
        "request_seconds": overhead,
    }


def _slope(decode: dict[int, float]) -> float:
    """Least squares through D(c), never negative."""
    if len(decode) < 2:
        return 0.0
    return max(0.0, statistics.linear_regression(list(decode), list(decode.values())).slope)


def _bend(steps: dict[int, float]) -> float:
    """Seconds per pair: by how much twice the prompt takes more than twice the time."""
    n = max(steps) // 2
    if n not in steps or n < 256:
        return 0.0
    return max(0.0, (steps[2 * n] - 2 * steps[n]) / n**2)
