"""What the dashboard shows. Grafana's JSON and our own page are both made from this.

Queries name series that `deploy/prometheus/rules/recording.yml` records; each is drawn for the
chosen deployments, and in A against B for two of them. `needs` says what a server must have for a
query to return data: an empty query without it is a defect, one with it may be the hardware's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vllm_compress.metrics.series import NAMES, PREFIX


def recorded(name: str, operation: str, by: str = "deployment") -> str:
    """Name the series that the rules record of a metric; a counter loses its `_total`."""
    return f"{by}:{name.removesuffix('_total')}:{operation}"


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

Unit = Literal[
    "count", "bytes", "seconds", "ratio", "requests/s", "tokens/s", "watts", "joules", "money"
]
Style = Literal["solid", "dashed", "dotted"]


@dataclass(frozen=True)
class Query:
    """One recorded series. `legend` stands beside the deployment's name; `{{label}}` is filled in.

    `headline` is its column where deployments stand in a table, and its row in A against B.
    """

    series: str
    legend: str = ""
    headline: str = ""
    needs: str = ""
    style: Style = "solid"

    def expression(self, selector: str) -> str:
        """PromQL of the deployments that `selector`, such as `=~"$deployment"`, takes."""
        return f"{self.series}{{deployment{selector}}}"


@dataclass(frozen=True)
class Panel:
    """One chart. `better` is the direction that is good; `top` fixes the axis."""

    title: str
    help: str
    unit: Unit
    queries: tuple[Query, ...]
    better: Literal["lower", "higher", ""] = ""
    top: float | None = None

    @property
    def needs(self) -> str:
        """Say what the panel needs to show anything; empty if nothing."""
        return self.queries[0].needs


@dataclass(frozen=True)
class Section:
    """Charts under one heading."""

    title: str
    panels: tuple[Panel, ...]


def _one(name: str, operation: str, headline: str = "", needs: str = "") -> tuple[Query, ...]:
    return (Query(recorded(name, operation), headline=headline, needs=needs),)


def _quantiles(name: str, short: str = "") -> tuple[Query, ...]:
    def quantile(q: str, style: Style, headline: bool) -> Query:
        shown = f"{short} {q}" if short and headline else ""
        return Query(recorded(name, f"{q}_rate2m"), q, shown, style=style)

    return (
        quantile("p50", "dotted", True),
        quantile("p95", "solid", True),
        quantile("p99", "dashed", False),
    )


SECTIONS = (
    Section(
        "Traffic",
        (
            Panel(
                "Requests",
                "Finished requests per second, over 2 minutes.",
                "requests/s",
                _one(NAMES.requests, "rate2m", "Requests/s"),
            ),
            Panel(
                "Generated tokens",
                "Tokens generated per second by all replicas together.",
                "tokens/s",
                _one(NAMES.generation_tokens, "rate2m", "Tokens/s"),
            ),
            Panel(
                "Generated tokens per device",
                "Tokens generated per second, divided by the devices: GPUs, or CPU processes.",
                "tokens/s",
                _one(PREFIX + "generation_tokens_per_device", "rate2m", "Tokens/s per device"),
                better="higher",
            ),
            Panel(
                "Prompt tokens",
                "Prompt tokens per second, those found in the prefix cache included.",
                "tokens/s",
                _one(NAMES.prompt_tokens, "rate2m"),
            ),
            Panel(
                "Finished requests by reason",
                "stop: the model or a stop string ended it; length: max_tokens did; error: the "
                "server failed it. Those whose client went away are missing.",
                "requests/s",
                (
                    Query(
                        recorded(NAMES.requests, "rate2m", "deployment_finish_reason"),
                        "{{finish_reason}}",
                    ),
                ),
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
                _quantiles(NAMES.first_token, "TTFT"),
                better="lower",
            ),
            Panel(
                "Time per output token",
                "Mean over a finished request of the time between its tokens.",
                "seconds",
                _quantiles(NAMES.per_token, "TPOT"),
                better="lower",
            ),
            Panel(
                "Request latency",
                "From a request's arrival in vLLM to its last token.",
                "seconds",
                _quantiles(NAMES.latency),
                better="lower",
            ),
        ),
    ),
    Section(
        "Load",
        (
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
                _one(NAMES.queue, "p95_rate2m"),
                better="lower",
            ),
            Panel(
                "KV cache in use",
                "Of the fullest engine. Full with requests waiting: add replicas or memory.",
                "ratio",
                _one(NAMES.kv_cache_usage, "max", "KV cache"),
                top=1.0,
            ),
            Panel(
                "Preemptions",
                "Requests per second sent back to wait because the KV cache was full.",
                "requests/s",
                _one(NAMES.preemptions, "rate2m"),
                better="lower",
            ),
            Panel(
                "Prompt tokens found in the cache",
                "Share of prompt tokens that the prefix cache saved computing.",
                "ratio",
                _one(NAMES.cached_tokens, "ratio_rate2m"),
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
                _one(PREFIX + "request_errors", "ratio_rate2m", "Failed"),
                better="lower",
            ),
            Panel(
                "Requests given up by clients",
                "Share over 30 minutes of requests whose client went away before the end.",
                "ratio",
                _one(PREFIX + "requests_abandoned", "ratio_rate30m", "Given up"),
                better="lower",
            ),
            Panel(
                "Requests that missed an objective",
                "Share over 5 minutes, and what the objective's target allows.",
                "ratio",
                (
                    Query(
                        recorded(
                            PREFIX + "objective_missed", "ratio_rate5m", "deployment_objective"
                        ),
                        "{{objective}}",
                        needs=OBJECTIVES,
                    ),
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
                _one(PREFIX + "cost_per_hour", "sum", needs=PRICE),
                better="lower",
            ),
            Panel(
                "Cost per million generated tokens",
                "All cost is put on generated tokens; idle time counts.",
                "money",
                _one(
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
                _one(NAMES.energy, "rate2m", needs=ENERGY),
                better="lower",
            ),
            Panel(
                "Energy per generated token",
                "All energy is put on generated tokens; idle time counts.",
                "joules",
                _one(
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
