"""What /metrics says agrees with what clients of a running server counted themselves.

Tokens, requests and finish reasons: exactly, and equal to vLLM's own series to the last digit.
Latencies: the client's clock also sees HTTP and its own work on the same cores. Sixteen threads of
the openai client in one Python process add 100 milliseconds to a request, so here clients use the
standard library's HTTP, which adds about 5. Requests are sent a moment apart to a queue
where they wait for seconds; there the sums agree within 1% unless the client process is held up
(a busy machine can stop it for a second). A lone request's time to first token does not: those 5
milliseconds are a tenth of it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.support.server import VllmServer

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
CLIENTS = 16
APART_SECONDS = 0.1
TOKENS = (75, 75, 150, 150, 300, 300)
WITHIN = 0.01
BUSY = 2.0
ENGINE_ON_ONE_CORE = {"VLLM_CPU_OMP_THREADS_BIND": "0"}
PROMPTS = [
    "It was a truth universally acknowledged",
    "She looked out of the window, and",
    "The whale had been seen again that morning by the crew, and the captain",
    "Once",
]


@dataclass(frozen=True)
class Answer:
    """One request as its client saw it; `first` and `last` in seconds from sending."""

    prompt_tokens: int
    tokens: int
    reason: str
    first: float
    last: float


class Deployment(VllmServer):
    """`vllm-compress serve`, where VllmServer runs vLLM's module directly. A YAML file in the
    place of the directory is a deployment's."""

    def __init__(self, model: Path, *args: str, env: dict[str, str] | None = None) -> None:
        super().__init__(model, *args, env=env)
        at = self.command.index("--model")
        rest = self.command[:at] + self.command[at + 2 :]
        config = ["--config"] if model.suffix == ".yaml" else []
        serve = [sys.executable, "-m", "vllm_compress.cli", "serve", *config, str(model)]
        self.command = [*serve, *rest[3:]]
        self.model = str(model)

    def samples(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(self.get("/metrics"))
            for sample in family.samples
        }

    def total(self, name: str, **labels: str) -> float:
        """Sum of the samples that have these labels."""
        wanted = set(labels.items())
        found = [v for (n, ls), v in self.samples().items() if n == name and wanted <= ls]
        assert found, f"no {name} with {labels}"
        return sum(found)

    def ask(self, index: int, *, stream: bool, tokens: int) -> Answer:
        """One completion; every fourth that is not streamed may end early, at a stop string. (The
        time per token of two or three would say more of the client than of the server.)"""
        request = {
            "model": self.model,
            "prompt": PROMPTS[index % len(PROMPTS)] + " and" * (index % 7),
            "max_tokens": tokens,
            "seed": index,
            "stop": [","] if index % 4 == 3 and not stream else None,
        }
        return self._stream(request) if stream else self._whole(request)

    def _post(self, body: dict[str, Any]) -> HTTPResponse:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=300)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        return connection.getresponse()

    def _whole(self, request: dict[str, Any]) -> Answer:
        begin = time.perf_counter()
        with self._post({**request, "ignore_eos": True}) as response:
            done = json.load(response)
        last = time.perf_counter() - begin
        usage, reason = done["usage"], done["choices"][0]["finish_reason"]
        return Answer(usage["prompt_tokens"], usage["completion_tokens"], reason, last, last)

    def _stream(self, request: dict[str, Any]) -> Answer:
        options = {"stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
        first = last = 0.0
        begin = time.perf_counter()
        with self._post({**request, **options}) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line.removeprefix(b"data: "))
                if chunk["choices"]:
                    last = time.perf_counter() - begin
                    first = first or last
                    reason = chunk["choices"][0]["finish_reason"]
                else:
                    usage = chunk["usage"]
        return Answer(usage["prompt_tokens"], usage["completion_tokens"], reason, first, last)

    def load(self, count: int, *, stream: bool, tokens: int) -> list[Answer]:
        """`count` requests, up to CLIENTS at a time; the first ones are sent a moment apart."""

        def ask(index: int) -> Answer:
            time.sleep(APART_SECONDS * index if index < CLIENTS else 0)
            return self.ask(index, stream=stream, tokens=tokens)

        with ThreadPoolExecutor(CLIENTS) as pool:
            return list(pool.map(ask, range(count)))


