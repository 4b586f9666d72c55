"""Queries to a Prometheus server over its HTTP API, /api/v1.

Works with Prometheus 2.42 and later, and with what speaks its API (Thanos, Mimir, VictoriaMetrics)
under any path prefix. User and password may stand in the URL (`http://user:word@host`).
"""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from compress_methods.errors import CompressError


class PrometheusError(CompressError):
    """A Prometheus that cannot be reached, is none, or refuses a query."""


@dataclass(frozen=True)
class Sample:
    """One series at one moment."""

    labels: dict[str, str]
    value: float


@dataclass(frozen=True)
class Line:
    """One series over time: (Unix seconds, value), in order, gaps left out."""

    labels: dict[str, str]
    points: list[tuple[float, float]]


class Prometheus:
    """A server at `url`. Every method raises `PrometheusError`; `timeout` is in seconds."""

    def __init__(self, url: str, timeout: float = 30.0) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise PrometheusError(
                f"Prometheus URL is {url!r}, expected something like http://localhost:9090"
            )
        host = parts.netloc.rpartition("@")[2]
        self.url = f"{parts.scheme}://{host}{parts.path.rstrip('/')}"
        self.timeout = timeout
        self._headers = {"Accept": "application/json"}
        if parts.username:
            user = f"{urllib.parse.unquote(parts.username)}:"
            user += urllib.parse.unquote(parts.password or "")
            self._headers["Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()

    def query(self, expression: str, time: float | None = None) -> list[Sample]:
        """Every series of `expression` now, or at `time` in Unix seconds."""
        when = {} if time is None else {"time": repr(time)}
        data = self.get("query", query=expression, **when)
        if data.get("resultType") == "scalar":
            return [Sample({}, float(data["result"][1]))]
        return [Sample(row["metric"], float(row["value"][1])) for row in data["result"]]

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
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        request = urllib.request.Request(url, headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                body = answer.read()
        except urllib.error.HTTPError as problem:
            raise PrometheusError(f"{self.url}: {_reason(problem)}") from problem
        except (OSError, ValueError, HTTPException) as problem:
            reason = getattr(problem, "reason", None) or problem
            raise PrometheusError(f"cannot reach Prometheus at {self.url}: {reason}") from problem
        data = _parsed(body).get("data")
        if not isinstance(data, dict):
            raise PrometheusError(f"{self.url}: answers, but not as Prometheus does")
        return data


def _reason(problem: urllib.error.HTTPError) -> str:
    """Prometheus' own words for why it refused, else the HTTP status."""
    said = _parsed(problem.read()).get("error")
    return str(said) if said else f"HTTP {problem.code} {problem.reason}"


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
