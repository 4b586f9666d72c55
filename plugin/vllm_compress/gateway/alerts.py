"""Whether a service's alerts allow more traffic on a variant: what Prometheus says, now.

An alert is the service's when its label `service` or `deployment` says so. Silence counts only from
a Prometheus that would speak: one that scrapes the variant and has alerting rules.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Mapping
from typing import Any

from vllm_compress.gateway.ask import get_json
from vllm_compress.gateway.split import GatewayError, Split

_BLIND = "no alert could fire there"
_REGARDLESS = "--no-alert-check goes up regardless"


def check_quiet(prometheus: str, split: Split, variant: str) -> None:
    """Raise `GatewayError` unless Prometheus watches `variant` and its service has no alert."""
    deployment = next(v.deployment for v in split.variants if v.name == variant)
    url = prometheus.rstrip("/")
    firing = [
        alert["labels"]
        for alert in _ask(url, "alerts")["alerts"]
        if alert["state"] == "firing" and concerns(alert["labels"], split)
    ]
    if firing:
        names = ", ".join(sorted({_name(labels) for labels in firing}))
        raise GatewayError(f"{split.service}: {variant} gets no more traffic while {names} fires")
    # JSON's escapes are PromQL's.
    series = f"vllm_compress_deployment_info{{deployment={json.dumps(deployment)}}}"
    if not _ask(url, "query", query=series)["result"]:
        raise GatewayError(f"{url}: {_BLIND}, it has no series of {deployment}; {_REGARDLESS}")
    if not any(group["rules"] for group in _ask(url, "rules", type="alert")["groups"]):
        raise GatewayError(f"{url}: {_BLIND}, it has no alerting rules; {_REGARDLESS}")


def concerns(labels: Mapping[str, str], split: Split) -> bool:
    """Whether an alert with these labels is about this service."""
    deployments = {variant.deployment for variant in split.variants}
    return labels.get("service") == split.service or labels.get("deployment") in deployments


def _name(labels: Mapping[str, str]) -> str:
    where = labels.get("deployment")
    return labels["alertname"] + (f" ({where})" if where else "")


def _ask(url: str, path: str, **parameters: str) -> Any:
    """`data` of an answer of Prometheus."""
    try:
        found = get_json(f"{url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
    except GatewayError as problem:
        raise GatewayError(f"{problem}; {_REGARDLESS}") from problem
    if not isinstance(found, dict) or found.get("status") != "success":
        raise GatewayError(f"{url}: does not answer like Prometheus")
    return found["data"]
