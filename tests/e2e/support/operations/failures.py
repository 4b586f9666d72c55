"""A gateway on servers that are already there, one of which can be made to fail.

    with failing(folder, full, other) as failing:
        with failing.clients.keep_asking():
            failing.hang()

Answers are not streamed: one that has begun cannot be asked of another server.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.e2e.support.operations.nginx import Nginx
from tests.e2e.support.operations.operation import Clients
from tests.e2e.support.server import VllmServer, free_port
from vllm_compress.operations.gateway.control import NginxGateway
from vllm_compress.operations.gateway.nginx import Listening, write_gateway
from vllm_compress.operations.gateway.traffic_split import Variant, all_to_baseline
from vllm_compress.operations.gateway.watch import Watch

NAME = "int4.example"
# Silence after which another server is asked: a busy machine answers within it.
PATIENCE, PROBE_SECONDS, HALF = 6, 0.5, 5000
ANSWERS, DEADLINE = 24, 60.0


@dataclass
class Failing:
    """Half of the users are those of `other`, which has a name that can be lost."""

    folder: Path
    clients: Clients
    other: VllmServer
    known: dict[str, bool] = field(default_factory=lambda: {NAME: True})

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, self.clients.lost
            time.sleep(0.1)

    def answered(self, variant: str) -> None:
        """Wait until so many more answers came, some of them of a variant."""
        before = len(self.clients.answers)
        self.wait(lambda: len(self.clients.answers) >= before + ANSWERS)
        self.wait(lambda: any(a.variant == variant for a in self.clients.answers[before:]))

    def _servers(self) -> str:
        return (self.folder / "servers.conf").read_text(encoding="utf-8")

    def hang(self) -> None:
        """It answers nothing, is taken out, and comes back when it goes on."""
        self.other.signal(signal.SIGSTOP)
        self.wait(lambda: " down" in self._servers())
        self.answered("full")
        self.other.signal(signal.SIGCONT)
        self.wait(lambda: " down" not in self._servers())
        self.answered("int4")

    def lose_name(self) -> None:
        """Its name is unknown, and it is asked on where it was."""
        self.known[NAME] = False
        time.sleep(2 * PROBE_SECONDS)
        self.answered("int4")

    def kill(self) -> None:
        self.other.signal(signal.SIGKILL)
        self.wait(lambda: " down" in self._servers())
        self.answered("full")


@contextmanager
def failing(folder: Path, full: VllmServer, other: VllmServer) -> Iterator[Failing]:
    """nginx and what `gateway --run` does beside it."""
    listening = Listening("127.0.0.1", free_port(), patience=PATIENCE)
    made = Failing(folder, Clients(listening.port, streams=False), other)
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        if host in made.known:
            if not made.known[host]:
                raise socket.gaierror("name lost")
            return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 0))]
        return real(host, *arguments, **options)

    variants = [
        Variant("full", "chat-full", f"127.0.0.1:{full.port}"),
        Variant("int4", "chat-int4", f"{NAME}:{other.port}"),
    ]
    with patch.object(socket, "getaddrinfo", getaddrinfo):
        split = all_to_baseline("chat", "full", variants).with_shares({"int4": HALF})
        write_gateway(folder, split, listening)
        with Nginx(folder), Watch(NginxGateway(folder), seconds=PROBE_SECONDS).running():
            yield made
