"""`rollout --route` through the real kubectl, against an API server that has one HTTPRoute.

There is no cluster here. The server answers discovery, GET and JSON patch as Kubernetes' REST
conventions say (https://kubernetes.io/docs/reference/using-api/api-concepts/), no more.
"""

from __future__ import annotations

import copy
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY
from vllm_compress.cli import main
from vllm_compress.operations.gateway.route import read_route, render_route
from vllm_compress.operations.gateway.traffic_split import (
    TrafficSplit,
    Variant,
    all_to_baseline,
)

pytestmark = pytest.mark.e2e
GROUP = "gateway.networking.k8s.io"
OBJECT = f"/apis/{GROUP}/v1/namespaces/models/httproutes/chat"
MAP = "/api/v1/namespaces/models/configmaps/chat-split"
VERSION = {"groupVersion": f"{GROUP}/v1", "version": "v1"}
DISCOVERY: dict[str, Any] = {
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/api/v1": {
        "kind": "APIResourceList",
        "groupVersion": "v1",
        "resources": [
            {
                "name": "configmaps",
                "singularName": "configmap",
                "namespaced": True,
                "kind": "ConfigMap",
                "verbs": ["get", "patch"],
            }
        ],
    },
    "/apis": {
        "kind": "APIGroupList",
        "apiVersion": "v1",
        "groups": [{"name": GROUP, "versions": [VERSION], "preferredVersion": VERSION}],
    },
    f"/apis/{GROUP}/v1": {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": f"{GROUP}/v1",
        "resources": [
            {
                "name": "httproutes",
                "singularName": "httproute",
                "namespaced": True,
                "kind": "HTTPRoute",
                "verbs": ["get", "patch"],
            }
        ],
    },
}


class Conflict(Exception):
    """A patch whose test failed."""


class ApiServer:
    """One object, the HTTPRoute `models/chat`, whose gateway accepts every version at once, or the
    ConfigMap at `place`."""

    def __init__(self, route: dict[str, Any], place: str = OBJECT) -> None:
        self.route, self.place = route, place
        self.requests: list[str] = []
        self.edited_meanwhile = False
        self._store(route)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> ApiServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _store(self, route: dict[str, Any]) -> None:
        generation = route["metadata"].get("generation", 0) + 1
        route["metadata"] |= {
            "namespace": "models",
            "generation": generation,
            "resourceVersion": str(1000 + generation),
        }
        accepted = {"type": "Accepted", "status": "True", "observedGeneration": generation}
        route["status"] = {"parents": [{"conditions": [accepted]}]}
        self.route = route

    def patch(self, operations: list[dict[str, Any]], dry: bool) -> dict[str, Any]:
        """RFC 6902, the two operations that are sent."""
        if self.edited_meanwhile:
            self._store(self.route)
        route = copy.deepcopy(self.route)
        for operation in operations:
            *path, last = operation["path"].strip("/").split("/")
            place: Any = route
            for key in path:
                place = place[int(key) if isinstance(place, list) else key]
            if operation["op"] == "test":
                if place[last] != operation["value"]:
                    raise Conflict(f"test of {operation['path']} failed")
            else:
                assert operation["op"] in ("add", "replace")
                place[last] = operation["value"]
        if not dry:
            self._store(route)
        return route

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                self._reply(api.route if path == api.place else DISCOVERY.get(path))

            def do_PATCH(self) -> None:
                path, _, query = self.path.partition("?")
                api.requests.append(f"PATCH {self.path}")
                assert self.headers["Content-Type"] == "application/json-patch+json"
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                try:
                    done = api.patch(body, "dryRun=All" in query)
                    self._reply(done if path == api.place else None)
                except Conflict as problem:
                    self._reply({"message": str(problem)}, 422)

            def _reply(self, found: dict[str, Any] | None, code: int = 200) -> None:
                if found is None:
                    found, code = {"message": "not found", "reason": "NotFound"}, 404
                if code != 200:
                    found = {"kind": "Status", "apiVersion": "v1", "status": "Failure"} | found
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(found).encode())

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    variants = [Variant(v, f"chat-{v}", f"chat-{v}:8000") for v in ("full", "int4")]
    split = all_to_baseline("chat", "full", variants).with_shares({"int4": 3000})
    with ApiServer(yaml.safe_load(render_route(split, "inference"))) as running:
        kubectl_asks(running, tmp_path, monkeypatch)
        yield running


def kubectl_asks(server: ApiServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": server.url}}],
        "contexts": [{"name": "test", "context": {"cluster": "test"}}],
    }
    (folder / "config").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(folder / "config"))
    monkeypatch.setenv("HOME", str(folder))


def rollout(*arguments: str) -> int:
    return main(["rollout", "--route", "chat", "--namespace", "models", *arguments])


def test_weights_follow_and_dry_runs_change_nothing(
    api: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rollout() == 0
    assert capsys.readouterr().out == "chat: int4 30%, full 70%\n"
    assert rollout("--to", "0%", "--dry-run") == 0
    assert read_route(api.route).shares["int4"] == 3000
    assert ["dryRun=All" in request for request in api.requests] == [True]
    assert rollout("--to", "50%", "--no-alert-check") == 0
    assert read_route(api.route).shares == {"int4": 5000, "full": 5000}
    assert rollout("--to", "0%", "--context", "test") == 0
    assert read_route(api.route).shares == {"int4": 0, "full": 10000}


def test_going_up_asks_prometheus_in_a_cluster_too(
    api: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rollout("--to", "50%", "--prometheus", api.url) == 2
    assert ": HTTP 404" in capsys.readouterr().err
    assert not api.requests


def test_a_route_that_someone_else_changed_meanwhile_is_left_alone(
    api: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    api.edited_meanwhile = True
    assert rollout("--to", "0%") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "kubectl patch: " in line
    assert read_route(api.route).shares["int4"] == 3000


def test_a_route_that_is_not_there_is_one_line(
    api: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rollout", "--route", "chats", "--namespace", "models", "--to", "0%"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "kubectl get: " in line


def test_the_split_that_gateways_follow_is_changed_in_its_config_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one that deploy/kubernetes has."""
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    gateway = REPOSITORY / "deploy/kubernetes/components/nginx-gateway/gateway.yaml"
    objects = list(yaml.safe_load_all(gateway.read_text()))
    (made,) = (one for one in objects if one["kind"] == "ConfigMap")
    arguments = ["rollout", "--config-map", "chat-split", "--namespace", "models"]
    with ApiServer(made, MAP) as api:
        kubectl_asks(api, tmp_path, monkeypatch)
        assert main([*arguments, "--to", "20%", "--no-alert-check"]) == 0
        assert "int4 0% -> 20%; int4 20%, full 80%" in capsys.readouterr().out
        stored = TrafficSplit.from_dict(json.loads(api.route["data"]["split.json"]), "here")
        assert stored.shares == {"int4": 2000, "full": 8000}
        api.edited_meanwhile = True
        assert main([*arguments, "--to", "0%"]) == 2
        assert "kubectl patch: " in capsys.readouterr().err
        api.edited_meanwhile = False
        api.route["data"] = {}
        assert main([*arguments, "--to", "0%"]) == 2
        assert "configmap chat-split: has no split.json" in capsys.readouterr().err
