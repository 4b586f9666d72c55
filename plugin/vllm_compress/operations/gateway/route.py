"""A split as an HTTPRoute of the Kubernetes Gateway API, and changing it in a cluster.

The Gateway API draws a backend for every request by weight. It has no hash of a header, so users
do not stick by themselves. `session` asks for its experimental session persistence (GEP-1619): the
gateway then hands out a cookie or a header, clients that send it back stay where they are, and also
stay there when weights change, down to 0% included, until the session ends. X-Variant comes from a
filter of each backend, which implementations may leave out. Where users have to stick exactly, run
the nginx gateway in the cluster (deploy/kubernetes/components/nginx-gateway).

Service names are the deployments' names. nginx gateways in a cluster follow a ConfigMap instead,
which holds the split as split.conf does (`gateway --follow`).
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from vllm_compress.operations.gateway.traffic_split import WHOLE, GatewayError, TrafficSplit

ANNOTATION = "vllm-compress/split"
SPLIT_KEY = "split.json"
PATIENCE = 60.0
_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


def render_route(split: TrafficSplit, gateway: str, session: str | None = None) -> str:
    """The manifest. `gateway` is the Gateway's NAME or NAMESPACE/NAME, `session` `cookie`,
    `header` or None."""
    namespace, _, name = gateway.rpartition("/")
    parent = {"name": name} | ({"namespace": namespace} if namespace else {})
    for what in (split.service, *(variant.deployment for variant in split.variants)):
        if not _LABEL.fullmatch(what):
            raise GatewayError(
                f"{what!r} cannot name a Kubernetes object, expected lower-case letters, digits "
                "and - of which the first is a letter"
            )
    for variant in split.variants:
        if len(variant.servers) > 1:
            raise GatewayError(f"{variant.name}: a service of Kubernetes has one address")
    described = split.to_dict()
    for variant in described["variants"]:
        del variant["share"]
    rule: dict[str, Any] = {
        "matches": [
            {"path": {"type": "PathPrefix", "value": path}}
            for path in ("/v1", "/v2", "/tokenize", "/detokenize")
        ],
        "timeouts": {"request": "0s"},
        "backendRefs": [_backend(variant) for variant in split.variants],
    }
    if session is not None:
        rule["sessionPersistence"] = {
            "sessionName": "vllm-compress-variant",
            "type": session.capitalize(),
        }
    route = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": split.service, "annotations": {ANNOTATION: json.dumps(described)}},
        "spec": {"parentRefs": [parent], "rules": [rule]},
    }
    text: str = yaml.safe_dump(route, sort_keys=False, width=100)
    return text


def _backend(variant: Any) -> dict[str, Any]:
    name, _, port = variant.address.rpartition(":")
    header = {"name": "X-Variant", "value": variant.name}
    return {
        "name": name,
        "port": int(port),
        "weight": variant.share,
        "filters": [
            {"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [header]}}
        ],
    }


def read_route(route: dict[str, Any]) -> TrafficSplit:
    """The split of an HTTPRoute: who from the annotation, how much from the weights."""
    where = f"httproute {route['metadata']['name']}"
    text = route["metadata"].get("annotations", {}).get(ANNOTATION)
    if text is None:
        raise GatewayError(f"{where}: no annotation {ANNOTATION}; vllm-compress did not write it")
    try:
        block = json.loads(text)
        weights = {f"{b['name']}:{b['port']}": b.get("weight", 1) for b in _backends(route)}
        whole = sum(weights.values())
        for variant in block["variants"]:
            variant["share"] = round(weights[variant["address"]] * WHOLE / whole)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as problem:
        raise GatewayError(f"{where}: its backends are not those of {ANNOTATION}") from problem
    return TrafficSplit.from_dict(block, where)


def _backends(route: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = route["spec"]["rules"][0]["backendRefs"]
    return found


def patch(route: dict[str, Any], split: TrafficSplit) -> list[dict[str, Any]]:
    """JSON patch that sets the weights, and fails as a whole if the route has changed meanwhile."""
    version = route["metadata"]["resourceVersion"]
    shares = {variant.address: variant.share for variant in split.variants}
    operations = [{"op": "test", "path": "/metadata/resourceVersion", "value": version}]
    for index, backend in enumerate(_backends(route)):
        share = shares[f"{backend['name']}:{backend['port']}"]
        path = f"/spec/rules/0/backendRefs/{index}/weight"
        operations.append({"op": "add", "path": path, "value": share})
    return operations


@dataclass(frozen=True)
class _Object:
    """An object in a cluster, through kubectl."""

    name: str
    namespace: str | None = None
    context: str | None = None
    KIND: ClassVar[str] = ""

    def stored(self) -> TrafficSplit:
        """The same as is live: a cluster has one."""
        return self.live()

    def live(self) -> TrafficSplit:
        """The split that the cluster has stored."""
        raise NotImplementedError

    def _operations(self, split: TrafficSplit) -> list[dict[str, Any]]:
        """JSON patch to that split."""
        raise NotImplementedError

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Nothing: the patch names the version it is for."""
        yield

    def check(self, split: TrafficSplit) -> None:
        """Have the cluster check the change; nothing changes."""
        self._patch(split, "--dry-run=server")

    def _get(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._kubectl("get", "--output=json"))
        return found

    def _patch(self, split: TrafficSplit, *arguments: str) -> None:
        text = json.dumps(self._operations(split))
        self._kubectl("patch", "--type=json", f"--patch={text}", *arguments)

    def _kubectl(self, verb: str, *arguments: str) -> str:
        command = ["kubectl", verb, f"{self.KIND}/{self.name}"]
        command += [f"--namespace={self.namespace}"] if self.namespace else []
        command += [f"--context={self.context}"] if self.context else []
        try:
            done = subprocess.run(
                [*command, *arguments], capture_output=True, text=True, timeout=60, check=False
            )
        except FileNotFoundError as problem:
            raise GatewayError("kubectl is not installed") from problem
        except subprocess.TimeoutExpired as problem:
            raise GatewayError(f"kubectl {verb}: no answer within 60 s") from problem
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise GatewayError(f"kubectl {verb}: {said[-1]}")
        return done.stdout


