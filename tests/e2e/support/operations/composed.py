"""The services of deploy/compose as processes of this machine, for tests.

    stack = Stack(folder, {"full": directory, "int4": directory})
    with stack.server("full") as full, stack.server("int4"), stack.gateway() as gateway: ...

Commands come from compose.yaml and deployment files from beside it. What has to differ on one
machine is put in their place: paths of volumes, and the addresses of services.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import REPOSITORY
from tests.e2e.support.operations.nginx import Nginx, nginx_program
from tests.e2e.support.operations.prometheus import Prometheus
from tests.e2e.support.server import FEWER_PROCESSES, VllmServer, free_port

COMPOSE = REPOSITORY / "deploy" / "compose"
CLI = [sys.executable, "-m", "vllm_compress.cli"]
# For the small model on a busy machine: starts quickly, and the services share two cores.
SMALL = ["--host=127.0.0.1", "--enforce-eager", "--max-model-len=512", "--max-num-seqs=32"]
PORTS = ("full", "int4", "gateway", "gateway-metrics", "prometheus")
# Objectives that a busy machine keeps: alerts of missing them would stop rollouts.
BUSY = {"ttft": 60.0, "tpot": 10.0}


class Composed(VllmServer):
    """A server whose command is the compose file's."""

    def __init__(self, command: list[str], port: int) -> None:
        super().__init__(".", env=FEWER_PROCESSES)
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.command = [*CLI, *command, f"--port={port}", *SMALL]


class Stack:
    """compose.yaml, localized to `folder`; `models` are the directories of the two servers."""

    def __init__(self, folder: Path, models: Mapping[str, Path]) -> None:
        self.folder = folder
        self.services: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())[
            "services"
        ]
        self.ports = {name: free_port() for name in PORTS}
        self._places = {
            "/etc/vllm-compress": str(folder / "deployments"),
            "/var/lib/vllm-compress": str(folder / "state"),
            "=full:8000": f"=127.0.0.1:{self.ports['full']}",
            "=int4:8000": f"=127.0.0.1:{self.ports['int4']}",
            "--metrics-port=9145": f"--metrics-port={self.ports['gateway-metrics']}",
            "--port=8080": f"--port={self.ports['gateway']}",
        }
        (folder / "deployments").mkdir(parents=True)
        (folder / "state").mkdir()
        for name in ("full", "int4"):
            block = yaml.safe_load((COMPOSE / "deployments" / f"{name}.yaml").read_text())
            assert block["model"] == f"/models/{name}"
            block["model"] = str(models[name])
            block["objectives"] |= BUSY
            (folder / "deployments" / f"{name}.yaml").write_text(yaml.safe_dump(block))

    def command(self, service: str) -> list[str]:
        """A service's command with the places of this machine."""
        return [self._localize(word) for word in self.services[service]["command"]]

    def _localize(self, word: str) -> str:
        for there, here in self._places.items():
            word = word.replace(there, here)
        return word

    def server(self, service: str) -> Composed:
        return Composed(self.command(service), self.ports[service])

    @property
    def state(self) -> Path:
        """The gateway's folder."""
        return self.folder / "state" / "gateway"

    def gateway(self) -> Nginx:
        nginx_program()
        return Nginx(self.state, [*CLI, *self.command("gateway"), "--host=127.0.0.1"])

    @property
    def rules(self) -> Path:
        """The rule files that Prometheus reads."""
        return self.folder / "rules"

    def prometheus(self) -> Prometheus:
        """As composed, but reading every two seconds, so that a test needs not wait."""
        mounted = dict(
            volume.removesuffix(":ro").split(":")
            for volume in self.services["prometheus"]["volumes"]
        )
        rules, targets = self.rules, self.folder / "targets"
        rules.mkdir()
        targets.mkdir()
        here = {there: COMPOSE / source for source, there in mounted.items()}
        for path in here["/etc/prometheus/rules"].glob("*.yml"):
            (rules / path.name).write_text(path.read_text())
        text = here["/etc/prometheus/targets/vllm.yml"].read_text()
        metrics = self.ports["gateway-metrics"]
        text = text.replace("gateway:9145", f"127.0.0.1:{metrics}")
        for name in ("full", "int4"):
            text = text.replace(f"{name}:8000", f"127.0.0.1:{self.ports[name]}")
        (targets / "vllm.yml").write_text(text)
        config = here["/etc/prometheus/prometheus.yml"].read_text()
        for path in ("rules", "targets"):
            config = config.replace(f"[{path}/*.yml]", f"[{self.folder}/{path}/*.yml]")
        block = yaml.safe_load(config)
        block["global"] = {"scrape_interval": "2s", "evaluation_interval": "1s"}
        own = ("--config.file", "--storage.tsdb.path")
        flags = [flag for flag in self.command("prometheus") if not flag.startswith(own)]
        return Prometheus(yaml.safe_dump(block), *flags, port=self.ports["prometheus"])
