"""Whether a service's alerts allow more traffic on a variant: what Prometheus says, now.

An alert is the service's when its label `service` or `deployment` says so. Silence counts only from
a Prometheus that would speak: one that scrapes the variant and has alerting rules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from vllm_compress.gateway.split import GatewayError, Split
from vllm_compress.prometheus import Prometheus, PrometheusError

TIMEOUT = 10.0
_BLIND = "no alert could fire there"
_REGARDLESS = "--no-alert-check goes up regardless"


def check_quiet(url: str, split: Split, variant: str) -> None:
    """Raise `GatewayError` unless Prometheus watches `variant` and its service has no alert."""
    try:
        _check(Prometheus(url, timeout=TIMEOUT), split, variant)
    except PrometheusError as problem:
        raise GatewayError(f"{problem}; {_REGARDLESS}") from problem


def _check(prometheus: Prometheus, split: Split, variant: str) -> None:
    deployment = next(v.deployment for v in split.variants if v.name == variant)
    firing = [
        alert["labels"]
        for alert in prometheus.alerts()
        if alert["state"] == "firing" and concerns(alert["labels"], split)
    ]
    if firing:
        names = ", ".join(sorted({_name(labels) for labels in firing}))
        raise GatewayError(f"{split.service}: {variant} gets no more traffic while {names} fires")
    # JSON's escapes are PromQL's.
    series = f"vllm_compress_deployment_info{{deployment={json.dumps(deployment)}}}"
    if not prometheus.query(series):
        raise GatewayError(
            f"{prometheus.url}: {_BLIND}, it has no series of {deployment}; {_REGARDLESS}"
        )
    if not any(group["rules"] for group in prometheus.get("rules", type="alert")["groups"]):
        raise GatewayError(f"{prometheus.url}: {_BLIND}, it has no alerting rules; {_REGARDLESS}")


def concerns(labels: Mapping[str, str], split: Split) -> bool:
    """Whether an alert with these labels is about this service."""
    deployments = {variant.deployment for variant in split.variants}
    return labels.get("service") == split.service or labels.get("deployment") in deployments


def _name(labels: Mapping[str, str]) -> str:
    where = labels.get("deployment")
    return labels["alertname"] + (f" ({where})" if where else "")
