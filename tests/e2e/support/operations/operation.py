"""What tests of a whole operation share: clients of the gateway and all that runs behind it.

with running(folder, {"full": directory, "int4": directory}) as operation:
    operation.clients.ask_all(300, users=150)
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

from tests.e2e.support.operations.composed import Composed, Stack
from tests.e2e.support.operations.prometheus import Prometheus
from vllm_compress.cli import main

CLIENTS = 8


@dataclass(frozen=True)
class Answer:
    """One request as its client saw it."""

    user: str
    variant: str | None
    prompt_tokens: int
    tokens: int


@dataclass
class Clients:
    """Everything that was asked through the gateway, and what came back incomplete."""

    port: int
    answers: list[Answer] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    streams: bool = True

    def ask(self, number: int, user: str) -> None:
        """One completion, every other one streamed if any is."""
        body = {
            "model": "chat",
            "prompt": "It was a truth universally acknowledged" + " and" * (number % 5),
            "max_tokens": 4 + number % 8,
            "ignore_eos": True,
        }
        stream = self.streams and number % 2 == 1
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        headers = {"Content-Type": "application/json", "X-User-Id": user}
        try:
            connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            with connection.getresponse() as response:
                assert response.status == 200, f"HTTP {response.status}: {response.read()!r}"
                usage = self._stream(response) if stream else self._whole(response)
                assert usage["completion_tokens"] == body["max_tokens"], usage
                variant = response.headers["X-Variant"]
            answer = Answer(user, variant, usage["prompt_tokens"], usage["completion_tokens"])
            self.answers.append(answer)
        except (AssertionError, OSError, ValueError, KeyError) as problem:
            self.lost.append(f"{user}: {type(problem).__name__}: {problem}")

    @staticmethod
    def _whole(response: HTTPResponse) -> dict[str, int]:
        done = json.load(response)
        assert done["choices"][0]["finish_reason"] == "length", done
        usage: dict[str, int] = done["usage"]
        return usage

    @staticmethod
    def _stream(response: HTTPResponse) -> dict[str, int]:
        events = [line[6:].strip() for line in response if line.startswith(b"data: ")]
        assert events[-1] == b"[DONE]", events[-1:]
        usage: dict[str, int] = json.loads(events[-2])["usage"]
        return usage

    def ask_all(self, requests: int, users: int) -> None:
        """So many requests, CLIENTS at a time."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda n: self.ask(n, f"user-{n % users}"), range(requests)))

    def tokens(self) -> Counter[str | None]:
        """Generated so far, by variant."""
        count: Counter[str | None] = Counter()
        for answer in self.answers:
            count[answer.variant] += answer.tokens
        return count

    @contextmanager
    def keep_asking(self) -> Iterator[None]:
        """CLIENTS clients that ask without a pause while the block lasts."""
        stop = threading.Event()

        def client(number: int) -> None:
            count = 0
            while not stop.is_set():
                self.ask(count, f"busy-{number}-{count % 20}")
                count += 1

        threads = [threading.Thread(target=client, args=(i,)) for i in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()


@dataclass
class Operation:
    """The whole stack, running."""

    stack: Stack
    servers: dict[str, Composed]
    prometheus: Prometheus
    clients: Clients

    def rollout(self, to: str) -> int:
        prometheus = ["--prometheus", self.prometheus.url]
        return main(["rollout", "--gateway", str(self.stack.state), "--to", to, *prometheus])


def start_all(cleanup: ExitStack, servers: list[Composed]) -> None:
    """All at once: most of a start is one process importing."""
    for server in servers:
        cleanup.push(server)
    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(Composed.__enter__, servers))


@contextmanager
def running(folder: Path, models: Mapping[str, Path]) -> Iterator[Operation]:
    """Servers `full` and `int4`, gateway and Prometheus, as composed."""
    stack = Stack(folder, models)
    servers = {name: stack.server(name) for name in ("full", "int4")}
    with ExitStack() as cleanup:
        start_all(cleanup, list(servers.values()))
        cleanup.enter_context(stack.gateway())
        prometheus = cleanup.enter_context(stack.prometheus())
        prometheus.wait_for("vllm_compress_deployment_info", series=2)
        yield Operation(stack, servers, prometheus, Clients(stack.ports["gateway"]))


def told(prometheus: Prometheus, metric: str) -> dict[str, float]:
    """A metric of ours by deployment."""
    found = prometheus.query(f"sum by (deployment) (vllm_compress_{metric})")
    return {labels["deployment"]: value for labels, value in found}


def check_counts(operation: Operation) -> None:
    """Prometheus, once it has read the servers again, against what the clients counted."""
    expected: dict[str, Counter[str]] = {
        "prompt_tokens_total": Counter(),
        "generation_tokens_total": Counter(),
        "requests_total": Counter(),
    }
    for answer in operation.clients.answers:
        deployment = f"chat-{answer.variant}"
        expected["prompt_tokens_total"][deployment] += answer.prompt_tokens
        expected["generation_tokens_total"][deployment] += answer.tokens
        expected["requests_total"][deployment] += 1
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = {metric: told(operation.prometheus, metric) for metric in expected}
        if found == expected:
            return
        time.sleep(0.5)
    assert found == expected


def binomial_interval(trials: int, share: float, level: float) -> tuple[int, int]:
    """The counts that a binomial variable keeps within with this probability at least."""
    tail = (1 - level) / 2
    below, total = [], 0.0
    for count in range(trials + 1):
        total += math.comb(trials, count) * share**count * (1 - share) ** (trials - count)
        below.append(total)
    low = next(i for i, p in enumerate(below) if p > tail)
    high = next(i for i, p in enumerate(below) if p >= 1 - tail)
    return low, high
