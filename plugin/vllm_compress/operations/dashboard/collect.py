"""Everything the page draws, asked of Prometheus at once: one JSON document.

    {prometheus, start, end, step, problem, sections, facts, alerts, info_labels,
     deployments: [{name, labels, here}], marks: [{deployment, kind, index}]}

A section has panels, a panel queries, a query lines {labels, values}: one value, or null, for each
moment from `start` to `end` (Unix seconds) in steps of `step`. `here` says that the deployment is
there at the end; `problem` says why there is nothing to draw. A mark is what happened to a
deployment at the moment `index`: a rollout, or a server that started.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from vllm_compress.metrics.series import NAMES
from vllm_compress.operations.dashboard.declaration import Query
from vllm_compress.operations.dashboard.operation import MARKS
from vllm_compress.operations.dashboard.panels import (
    ALERT_PREFIX,
    FACTS,
    INFO,
    INFO_LABELS,
    SECTIONS,
)
from vllm_compress.operations.prometheus import Line, Prometheus, rules_directory

POINTS = 150
STEPS = (1, 2, 5, 15, 30, 60, 180, 300, 600, 1800, 3600, 5400, 10800, 21600, 43200, 86400, 604800)
RECORDED_OVER = 120  # seconds: a wider step takes the mean, or it would miss most of what happened
AT_A_TIME = 8


def collect(prometheus: Prometheus, seconds: float, end: float | None = None) -> dict[str, Any]:
    """The last `seconds` before `end` (now). Raises `PrometheusError`."""
    step = next((s for s in STEPS if s * POINTS >= seconds), STEPS[-1])
    last = math.floor((time.time() if end is None else end) / step) * step
    first = last - math.ceil(seconds / step) * step

    def lines(query: Query) -> list[dict[str, Any]]:
        mean = f"avg_over_time({query.series}[{step}s])" if step > RECORDED_OVER else query.series
        found = prometheus.query_range(mean, first, last, step)
        return [_on_grid(line, first, last, step) for line in found]

    facts = [query for query, _ in FACTS]
    asked = [query for s in SECTIONS for panel in s.panels for query in panel.queries]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        alerts = pool.submit(prometheus.alerts)
        info = pool.submit(lines, Query(INFO))
        marked = {kind: pool.submit(lines, Query(series)) for kind, series in MARKS.items()}
        answers = dict(zip([*asked, *facts], pool.map(lines, [*asked, *facts]), strict=True))
    deployments = _deployments(info.result())
    return {
        "prometheus": prometheus.url,
        "start": first,
        "end": last,
        "step": step,
        "problem": "" if deployments else _why_nothing(prometheus),
        "deployments": deployments,
        "info_labels": INFO_LABELS,
        "marks": [m for kind, found in marked.items() for m in marks_of(kind, found.result())],
        "alerts": [a for a in alerts.result() if a["labels"]["alertname"].startswith(ALERT_PREFIX)],
        "sections": [
            {
                "title": section.title,
                "panels": [
                    {
                        **asdict(panel),
                        "needs": panel.needs,
                        "queries": [_answered(query, answers) for query in panel.queries],
                    }
                    for panel in section.panels
                ],
            }
            for section in SECTIONS
        ],
        "facts": [{**_answered(query, answers), "unit": unit} for query, unit in FACTS],
    }


def _answered(query: Query, answers: dict[Query, list[dict[str, Any]]]) -> dict[str, Any]:
    return {**asdict(query), "lines": answers[query]}


def marks_of(kind: str, lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Moments at which a share changed, or a count of starts rose."""
    found = []
    for line in lines:
        before = line["values"][0]
        for index, value in enumerate(line["values"]):
            rose = value is not None and before is not None and value > before
            if rose or (kind == "rollout" and None not in (value, before) and value != before):
                deployment = line["labels"].get("deployment", "")
                found.append({"deployment": deployment, "kind": kind, "index": index})
            before = value
    return found


def _on_grid(line: Line, first: float, last: float, step: float) -> dict[str, Any]:
    values: list[float | None] = [None] * (round((last - first) / step) + 1)
    for at, value in line.points:
        if math.isfinite(value):
            values[round((at - first) / step)] = float(f"{value:.6g}")
    return {"labels": line.labels, "values": values}


def _deployments(info: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One for each name, as it was described last."""
    latest: dict[str, tuple[int, dict[str, Any]]] = {}
    for line in info:
        there = max((i for i, value in enumerate(line["values"]) if value is not None), default=-1)
        name = line["labels"].get("deployment", "")
        if there >= latest.get(name, (-1, {}))[0]:
            here = line["values"][-1] is not None
            latest[name] = (there, {"name": name, "labels": line["labels"], "here": here})
    return [deployment for _, (_, deployment) in sorted(latest.items())]


def _why_nothing(prometheus: Prometheus) -> str:
    scraped = {sample.labels.get("deployment", "") for sample in prometheus.query(NAMES.info)}
    if scraped:
        return (
            f"Prometheus scrapes {', '.join(sorted(scraped))}, but evaluates no recording rules of "
            f"vllm-compress yet: add {rules_directory()}/*.yml to its rule_files; where they "
            "are, wait a moment."
        )
    targets = prometheus.query('up{job=~".*vllm-compress.*"}')
    if not targets:
        return "Prometheus has no target of vllm-compress: see deploy/prometheus/prometheus.yml."
    up = sum(target.value > 0 for target in targets)
    return f"No deployment in this time. {up} of {len(targets)} targets answer Prometheus" + (
        "; they serve without the vllm-compress plugin." if up else "."
    )
