"""The time of a step from what Prometheus has recorded of a deployment.

Two kinds of minutes tell something:

    alone   fewer than 0.3 requests on average: almost every one had the engine to itself, so
            time per output token = step(1), and time to first token = step(mean prompt)
    busy    at least one request on average: with r of them decoding, t seconds per token and
            prompts coming in at p tokens per second, a mean step has r + p * t tokens and takes t

Minutes between are left out, since how the load was spread within them is not recorded, and so are
numbers of tokens met in fewer than three minutes, which a change of load may have made. Attention,
sampling and the work outside of steps are in the times and cannot be told apart; plans for lengths
like those that were served are therefore better than plans for others. Prompt tokens found in the
prefix cache count as if they had been computed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from typing import Any

from compress_methods.errors import nearest
from vllm_compress.metrics.series import NAMES
from vllm_compress.operations.capacity.calibration.fit import CalibrationSourceError
from vllm_compress.operations.prometheus import Prometheus, PrometheusError

HOURS = 6.0
MINUTE = 60.0
ALONE, BUSY = 0.3, 1.0
PER_OCTAVE = 2
LEAST = 3


def is_prometheus(url: str) -> bool:
    """Tell whether a Prometheus answers there, rather than a model server or nothing."""
    try:
        Prometheus(url, timeout=10).get("status/buildinfo")
    except PrometheusError:
        return False
    return True


def choose_deployment(prometheus: Prometheus, wanted: str | None) -> dict[str, str]:
    """Find the labels of the one deployment that is meant; raises `CalibrationSourceError`."""
    found = {s.labels["deployment"]: s.labels for s in prometheus.query(NAMES.info)}
    if wanted is not None and wanted not in found:
        raise CalibrationSourceError(
            f"{prometheus.url}: no deployment {wanted!r}; {nearest(wanted, found)}"
        )
    if wanted is None and len(found) != 1:
        names = ", ".join(sorted(found)) or "none"
        raise CalibrationSourceError(
            f"{prometheus.url}: has {names}; name the deployment to calibrate on with --deployment"
        )
    return found[wanted] if wanted is not None else next(iter(found.values()))


def numbers(prometheus: Prometheus, deployment: str, end: float | None = None) -> dict[str, Any]:
    """The measured part of a `Calibration`, from the hours before `end`; raises
    `CalibrationSourceError` where there is too little."""
    minutes = _minutes(prometheus, deployment, time.time() if end is None else end)
    points: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for running, tpot, prompts, requests, ttft in minutes:
        if running < ALONE:
            _add(points, 1.0, tpot)
            _add(points, prompts / requests if requests else math.nan, ttft)
        elif running >= BUSY:
            _add(points, running + prompts * tpot, tpot)
    tokens = [
        [statistics.median(column) for column in zip(*p, strict=True)]
        for p in points.values()
        if len(p) >= LEAST
    ]
    if len(tokens) < 2:
        raise CalibrationSourceError(
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


def latest_value(prometheus: Prometheus, deployment: str, name: str) -> float | None:
    """Query a gauge's newest value, processes of a deployment added up."""
    found = prometheus.query(f'sum({name}{{deployment="{deployment}"}})')
    return found[0].value if found else None


def _add(points: dict[int, list[tuple[float, float]]], tokens: float, seconds: float) -> None:
    if tokens >= 1 and seconds > 0:
        points[round(PER_OCTAVE * math.log2(tokens))].append((tokens, seconds))


def _minutes(prometheus: Prometheus, deployment: str, end: float) -> list[tuple[float, ...]]:
    """(running, tpot, prompt tokens/s, requests/s, ttft) of each minute that has them all."""
    which = f'{{deployment="{deployment}"}}'

    def rate(name: str) -> str:
        return f"sum(rate({name}{which}[2m]))"

    def mean(name: str) -> str:
        return f"{rate(name + '_sum')} / {rate(name + '_count')}"

    queries = (
        f"sum(avg_over_time({NAMES.running}{which}[2m]))",
        mean(NAMES.per_token),
        rate(NAMES.prompt_tokens),
        rate(NAMES.requests),
        mean(NAMES.first_token),
    )
    columns = []
    for query in queries:
        lines = prometheus.query_range(query, end - HOURS * 3600, end, MINUTE)
        columns.append(dict(lines[0].points) if lines else {})
    times = sorted(set.intersection(*(set(column) for column in columns)))
    rows = [tuple(column[at] for column in columns) for at in times]
    return [row for row in rows if not any(math.isnan(value) for value in row)]
