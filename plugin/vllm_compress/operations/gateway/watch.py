"""What `gateway --run` does beside nginx: find out which servers answer, and where they are now.

Every `seconds` each server is asked /health. One that says nothing, or 5xx, three times in a row
gets no more requests until it answers again: nginx by itself would ask a server that hangs, and
wait. Names are looked up anew, so that servers may come, go and move. Where all seem down it is the
gateway that sees nothing, and nothing changes. New keys, and shares that a followed file has got
(a ConfigMap), are taken over. What cannot be read is said once and changes nothing.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from compress_methods.errors import CompressError
from compress_methods.system.http import HttpError, fetch, headers
from vllm_compress.operations.gateway.control import NginxGateway
from vllm_compress.operations.gateway.metrics import GatewayMetrics
from vllm_compress.operations.gateway.servers import (
    Places,
    find_servers,
    read_places,
    servers_of,
    write_servers,
)
from vllm_compress.operations.gateway.tenants import write_keys
from vllm_compress.operations.gateway.traffic_split import GatewayError, TrafficSplit

FAILURES = 3
AT_A_TIME = 16
UNANSWERABLE = 500
# nginx takes one signal in before the next one comes.
SETTLE = 0.2


@dataclass
class Watch:
    """The rounds of one gateway. `follow` is a file whose shares it takes over."""

    gateway: NginxGateway
    seconds: float = 5.0
    keys: Path | None = None
    follow: Path | None = None
    metrics: GatewayMetrics | None = None
    _ended: threading.Event = field(default_factory=threading.Event)
    _changing: threading.Lock = field(default_factory=threading.Lock)
    _failed: dict[str, int] = field(default_factory=dict)
    _said: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Rounds in a thread while the block lasts; the first one waits its turn, as nginx starts
        meanwhile."""
        self._show(self.gateway.stored(), read_places(self.gateway.folder), set())

        def rounds() -> None:
            while not self._ended.wait(self.seconds):
                try:
                    self.round()
                except (CompressError, OSError) as problem:
                    self._say("gateway", str(problem))

        thread = threading.Thread(target=rounds, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join(self.seconds)

    def stop(self) -> None:
        """Change nothing any more; a change that is being made is finished first."""
        self._ended.set()
        with self._changing:
            time.sleep(SETTLE)

    def round(self) -> None:
        """Look at everything once."""
        split = self.gateway.stored()
        places = find_servers(split, read_places(self.gateway.folder))
        down = self._down(split, places)
        with self._changing:
            if self._ended.is_set():
                return
            split = self._followed(split)
            changed = write_servers(self.gateway.folder, split, places, down)
            changed = self._new_keys() or changed
            if changed:
                self.gateway.reload()
        self._show(split, places, down)

    def _show(self, split: TrafficSplit, places: Places, down: set[str]) -> None:
        if self.metrics is not None:
            self.metrics.show(split, places, down)

    def _say(self, about: str, what: str) -> None:
        if self._said.get(about, "") != what:
            self._said[about] = what
            print(f"{about}: {what or 'well again'}", file=sys.stderr, flush=True)

    def _down(self, split: TrafficSplit, places: Places) -> set[str]:
        """Servers that have failed often enough; none where it would be all."""
        servers = [server for v in split.variants for server in servers_of(v, places)]
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            answers = dict(zip(servers, pool.map(self._answers, servers), strict=True))
        self._failed = {
            server: 0 if well else self._failed.get(server, 0) + 1
            for server, well in answers.items()
        }
        down = {server for server, times in self._failed.items() if times >= FAILURES}
        if down == set(servers):
            self._say("servers", "none answers, so all are asked on")
            return set()
        self._say("servers", f"down: {', '.join(sorted(down))}" if down else "")
        return down

    def _answers(self, server: str) -> bool:
        try:
            fetch(f"http://{server}/health", headers=headers(), timeout=self.seconds)
        except HttpError as problem:
            return problem.status is not None and problem.status < UNANSWERABLE
        return True

    def _new_keys(self) -> bool:
        if self.keys is None:
            return False
        try:
            changed = write_keys(self.gateway.folder, self.keys)
        except GatewayError as problem:
            self._say("keys", str(problem))
            return False
        self._say("keys", "")
        return changed

    def _followed(self, split: TrafficSplit) -> TrafficSplit:
        """The split that the followed file wants, once nginx has taken it over."""
        if self.follow is None:
            return split
        try:
            wanted = followed(self.follow, split)
            if wanted != split:
                self.gateway.check(wanted)
                self.gateway.apply(wanted)
        except GatewayError as problem:
            self._say("shares", str(problem))
            return split
        self._say("shares", "")
        return wanted


def followed(path: Path, split: TrafficSplit) -> TrafficSplit:
    """The split with the shares that a file such as a mounted ConfigMap's split.json has."""
    try:
        found = TrafficSplit.from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError) as problem:
        raise GatewayError(f"{path}: not a split that vllm-compress wrote") from problem
    if set(found.shares) != set(split.shares):
        raise GatewayError(f"{path}: has {found}, the gateway {', '.join(split.shares)}")
    return split.with_shares({name: found.shares[name] for name in split.compressed})
