"""The time of a step from what Prometheus has recorded of a deployment.

Two kinds of minutes tell something:

    alone   fewer than 0.3 requests on average: almost every one had the engine to itself, so
            time per output token = step(1), and time to first token = step(mean prompt)
    busy    at least one request on average: with r of them decoding, t seconds per token and
            prompts coming in at p tokens per second, a mean step has r + p * t tokens and takes t

Minutes between are left out, since how the load was spread within them is not recorded. Attention,
sampling and the work outside of steps are in the times and cannot be told apart; plans for lengths
like those that were served are therefore better than plans for others.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from typing import Any

from compress_methods.errors import nearest
from vllm_compress.capacity.calibration import CalibrationFileError
from vllm_compress.prometheus import Prometheus

HOURS = 6.0
MINUTE = 60.0
ALONE, BUSY = 0.3, 1.0
PER_OCTAVE = 2
PREFIX = "vllm_compress_"


def is_prometheus(url: str) -> bool:
    """Whether a Prometheus answers there, rather than a model server or nothing."""
    from vllm_compress.prometheus import PrometheusError

    try:
        Prometheus(url, timeout=10).get("status/buildinfo")
    except PrometheusError:
        return False
    return True


def choose(prometheus: Prometheus, wanted: str | None) -> dict[str, str]:
    """Labels of the one deployment that is meant; raises `CalibrationFileError`."""
    found = {s.labels["deployment"]: s.labels for s in prometheus.query(f"{PREFIX}deployment_info")}
    if wanted is not None and wanted not in found:
        raise CalibrationFileError(
            f"{prometheus.url}: no deployment {wanted!r}; {nearest(wanted, found)}"
        )
    if wanted is None and len(found) != 1:
        names = ", ".join(sorted(found)) or "none"
        raise CalibrationFileError(
            f"{prometheus.url}: has {names}; name the deployment to calibrate on with --deployment"
        )
    return found[wanted] if wanted is not None else next(iter(found.values()))


def numbers(prometheus: Prometheus, deployment: str, end: float | None = None) -> dict[str, Any]:
    """The measured part of a `Calibration`, from the hours before `end`; raises
    `CalibrationFileError` where there is too little."""
    series = _series(prometheus, deployment, time.time() if end is None else end)
    points: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for running, tpot, prompts, requests, ttft in series:
        if running < ALONE:
            _add(points, 1.0, tpot)
            _add(points, prompts / requests if requests else math.nan, ttft)
        elif running >= BUSY:
            _add(points, running + prompts * tpot, tpot)
    tokens = [
        [statistics.median(column) for column in zip(*p, strict=True)] for p in points.values()
    ]
    if len(tokens) < 2:
        raise CalibrationFileError(
            f"{prometheus.url}: {deployment} has served too little in the last {HOURS:.0f} hours "
            "to calibrate on (minutes with one request at a time, and busy ones, are needed)"
        )
    return {
        "tokens": sorted(tokens),
        "head": [[1, 0.0]],
        "per_context": 0.0,
        "per_pair": 0.0,
        "request_seconds": 0.0,
    }


def latest(prometheus: Prometheus, deployment: str, name: str) -> float | None:
    """The newest value of a gauge, processes of a deployment added up."""
    found = prometheus.query(f'sum({PREFIX}{name}{{deployment="{deployment}"}})')
    return found[0].value if found else None


def _add(points: dict[int, list[tuple[float, float]]], tokens: float, seconds: float) -> None:
    if tokens >= 1 and seconds > 0:
        points[round(PER_OCTAVE * math.log2(tokens))].append((tokens, seconds))


def _series(prometheus: Prometheus, deployment: str, end: float) -> list[tuple[float, ...]]:
    """(running, tpot, prompt tokens/s, requests/s, ttft) of each minute that has them all."""
    which = f'{{deployment="{deployment}"}}'

    def rate(name: str) -> str:
        return f"sum(rate({PREFIX}{name}{which}[2m]))"

    def mean(name: str) -> str:
        return f"{rate(name + '_sum')} / {rate(name + '_count')}"

    queries = (
        f"sum(avg_over_time({PREFIX}requests_running{which}[2m]))",
        mean("time_per_output_token_seconds"),
        rate("prompt_tokens_total"),
        rate("requests_total"),
        mean("time_to_first_token_seconds"),
    )
    columns = []
    for query in queries:
        lines = prometheus.query_range(query, end - HOURS * 3600, end, MINUTE)
        columns.append(dict(lines[0].points) if lines else {})
    times = sorted(set.intersection(*(set(column) for column in columns)))
    rows = [tuple(column[at] for column in columns) for at in times]
    return [row for row in rows if not any(math.isnan(value) for value in row)]
