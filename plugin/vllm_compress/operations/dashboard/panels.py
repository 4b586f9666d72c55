"""What the dashboard shows. Grafana's JSON and our own page are both made from this.

Queries name series that `deploy/prometheus/rules` record; each is drawn for the
chosen deployments, and in A against B for two of them. `needs` says what a server must have for a
query to return data: an empty query without it is a defect, one with it may be the hardware's.
"""

from __future__ import annotations

from vllm_compress.metrics.series import NAMES, PREFIX
from vllm_compress.operations.dashboard.declaration import (
    Panel,
    Query,
    Section,
    Unit,
    by,
    one,
    quantiles,
    recorded,
)
from vllm_compress.operations.dashboard.operation import DOWN, OPERATION, UP

INFO = recorded(NAMES.info, "topk1")
INFO_LABELS = {
    "service": "Service",
    "variant": "Variant",
    "base_model": "Original",
    "formats": "Formats",
    "bits_per_weight": "Bits/weight",
    "sparsity": "Sparsity",
    "device_type": "Device",
}
ALERT_PREFIX = "VllmCompress"
ALERTS = f'ALERTS{{alertname=~"{ALERT_PREFIX}.+", alertstate="firing"}}'

PRICE = "device.price_per_hour in the deployment's file"
ENERGY = "energy counters that the server can read: NVML on GPUs, RAPL on CPU hosts"
OBJECTIVES = "objectives in the deployment's file"

MEASURES = (
    Section(
        "Traffic",
        (
            Panel(
                "Requests",
                "Finished requests per second, over 2 minutes.",
                "requests/s",
                one(NAMES.requests, "rate2m", "Requests/s"),
            ),
            Panel(
                "Generated tokens",
                "Tokens generated per second by all replicas together.",
                "tokens/s",
                one(NAMES.generation_tokens, "rate2m", "Tokens/s"),
            ),
            Panel(
                "Generated tokens per device",
                "Tokens generated per second, divided by the devices: GPUs, or CPU processes.",
                "tokens/s",
                one(PREFIX + "generation_tokens_per_device", "rate2m", "Tokens/s per device"),
                better="higher",
            ),
            Panel(
                "Prompt tokens",
                "Prompt tokens per second, those found in the prefix cache included.",
                "tokens/s",
                one(NAMES.prompt_tokens, "rate2m"),
            ),
            Panel(
                "Finished requests by reason",
                "stop: the model or a stop string ended it; length: max_tokens did; error: the "
                "server failed it. Those whose client went away are missing.",
                "requests/s",
                by("finish_reason", NAMES.requests, "rate2m"),
            ),
        ),
    ),
    Section(
        "Latency",
        (
            Panel(
                "Time to first token",
                "From a request's arrival in vLLM to its first token, waiting included.",
                "seconds",
                quantiles(NAMES.first_token, "TTFT"),
                better="lower",
                wide=True,
            ),
            Panel(
                "Time per output token",
                "Mean over a finished request of the time between its tokens.",
                "seconds",
                quantiles(NAMES.per_token, "TPOT"),
                better="lower",
                wide=True,
            ),
            Panel(
                "Request latency",
                "From a request's arrival in vLLM to its last token.",
                "seconds",
                quantiles(NAMES.latency),
                better="lower",
                wide=True,
            ),
        ),
    ),
    Section(
        "Load",
        (
            Panel(
                "Servers",
                "That answer Prometheus, and that do not.",
                "count",
                (
                    Query(UP, "up", "Up", needs="targets with the label `deployment`"),
                    Query(DOWN, "down", style="dashed"),
                ),
            ),
            Panel(
                "Requests in the server",
                "Running: in the batch. Waiting: queued for a place in it.",
                "count",
                (
                    Query(recorded(NAMES.running, "sum"), "running"),
                    Query(recorded(NAMES.waiting, "sum"), "waiting", "Waiting", style="dashed"),
                ),
            ),
            Panel(
                "Time in queue",
                "What 95% of requests waited at most before they were first scheduled.",
                "seconds",
                one(NAMES.queue, "p95_rate2m"),
                better="lower",
            ),
            Panel(
                "KV cache in use",
                "Of the fullest engine. Full with requests waiting: add replicas or memory.",
                "ratio",
                one(NAMES.kv_cache_usage, "max", "KV cache"),
                top=1.0,
            ),
            Panel(
                "Preemptions",
                "Requests per second sent back to wait because the KV cache was full.",
                "requests/s",
                one(NAMES.preemptions, "rate2m"),
                better="lower",
            ),
            Panel(
                "Prompt tokens found in the cache",
                "Share of prompt tokens that the prefix cache saved computing.",
                "ratio",
                one(NAMES.cached_tokens, "ratio_rate2m"),
                better="higher",
                top=1.0,
            ),
        ),
    ),
    Section(
        "Errors and objectives",
        (
            Panel(
                "Failed requests",
                "Share of requests that the server failed: ended with an error, or answered 5xx.",
                "ratio",
                one(PREFIX + "request_errors", "ratio_rate2m", "Failed"),
                better="lower",
            ),
            Panel(
                "Requests given up by clients",
                "Share over 30 minutes of requests whose client went away before the end.",
                "ratio",
                one(PREFIX + "requests_abandoned", "ratio_rate30m", "Given up"),
                better="lower",
            ),
            Panel(
                "Requests that missed an objective",
                "Share over 5 minutes, and what the objective's target allows.",
                "ratio",
                (
                    *by("objective", PREFIX + "objective_missed", "ratio_rate5m", OBJECTIVES),
                    Query(
                        recorded(PREFIX + "objective_budget", "ratio"),
                        "allowed",
                        needs=OBJECTIVES,
                        style="dotted",
                    ),
                ),
                better="lower",
            ),
        ),
    ),
    Section(
        "Cost and energy",
        (
            Panel(
                "Cost per hour",
                "Price of a device-hour times devices, in the currency of the price.",
                "money",
                one(PREFIX + "cost_per_hour", "sum", needs=PRICE),
                better="lower",
            ),
            Panel(
                "Cost per million generated tokens",
                "All cost is put on generated tokens; not shown below one token a second.",
                "money",
                one(
                    PREFIX + "cost_per_million_generation_tokens",
                    "rate2m",
                    "Cost per 1M tokens",
                    PRICE,
                ),
                better="lower",
            ),
            Panel(
                "Power",
                "Joules per second of the devices.",
                "watts",
                one(NAMES.energy, "rate2m", needs=ENERGY),
                better="lower",
            ),
            Panel(
                "Energy per generated token",
                "All energy is put on generated tokens; not shown below one token a second.",
                "joules",
                one(
                    PREFIX + "energy_joules_per_generation_token",
                    "rate2m",
                    "Joules per token",
                    ENERGY,
                ),
                better="lower",
            ),
        ),
    ),
)
SECTIONS = (*MEASURES, *OPERATION)
# Of the table of deployments only: they hardly change, so a chart would say nothing.
FACTS: tuple[tuple[Query, Unit], ...] = (
    (Query(recorded(NAMES.devices, "sum"), headline="Devices"), "count"),
    (Query(recorded(NAMES.weight_bytes, "max"), headline="Weights"), "bytes"),
)


def panels() -> list[Panel]:
    """All of them, in order."""
    return [panel for section in SECTIONS for panel in section.panels]


def headlines() -> list[tuple[Query, Panel]]:
    """The queries that tables show, each with its panel."""
    return [(query, panel) for panel in panels() for query in panel.queries if query.headline]
