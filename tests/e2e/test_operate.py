"""Two variants of a service in operation, with the processes that deploy/compose starts.

Real vLLM servers behind the real nginx, watched by the real Prometheus: users are split and stick,
the counts of Prometheus are those of the clients, a rollout loses nothing and heeds alerts, and
`compare` tells a good variant from a bad one.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest

from tests.e2e.composed import Composed, Stack
from tests.e2e.prometheus import Prometheus
from tests.e2e.tiny import compress
from vllm_compress.cli import main

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
REQUESTS, USERS, SHARE = 300, 150, 0.3
CLIENTS = 8
ALERT = """
groups:
  - name: test
    rules:
      - alert: TestVariantServes
        expr: sum by (deployment) (vllm_compress_requests_total{deployment="chat-int4"}) > 0
"""


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

    def ask(self, number: int, user: str) -> None:
        """One completion, every other one streamed."""
        body = {
            "model": "chat",
            "prompt": "It was a truth universally acknowledged" + " and" * (number % 5),
            "max_tokens": 4 + number % 8,
            "ignore_eos": True,
        }
        stream = number % 2 == 1
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

    def ask_all(self) -> None:
        """REQUESTS requests of USERS users, CLIENTS at a time."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda n: self.ask(n, f"user-{n % USERS}"), range(REQUESTS)))

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
    models: dict[str, Path]

    def rollout(self, to: str) -> int:
        prometheus = ["--prometheus", self.prometheus.url]
        return main(["rollout", "--gateway", str(self.stack.state), "--to", to, *prometheus])


def start(servers: list[Composed]) -> None:
    """Both at once: most of a start is one process importing."""
    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(Composed.__enter__, servers))


@pytest.fixture(scope="module")
def models(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """full, int8, int4 and int2: novels-8m and its blocks rounded to nearest."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("models")
    found = {"full": novels_8m}
    for bits in (8, 4, 2):
        formats = {"w": {"format": "integer", "bits": bits, "group_size": 128}}
        name = f"int{bits}"
        found[name] = compress(novels_8m, folder / name, formats, {"blocks": "w"})
    return found


@pytest.fixture(scope="module")
def operation(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Operation]:
    stack = Stack(tmp_path_factory.mktemp("operate") / "stack", models)
    servers = {name: stack.server(name, core) for core, name in enumerate(("full", "int4"))}
    with ExitStack() as cleanup:
        for server in servers.values():
            cleanup.push(server)
        start(list(servers.values()))
        cleanup.enter_context(stack.gateway())
        prometheus = cleanup.enter_context(stack.prometheus())
        prometheus.wait_for("vllm_compress_deployment_info", series=2)
        clients = Clients(stack.ports["gateway"])
        yield Operation(stack, servers, prometheus, clients, models)


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


def told(prometheus: Prometheus, metric: str) -> dict[str, float]:
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


def test_a_users_requests_are_split_stick_and_are_counted(operation: Operation) -> None:
    assert operation.rollout("30%") == 0
    clients = operation.clients
    clients.ask_all()
    assert not clients.lost
    assert len(clients.answers) == REQUESTS
    variants = Counter(answer.variant for answer in clients.answers)
    assert set(variants) == {"full", "int4"}
    low, high = binomial_interval(REQUESTS, SHARE, 0.99)
    assert low <= variants["int4"] <= high
    of_user = Counter((answer.user, answer.variant) for answer in clients.answers)
    assert len(of_user) == USERS
    check_counts(operation)


def test_b_rollout_under_load_loses_nothing_and_heeds_alerts(
    operation: Operation, capsys: pytest.CaptureFixture[str]
) -> None:
    clients, prometheus = operation.clients, operation.prometheus
    before = len(clients.answers)
    with clients.keep_asking():
        assert operation.rollout("50%") == 0
        time.sleep(1)
        (operation.stack.rules / "test.yml").write_text(ALERT)
        prometheus.reload()
        prometheus.wait_for('ALERTS{alertname="TestVariantServes",alertstate="firing"}')
        assert operation.rollout("60%") == 2
        refusal = capsys.readouterr().err
        assert operation.rollout("0%") == 0
        # Who asks from now on is a user of full; what int4 is still writing, it finishes.
        moved = len(clients.answers)
        time.sleep(2)
    assert "int4 gets no more traffic while TestVariantServes (chat-int4) fires" in refusal
    assert not clients.lost
    assert len(clients.answers) > before
    assert {a.variant for a in clients.answers[before:]} == {"full", "int4"}
    assert {a.variant for a in clients.answers[moved + CLIENTS :]} == {"full"}
    check_counts(operation)


def test_c_compare_tells_a_good_variant_from_a_bad_one(
    operation: Operation, validation_text: Path, tmp_path: Path
) -> None:
    text = validation_text.read_text(encoding="utf-8")
    # With no error at all it takes 78 prompts to show that there are few.
    lines = [" ".join(text[i : i + 250].split()) for i in range(20_000, 42_500, 250)]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(lines) + "\n")
    operation.servers["int4"].stop()
    verdicts = {}
    for variant in ("int8", "int2"):
        models = operation.models | {"int4": operation.models[variant]}
        out = tmp_path / f"{variant}-report"
        with Stack(tmp_path / variant, models).server("int4", core=1) as candidate:
            urls = [operation.servers["full"].url, candidate.url]
            more = ["--prompts", str(prompts), "-o", str(out), "--max-tokens", "4", "--quiet"]
            code = main(["compare", *urls, *more])
        report = json.loads((out / "report.json").read_text())
        assert report["b"]["info"]["formats"] == f"{variant} g128"
        verdicts[variant] = (code, report["verdict"])
    assert verdicts == {"int8": (0, "non-inferior"), "int2": (1, "inferior")}
