"""Everything a comparison reports, each metric described once.

Every metric compares B with A. `change` says how: "ratio" is B / A, "difference" is B - A, "value"
is one number of both together (a divergence, an agreement). `margin` is the default limit beyond
which B is worse; None is reported, not judged, unless the user gives one.

The defaults judge quality and reliability. Perplexity may rise by 2%: about what 3-bit GPTQ costs.
KL may reach 0.05 nats per token. Task scores may fall by 0.02, errors and
empty answers rise by 0.05 (with none at all that takes 96 prompts to show). Speed is not judged by
default because nobody but the user knows whether it may be paid for memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from compress_methods.errors import CompressError, nearest
from vllm_compress.operations.abtest.scoring.judge import Limit


@dataclass(frozen=True)
class Metric:
    """`bad` is the side that is worse: "above", "below" or "both"."""

    name: str
    text: str
    group: str
    change: str
    bad: str
    unit: str = ""
    margin: float | None = None


METRICS = {
    metric.name: metric
    for metric in (
        Metric("perplexity", "of the prompts", "quality", "ratio", "above", margin=1.02),
        Metric("kl", "A to B, on the prompts", "quality", "value", "above", "nats/token", 0.05),
        Metric("top1", "same likeliest token, on the prompts", "quality", "value", "below"),
        Metric(
            "agreement", "same output tokens, up to the first other", "quality", "value", "below"
        ),
        Metric("exact", "same output, whole", "quality", "value", "below"),
        Metric("score", "mean task score", "quality", "difference", "below", margin=0.02),
        Metric("length", "output tokens per prompt", "quality", "ratio", "both", "tokens"),
        Metric(
            "errors",
            "share of prompts without an answer at the first try",
            "reliability",
            "difference",
            "above",
            margin=0.05,
        ),
        Metric(
            "empty",
            "share of answers without words or calls",
            "reliability",
            "difference",
            "above",
            margin=0.05,
        ),
        Metric("cut", "share of answers ended by max_tokens", "reliability", "difference", "above"),
        Metric("ttft", "time to the first token", "speed", "ratio", "above", "s"),
        Metric("ttft_p95", "its 95th percentile", "speed", "ratio", "above", "s"),
        Metric("tpot", "time per output token after it", "speed", "ratio", "above", "s"),
        Metric("tpot_p95", "its 95th percentile", "speed", "ratio", "above", "s"),
        Metric(
            "throughput", "output tokens per busy second", "speed", "ratio", "below", "tokens/s"
        ),
        Metric("cost", "per million output tokens", "cost", "ratio", "above"),
        Metric("joules", "of all devices, per generated token", "cost", "ratio", "above", "J"),
        Metric("probes", "right, of all kinds", "probes", "difference", "below", margin=0.05),
        *(
            Metric(f"probes/{kind}", text, "probes", "difference", "below", unit)
            for kind, text, unit in (
                ("tools", "function and arguments right", ""),
                ("json", "JSON keeps the schema", ""),
                ("refusals", "refused where it should be, and only there", ""),
                ("language", "answered in the language of the question", ""),
                ("code", "Python that parses", ""),
                ("length", "as many words as asked for", ""),
                ("needle", "found in a long text", ""),
                ("turns", "remembered from turns before", ""),
                ("choices", "right choice likelier", ""),
                ("decisions", "surer of the right choice", "nats"),
            )
        ),
    )
}
NONE = "none"
SCORE = "score"


def find_metric(name: str) -> Metric:
    """Find a metric; `task/score` is one of lm-evaluation-harness, judged as scores are."""
    if name in METRICS:
        return METRICS[name]
    return replace(METRICS[SCORE], name=name, text="lm-evaluation-harness", group="tasks")


def limit_of(name: str, limits: Mapping[str, Limit]) -> Limit | None:
    """Find the limit of a metric or task; None where it is not judged."""
    return limits.get(name if name in METRICS else SCORE)


class MarginError(CompressError):
    """A margin that says nothing."""


def read_limits(given: Iterable[str]) -> dict[str, Limit]:
    """Read the limits of judged metrics: defaults, `NAME=VALUE` or `NAME=none` over them."""
    margins = {name: metric.margin for name, metric in METRICS.items()}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign:
            raise MarginError(f"--margin {text}: expected NAME=VALUE, such as ttft=1.10")
        if name not in METRICS:
            raise MarginError(f"--margin {text}: unknown metric; {nearest(name, METRICS)}")
        margins[name] = None if value == NONE else _number(text, value)
    return {
        name: make_limit(METRICS[name], margin)
        for name, margin in margins.items()
        if margin is not None
    }


def make_limit(metric: Metric, margin: float) -> Limit:
    """Put a margin on the metric's own scale. For differences it is how much worse B may be, for
    ratios the worst B / A, for values the worst value."""
    ratio = metric.change == "ratio"
    if margin < 0 or (ratio and margin == 0) or (metric.bad == "both" and margin <= 1):
        least = "above 1" if metric.bad == "both" else "above 0" if ratio else "from 0"
        raise MarginError(f"--margin {metric.name}={margin:g}: expected a number {least}")
    downwards = metric.change == "difference" and metric.bad == "below"
    return Limit(-margin if downwards else margin, metric.bad)


def _number(text: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not abs(number) < float("inf"):
        raise MarginError(f"--margin {text}: expected a number or {NONE!r} after the sign")
    return number