class Route(_Object):
    """An HTTPRoute, whose weights are the shares."""

    KIND = "httproutes.gateway.networking.k8s.io"

    def live(self) -> TrafficSplit:
        return read_route(self._get())

    def _operations(self, split: TrafficSplit) -> list[dict[str, Any]]:
        return patch(self._get(), split)

    def apply(self, split: TrafficSplit) -> float:
        """Change the weights; the seconds until every gateway of the route has accepted them."""
        begin = time.monotonic()
        self._patch(split)
        while not _accepted(self._get()):
            if time.monotonic() > begin + PATIENCE:
                raise GatewayError(
                    f"httproute {self.name}: has {split}, but no gateway has accepted "
                    f"it within {PATIENCE:.0f} s; see `kubectl describe httproute {self.name}`"
                )
            time.sleep(0.5)
        return time.monotonic() - begin


class SplitMap(_Object):
    """A ConfigMap that nginx gateways follow. They read it when the kubelet has brought it to them,
    within a minute or so, which nobody here can see."""

    KIND = "configmap"

    def live(self) -> TrafficSplit:
        where = f"configmap {self.name}"
        try:
            return TrafficSplit.from_dict(json.loads(self._get()["data"][SPLIT_KEY]), where)
        except (KeyError, TypeError, ValueError) as problem:
            raise GatewayError(f"{where}: has no {SPLIT_KEY} that a gateway follows") from problem

    def _operations(self, split: TrafficSplit) -> list[dict[str, Any]]:
        version = self._get()["metadata"]["resourceVersion"]
        return [
            {"op": "test", "path": "/metadata/resourceVersion", "value": version},
            {"op": "add", "path": f"/data/{SPLIT_KEY}", "value": json.dumps(split.to_dict())},
        ]

    def apply(self, split: TrafficSplit) -> float:
        """Store the shares; the seconds it took."""
        begin = time.monotonic()
        self._patch(split)
        return time.monotonic() - begin


def _accepted(route: dict[str, Any]) -> bool:
    """Tell whether every gateway says that it follows the route as it is now."""
    generation = route["metadata"].get("generation")
    parents = route.get("status", {}).get("parents", [])
    return bool(parents) and all(
        any(
            condition["type"] == "Accepted"
            and condition["status"] == "True"
            and condition.get("observedGeneration") == generation
            for condition in parent["conditions"]
        )
        for parent in parents
    )