FILE = """
version: 1
name: chat-int4
service: chat
model: ./int4
device: {type: two-cores, count: 1, price_per_hour: 0.25}
objectives: {ttft: 600, tpot: 1.0e-6, target: 0.9}
vllm: {api-server-count: 2, served-model-name: novels-int4, port: 1}
"""
NAME = "chat-int4"


@dataclass(frozen=True)
class Chat:
    """A server of FILE, and the report of the conversion of what it serves."""

    server: Deployment
    report: dict[str, Any]


@pytest.fixture(scope="module")
def chat(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    from compress_methods import convert

    place = tmp_path_factory.mktemp("chat")
    report = convert(novels_8m, "int4-rtn", place / "int4", quiet=True)
    (place / "chat.yaml").write_text(FILE)
    few = ("--max-num-seqs", "2")  # so that requests wait; --port overrides the file's
    with Deployment(place / "chat.yaml", *few, env=ENGINE_ON_ONE_CORE) as server:
        server.model = "novels-int4"
        server.load(CLIENTS, stream=True, tokens=4)  # opens the connections
        yield Chat(server, report)


def counts(server: Deployment) -> dict[str, float]:
    """Counters and sums of the deployment, now."""
    p = "vllm_compress_"
    out = {
        key: server.total(p + key, deployment=NAME)
        for key in (
            "prompt_tokens_total",
            "generation_tokens_total",
            "time_to_first_token_seconds_sum",
            "time_to_first_token_seconds_count",
            "time_per_output_token_seconds_sum",
            "time_per_output_token_seconds_count",
            "request_latency_seconds_sum",
            "request_latency_seconds_count",
        )
    }
    for reason in ("stop", "length", "abort", "error"):
        key = {"deployment": NAME, "finish_reason": reason}
        out[reason] = server.total(p + "requests_total", **key)
    return out


def difference(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {key: after[key] - before[key] for key in after}


def check_counts(told: dict[str, float], answers: list[Answer]) -> None:
    assert told["prompt_tokens_total"] == sum(a.prompt_tokens for a in answers)
    assert told["generation_tokens_total"] == sum(a.tokens for a in answers)
    reasons = Counter(a.reason for a in answers)
    assert {r: told[r] for r in ("stop", "length", "abort", "error")} == {
        "stop": reasons["stop"],
        "length": reasons["length"],
        "abort": 0,
        "error": 0,
    }
    assert told["time_to_first_token_seconds_count"] == len(answers)
    assert told["request_latency_seconds_count"] == len(answers)
    assert told["time_per_output_token_seconds_count"] == sum(a.tokens > 1 for a in answers)


@pytest.mark.alone
def test_series_agree_with_the_clients(chat: Chat) -> None:
    """Counts always; each kind of time in one of the loads, as a client that is held up times
    itself, and what holds it up in one load need not be what does in another. Later loads are
    longer, so that it weighs less; a machine that is busy with others in all of them is no place
    to compare clocks. (A series of another meaning is off in every load.)"""
    nearest: dict[str, float] = {}
    for tokens in TOKENS:
        for kind, error in errors_of_times(chat.server, tokens).items():
            nearest[kind] = min(error, nearest.get(kind, error), key=abs)
        off = {kind: error for kind, error in nearest.items() if abs(error) > WITHIN}
        if not off:
            return
    wanted, cores = os.getloadavg()[0], os.cpu_count() or 1
    if wanted > BUSY * cores:
        pytest.skip(f"busy with others: {wanted:.1f} processes want {cores} cores; off: {off}")
    raise AssertionError(f"server's sum of seconds / client's - 1, at the nearest: {off}")


def errors_of_times(server: Deployment, tokens: int) -> dict[str, float]:
    """Load the server and check its counts; for each kind of time server's sum / client's - 1."""
    start = counts(server)
    streamed = server.load(24, stream=True, tokens=tokens)
    middle = counts(server)
    whole = server.load(16, stream=False, tokens=tokens)
    end = counts(server)
    check_counts(difference(middle, start), streamed)
    check_counts(difference(end, middle), whole)
    told = difference(middle, start)
    pairs = {
        "first token": (told["time_to_first_token_seconds_sum"], sum(a.first for a in streamed)),
        "per token": (
            told["time_per_output_token_seconds_sum"],
            sum((a.last - a.first) / (a.tokens - 1) for a in streamed if a.tokens > 1),
        ),
        "latency": (told["request_latency_seconds_sum"], sum(a.last for a in streamed)),
        "latency, not streamed": (
            difference(end, middle)["request_latency_seconds_sum"],
            sum(a.last for a in whole),
        ),
    }
    errors = {}
    for kind, (ours, theirs) in pairs.items():
        errors[kind] = ours / theirs - 1
        print(f"{kind}: server {ours:.4f} s, client {theirs:.4f} s, {errors[kind]:+.2%}")
    return errors


@pytest.mark.alone
def test_series_equal_those_of_vllm(chat: Chat) -> None:
    for ours, theirs in {
        "prompt_tokens_total": "prompt_tokens_total",
        "generation_tokens_total": "generation_tokens_total",
        "requests_total": "request_success_total",
        "prompt_tokens_cached_total": "prompt_tokens_cached_total",
        "preemptions_total": "num_preemptions_total",
        "time_in_queue_seconds_sum": "request_queue_time_seconds_sum",
        "time_to_first_token_seconds_sum": "time_to_first_token_seconds_sum",
        "time_per_output_token_seconds_sum": "request_time_per_output_token_seconds_sum",
        "request_latency_seconds_sum": "e2e_request_latency_seconds_sum",
        "requests_running": "num_requests_running",
        "requests_waiting": "num_requests_waiting",
        "kv_cache_usage_ratio": "kv_cache_usage_perc",
    }.items():
        mine, vllms = (
            chat.server.total(name) for name in (f"vllm_compress_{ours}", f"vllm:{theirs}")
        )
        assert mine == vllms, ours


@pytest.mark.alone
def test_every_series_carries_the_labels_of_the_deployment_file(chat: Chat) -> None:
    server = chat.server
    ours = [(n, dict(ls)) for n, ls in server.samples() if n.startswith("vllm_compress_")]
    assert {labels["deployment"] for _, labels in ours} == {NAME}
    assert server.total("vllm_compress_devices") == 1
    assert server.total("vllm_compress_gpus") == 0
    (info,) = [labels for n, labels in ours if n == "vllm_compress_deployment_info"]
    assert info["model_name"] == "novels-int4"
    assert info["formats"] == "int4 g128"
    assert (info["service"], info["variant"]) == ("chat", "int4-g128")
    assert info["device_type"] == "two-cores"
    assert info["bits_per_weight"] == f"{chat.report['bits_per_weight']:.2f}"
    assert server.total("vllm_compress_weight_bytes") == chat.report["bytes_after"]
    assert "Unknown vLLM environment variable" not in server.log


@pytest.mark.alone
def test_two_api_servers_add_up(chat: Chat) -> None:
    """Each request meets one of two processes, each scrape too; the answer is the same."""
    server = chat.server
    counted, judged = counts(server), judgements(server)
    answers = server.load(20, stream=True, tokens=16)
    for _ in range(4):
        check_counts(difference(counts(server), counted), answers)
    assert server.total("vllm_compress_requests_running") == 0
    assert server.total("vllm_compress_device_price_per_hour") == 0.25
    assert server.total("vllm_compress_objective_seconds", objective="tpot") == 1e-6
    assert server.total("vllm_compress_objective_target_ratio") == 0.9
    # Every time to first token is within its limit, and no time per token is.
    several = sum(answer.tokens > 1 for answer in answers)
    assert difference(judgements(server), judged) == {
        "ttft true": len(answers),
        "ttft false": 0,
        "tpot true": 0,
        "tpot false": several,
    }


def judgements(server: Deployment) -> dict[str, float]:
    """How many requests met each objective and how many did not."""
    name = "vllm_compress_objective_requests_total"
    return {
        f"{objective} {met}": server.total(name, objective=objective, met=met)
        for objective in ("ttft", "tpot")
        for met in ("true", "false")
    }
