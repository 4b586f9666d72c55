"""Every Prometheus series of a deployment: name, unit, help text, labels, buckets.

Names end in their unit, counters in `_total`; seconds, bytes, joules and ratios of 0 to 1. All have
the label `deployment`. A counter or histogram exists with 0 from the start, so that `rate` sees the
first event. Buckets are a quarter to a factor of two apart where objectives are usually set.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

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
QUEUE_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 600.0),
)
INFO_LABELS = (
    "service",
    "variant",
    "device_type",
    "model_name",
    "base_model",
    "formats",
    "bits_per_weight",
    "sparsity",
    "vllm_compress_version",
    "vllm_version",
)


def _metric(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
    return field(
        default_factory=lambda: kind(PREFIX + name, text, ("deployment", *labels), **options),
        metadata={"name": PREFIX + name},
    )


_counter = functools.partial(_metric, Counter)
_histogram = functools.partial(_metric, Histogram)
# Of several API servers, the one that spoke last.
_gauge = functools.partial(_metric, Gauge, multiprocess_mode="mostrecent")


# Each call below returns a dataclass field.
# ruff: noqa: RUF009
@dataclass(frozen=True)
class Series:
    """The collectors. Making one registers them, so a process has one: `series()`."""

    prompt_tokens: Counter = _counter(
        "prompt_tokens_total",
        "Prompt tokens of requests that have their first token, cached ones included.",
    )
    cached_tokens: Counter = _counter(
        "prompt_tokens_cached_total",
        "Prompt tokens that were found in a KV cache instead of being computed.",
    )
    generation_tokens: Counter = _counter("generation_tokens_total", "Tokens generated.")
    requests: Counter = _counter(
        "requests_total",
        "Sequences finished, by why they finished; those whose client went away are missing.",
        "finish_reason",
    )
    preemptions: Counter = _counter(
        "preemptions_total", "Requests sent back to wait because the KV cache was full."
    )
    draft_tokens: Counter = _counter(
        "draft_tokens_total", "Tokens that a draft model wrote ahead; 0 without one."
    )
    accepted_tokens: Counter = _counter(
        "draft_tokens_accepted_total", "Those among them that the model itself would have said."
    )

    first_token: Histogram = _histogram(
        "time_to_first_token_seconds",
        "From a request's arrival at the server to its first token, waiting included.",
        buckets=FIRST_TOKEN_BUCKETS,
    )
    per_token: Histogram = _histogram(
        "time_per_output_token_seconds",
        "Mean over a finished request of the time between tokens, the first one left out.",
        buckets=PER_TOKEN_BUCKETS,
    )
    latency: Histogram = _histogram(
        "request_latency_seconds",
        "From a request's arrival at the server to its last token.",
        buckets=LATENCY_BUCKETS,
    )
    queue: Histogram = _histogram(
        "time_in_queue_seconds",
        "What a finished request waited before it was first scheduled: long when overloaded.",
        buckets=QUEUE_BUCKETS,
    )

    running: Gauge = _gauge("requests_running", "Requests in an engine's batch.", "engine")
    waiting: Gauge = _gauge("requests_waiting", "Requests waiting for an engine.", "engine")
    kv_cache_usage: Gauge = _gauge(
        "kv_cache_usage_ratio",
        "KV-cache blocks in use, 0 to 1; at 1 requests wait or are preempted.",
        "engine",
    )
    adapter_requests: Gauge = _gauge(
        "adapter_requests",
        "Requests of a LoRA adapter, running or waiting; those after the first 32 adapters share "
        "the label `other`.",
        "engine",
        "adapter",
    )

    objective_seconds: Gauge = _gauge(
        "objective_seconds",
        "Latency that requests should keep to: ttft, time to first token; tpot, time per output "
        "token.",
        "objective",
    )
    objective_target: Gauge = _gauge(
        "objective_target_ratio", "Share of requests that should keep to an objective, 0 to 1."
    )
    objective_requests: Counter = _counter(
        "objective_requests_total",
        "Requests by whether they kept to an objective; ttft is judged at the first token, tpot "
        "at the end of a request with more than one.",
        "objective",
        "met",
    )

    gpus: Gauge = _gauge("gpus", "Accelerators the deployment occupies; 0 on CPUs.")
    devices: Gauge = _gauge(
        "devices",
        "Devices the deployment occupies: accelerators; on CPUs what its file counts, else worker "
        "processes.",
    )
    price: Gauge = _gauge(
        "device_price_per_hour",
        "Price of one device for an hour, in the currency of the deployment's file.",
    )
    energy: Counter = _counter(
        "energy_joules_total",
        "Energy of a whole device since the server started, other work on it included; absent "
        "where it cannot be read.",
        "device",
    )
    weight_bytes: Gauge = _gauge(
        "weight_bytes", "Bytes of weights in the checkpoint's files, as their headers say."
    )
    info: Gauge = _gauge(
        "deployment_info", "Always 1; the labels say what is served.", *INFO_LABELS
    )


# Names by field, for queries: `NAMES.info` is "vllm_compress_deployment_info". Registers nothing.
NAMES = SimpleNamespace(**{f.name: f.metadata["name"] for f in fields(Series)})


@functools.cache
def series() -> Series:
    """Those of this process, made and registered at the first call."""
    return Series()
