"""The Prometheus series of a deployment, on vLLM's own /metrics beside vLLM's own series.

vLLM makes one `DeploymentStatLogger` in every API-server process (entry point
`vllm.stat_logger_plugins`). Counters and histograms of several processes add up; gauges show the
most recent value, and those of an engine carry its number, as each step's load is reported to one
process only. Latencies are the server's: from the request's arrival in vLLM, without the network.

Anything that goes wrong in here is logged once and swallowed, because an exception from a stat
logger stops the server. One thing changes for every model once a stat logger is installed: vLLM
keeps statistics even with `--disable-log-stats`. `VLLM_PLUGINS=` (empty) switches the plugin off.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_compress import metrics_adapter as adapter
from vllm_compress.deployment import current_deployment
from vllm_compress.served import Served, describe
from vllm_compress.versions import own_version, vllm_version

logger = init_logger("vllm.vllm_compress.metrics")

PREFIX = "vllm_compress_"
FIRST_TOKEN_BUCKETS = (
    *(0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
PER_TOKEN_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0),
)
LATENCY_BUCKETS = (
    *(0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0),
    *(30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 300.0, 600.0, 1200.0, 3600.0),
)
INFO_LABELS = (
    "model_name",
    "base_model",
    "formats",
    "bits_per_weight",
    "sparsity",
    "vllm_compress_version",
    "vllm_version",
)


@dataclass(frozen=True)
class Series:
    """Every collector, shared by all loggers of a process."""

    prompt_tokens: Counter
    generation_tokens: Counter
    requests: Counter
    preemptions: Counter
    first_token: Histogram
    per_token: Histogram
    latency: Histogram
    running: Gauge
    waiting: Gauge
    kv_cache_usage: Gauge
    gpus: Gauge
    devices: Gauge
    weight_bytes: Gauge
    info: Gauge


@functools.cache
def series() -> Series:
    """Made and registered at the first call."""

    def counter(name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, ("deployment", *labels))

    def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, ("deployment",), buckets=buckets)

    def gauge(name: str, text: str, *labels: str) -> Gauge:
        return Gauge(PREFIX + name, text, ("deployment", *labels), multiprocess_mode="mostrecent")

    return Series(
        prompt_tokens=counter("prompt_tokens_total", "Prompt tokens, cached ones included."),
        generation_tokens=counter("generation_tokens_total", "Tokens generated."),
        requests=counter(
            "requests_total", "Sequences finished, by why they finished.", "finish_reason"
        ),
        preemptions=counter("preemptions_total", "Requests sent back to wait for KV-cache space."),
        first_token=histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            FIRST_TOKEN_BUCKETS,
        ),
        per_token=histogram(
            "time_per_output_token_seconds",
            "Mean over a finished request of the time between tokens, the first one left out.",
            PER_TOKEN_BUCKETS,
        ),
        latency=histogram(
            "request_latency_seconds",
            "From a request's arrival to its last token.",
            LATENCY_BUCKETS,
        ),
        running=gauge("requests_running", "Requests in an engine's batch.", "engine"),
        waiting=gauge("requests_waiting", "Requests waiting for an engine.", "engine"),
        kv_cache_usage=gauge("kv_cache_usage_ratio", "KV-cache blocks in use, 0 to 1.", "engine"),
        gpus=gauge("gpus", "Accelerators the deployment occupies; 0 on CPUs."),
        devices=gauge("devices", "Workers of the deployment: accelerators, or CPU processes."),
        weight_bytes=gauge("weight_bytes", "Bytes of weights in the checkpoint."),
        info=gauge("deployment_info", "Always 1; the labels say what is served.", *INFO_LABELS),
    )


class DeploymentStatLogger(AggregateStatLoggerBase):
    """vLLM's statistics as series of one deployment."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        self._complained = False
        self._ready = False
        try:
            self._start(vllm_config, list(engine_indexes or [0]))
            self._ready = True
        except Exception:
            self._complain()

    def _start(self, config: Any, engines: list[int]) -> None:
        setup = adapter.read_setup(config, engines)
        name = current_deployment(setup.model, setup.served_name).name
        every = series()
        self._deployment = name
        self._series = every
        self._prompt_tokens = every.prompt_tokens.labels(name)
        self._generation_tokens = every.generation_tokens.labels(name)
        self._preemptions = every.preemptions.labels(name)
        self._first_token = every.first_token.labels(name)
        self._per_token = every.per_token.labels(name)
        self._latency = every.latency.labels(name)
        for reason in adapter.finish_reasons():
            every.requests.labels(name, reason)
        for engine in engines:
            for gauge in (every.running, every.waiting, every.kv_cache_usage):
                gauge.labels(name, str(engine)).set(0)
        every.devices.labels(name).set(setup.devices)
        every.gpus.labels(name).set(setup.devices if setup.accelerated else 0)
        served = describe(
            setup.model, setup.quantization, revision=setup.revision, cache=setup.download_dir
        )
        if served.weight_bytes is not None:
            every.weight_bytes.labels(name).set(served.weight_bytes)
        every.info.labels(name, *_info(setup.served_name, served)).set(1)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
        **_: Any,
    ) -> None:
        """Called by vLLM after every step, either statistic possibly None."""
        if not self._ready:
            return
        try:
            if scheduler_stats is not None:
                self._record_load(adapter.read_load(scheduler_stats), str(engine_idx))
            if iteration_stats is not None:
                self._record_step(adapter.read_step(iteration_stats))
        except Exception:
            self._complain()

    def _record_load(self, load: adapter.Load, engine: str) -> None:
        for gauge, value in (
            (self._series.running, load.running),
            (self._series.waiting, load.waiting),
            (self._series.kv_cache_usage, load.kv_cache_usage),
        ):
            if value is not None:
                gauge.labels(self._deployment, engine).set(value)

    def _record_step(self, step: adapter.Step) -> None:
        for counter, value in (
            (self._prompt_tokens, step.prompt_tokens),
            (self._generation_tokens, step.generation_tokens),
            (self._preemptions, step.preemptions),
        ):
            if value:
                counter.inc(value)
        for seconds in step.first_tokens:
            self._first_token.observe(seconds)
        for request in step.finished:
            if request.reason is not None:
                self._series.requests.labels(self._deployment, request.reason).inc()
            if request.latency is not None:
                self._latency.observe(request.latency)
            if request.time_per_output_token is not None:
                self._per_token.observe(request.time_per_output_token)

    def log_engine_initialized(self) -> None:
        """Nothing to add: everything static is set in the constructor."""

    def _complain(self) -> None:
        if not self._complained:
            self._complained = True
            logger.warning(
                "vllm_compress_* metrics are incomplete; the server goes on, and this is said once",
                exc_info=True,
            )


def _info(served_name: str, served: Served) -> tuple[str, ...]:
    """Values of INFO_LABELS; empty where unknown."""
    bits, sparsity = served.bits_per_weight, served.sparsity
    return (
        served_name,
        served.base_model,
        served.formats,
        "" if bits is None else f"{bits:.2f}",
        "" if sparsity is None else f"{sparsity:.2f}",
        own_version(),
        vllm_version() or "",
    )
