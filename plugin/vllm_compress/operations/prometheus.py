"""Queries to a Prometheus server over its HTTP API, /api/v1.

Works with Prometheus 2.42 and later, and with what speaks its API (Thanos, Mimir, VictoriaMetrics)
under any path prefix. User and password may stand in the URL (`http://user:word@host`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from compress_methods.errors import CompressError
from compress_methods.system.http import HttpError, fetch

_PACKAGE = Path(__file__).resolve().parents[1]


def rules_directory() -> Path:
    """Where our recording and alerting rules are: in the wheel, or in a checkout's deploy/."""
    installed = _PACKAGE / "prometheus_rules"
    checkout = _PACKAGE.parents[1] / "deploy" / "prometheus" / "rules"
    return installed if installed.is_dir() else checkout


class PrometheusError(CompressError):
    """A Prometheus that cannot be reached, is none, or refuses a query."""


@dataclass(frozen=True)
class Line:
    """One series over time: (Unix seconds, value), in order, gaps left out."""

    labels: dict[str, str]
    points: list[tuple[float, float]]


def scrape(url: str, **options: Any) -> list[Sample]:
    """Read every sample that the server at `url` shows on its /metrics; `options` are httpx's."""
    families = text_string_to_metric_families(fetch(f"{url}/metrics", **options).text)
    return [sample for family in families for sample in family.samples]


class Prometheus:
    """A server at `url`. Every method raises `PrometheusError`; `timeout` is in seconds."""

    def __init__(self, url: str, timeout: float = 30.0) -> None:
        try:
            given = httpx.URL(url)
        except httpx.InvalidURL:
            given = httpx.URL()
        if given.scheme not in ("http", "https") or not given.host:
            raise PrometheusError(
                f"Prometheus URL is {url!r}, expected something like http://localhost:9090"
            )
        self._auth = (given.username, given.password) if given.username else None
        self.url = str(given.copy_with(userinfo=b"", query=None, fragment=None)).rstrip("/")
        self.timeout = timeout

    def query(self, expression: str, time: float | None = None) -> list[Sample]:
        """Every series of `expression` now, or at `time` in Unix seconds."""
        when = {} if time is None else {"time": repr(time)}
        data = self.get("query", query=expression, **when)
        if data.get("resultType") == "scalar":
            return [Sample("", {}, float(data["result"][1]))]
        return [Sample("", row["metric"], float(row["value"][1])) for row in data["result"]]

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[Line]:
        """Every series of `expression` from `start` to `end`, a point each `step` seconds."""
        data = self.get(
            "query_range", query=expression, start=repr(start), end=repr(end), step=repr(step)
        )
        return [
            Line(row["metric"], [(float(at), float(value)) for at, value in row["values"]])
            for row in data["result"]
        ]

    def alerts(self) -> list[dict[str, Any]]:
        """Alerts pending or firing: `labels`, `annotations`, `state`, `activeAt`."""
        found: list[dict[str, Any]] = self.get("alerts")["alerts"]
        return found

    def get(self, path: str, **parameters: str) -> dict[str, Any]:
        """`data` of the answer to /api/v1/PATH."""
        options = {"params": parameters, "auth": self._auth, "timeout": self.timeout}
        try:
            data = fetch(f"{self.url}/api/v1/{path}", **options).json()["data"]
        except HttpError as problem:
            how = "cannot reach Prometheus at " if problem.status is None else ""
            raise PrometheusError(f"{how}{self.url}: {problem.what}") from problem
        except (ValueError, KeyError, TypeError):
            data = None
        if not isinstance(data, dict):
            raise PrometheusError(f"{self.url}: answers, but not as Prometheus does")
        return data
