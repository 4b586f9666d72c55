"""A finished comparison as Prometheus reads it: a file for node_exporter's textfile collector, or
to be put to a push gateway. One series a metric, so that nobody's prompts or names become labels.

    vllm_compress_quality_value{deployment="chat-int4",...,metric="kl"} 0.0042
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from compress_methods.errors import OutputError
from compress_methods.system.files import write_text
from vllm_compress.metrics.series import PREFIX

VERDICTS = {"non-inferior": 1, "undecided": 0, "inferior": -1}
BOUNDS = ("low", "high")
WHO = ("deployment", "service", "variant", "baseline")


def exposition(report: Mapping[str, Any], now: float | None = None) -> str:
    """The text; `now` is in Unix seconds."""
    registry, prefix = CollectorRegistry(), f"{PREFIX}quality_"
    a, b = (report[side]["info"] for side in "ab")
    who = {name: b.get(name, "") for name in WHO[:3]} | {"baseline": a.get("deployment", "")}
    who["deployment"] = who["deployment"] or report["b"]["model"]
    value = Gauge(
        f"{prefix}value",
        "B against A, of each metric of `vllm-compress compare`.",
        (*WHO, "metric"),
        registry=registry,
    )
    bound = Gauge(
        f"{prefix}bound",
        "Ends of the metric's confidence interval.",
        (*WHO, "metric", "bound"),
        registry=registry,
    )
    for row in report["metrics"]:
        if row["value"] is not None:
            value.labels(**who, metric=row["metric"]).set(row["value"])
        for end in BOUNDS:
            if row[end] is not None:
                bound.labels(**who, metric=row["metric"], bound=end).set(row[end])
    for name, text, figure in (
        ("verdict", "1 non-inferior, 0 undecided, -1 inferior.", VERDICTS[report["verdict"]]),
        ("prompts", "Prompts that both were asked.", report["n"]),
        ("time_seconds", "When it was measured, in Unix seconds.", now or time.time()),
    ):
        Gauge(prefix + name, text, WHO, registry=registry).labels(**who).set(figure)
    return generate_latest(registry).decode()


def write_exposition(path: Path, report: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all, as collectors may read it at any moment."""
    try:
        write_text(path, exposition(report))
    except OSError as problem:
        raise OutputError(f"{path}: cannot be written ({problem.strerror})") from problem
