"""Whether a service's alerts allow more traffic on a variant: what Prometheus says, now.

An alert is the service's when its label `service` or `deployment` says so. Silence counts only from
a Prometheus that would speak: one that scrapes the variant and has alerting rules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from vllm_compress.metrics.series import NAMES
from vllm_compress.operations.gateway.traffic_split import GatewayError, TrafficSplit
from vllm_compress.operations.prometheus import Prometheus, PrometheusError, rules_directory

TIMEOUT = 10.0
_BLIND = "no alert could fire there"
_REGARDLESS = "--no-alert-check goes up regardless"


def check_quiet(url: str, split: TrafficSplit, variant: str) -> None:
    """Raise `GatewayError` unless Prometheus watches `variant` and its service has no alert."""
    try:
        _check(Prometheus(url, timeout=TIMEOUT), split, variant)
    except PrometheusError as problem:
        raise GatewayError(f"{problem}; {_REGARDLESS}") from problem


def _check(prometheus: Prometheus, split: TrafficSplit, variant: str) -> None:
    """Check alerts first: one that fires is the reason that helps most."""
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
    series = f"{NAMES.info}{{deployment={json.dumps(deployment)}}}"
    if not prometheus.query(series):
        raise GatewayError(
            f"{prometheus.url}: {_BLIND}, it has no series of {deployment}; {_REGARDLESS}"
        )
    if not any(group["rules"] for group in prometheus.get("rules", type="alert")["groups"]):
        raise GatewayError(
            f"{prometheus.url}: {_BLIND}, it has no alerting rules (ours: {rules_directory()}); "
            + _REGARDLESS
        )


def concerns(labels: Mapping[str, str], split: TrafficSplit) -> bool:
    """Tell whether an alert with these labels is about this service."""
    deployments = {variant.deployment for variant in split.variants}
    return labels.get("service") == split.service or labels.get("deployment") in deployments


def _name(labels: Mapping[str, str]) -> str:
    where = labels.get("deployment")
    return labels["alertname"] + (f" ({where})" if where else "")
