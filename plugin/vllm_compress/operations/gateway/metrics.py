"""What a gateway counts, for Prometheus: per variant requests, codes, latency, servers, shares.

nginx tells of every request that it has answered in a datagram to this machine (`COUNTED` in
`nginx`): it never waits for us, and what is lost of a flood is missing in the counts alone. Labels
are bounded: variants are three at most, tenants those of the file of keys.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.server import ThreadingHTTPServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, MetricsHandler

from vllm_compress.metrics.series import LATENCY_BUCKETS, PREFIX
from vllm_compress.operations.gateway.servers import Places, servers_of
from vllm_compress.operations.gateway.traffic_split import WHOLE, GatewayError, TrafficSplit

NOBODY = "none"
BUFFER, PAUSE = 4 * 2**20, 0.2
FIELDS = 6
LABELS = ("deployment", "service", "variant")


class GatewayMetrics:
    """The collectors of one gateway, and how the log's lines become counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        prefix, registry = f"{PREFIX}gateway_", self.registry
        self.requests = Counter(
            f"{prefix}requests_total",
            "Requests answered, by the variant that did (none: the gateway itself) and HTTP code.",
            (*LABELS, "code", "tenant"),
            registry=registry,
        )
        self.seconds = Histogram(
            f"{prefix}request_seconds",
            "From a request's first byte at the gateway to the last byte of its answer.",
            LABELS,
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.repeated = Counter(
            f"{prefix}repeated_total",
            "Requests that a first server did not answer and another one was asked for.",
            LABELS,
            registry=registry,
        )
        self.up = Gauge(
            f"{prefix}server_up",
            "1 while a server answers the gateway's probes and gets requests, else 0.",
            (*LABELS, "server"),
            registry=registry,
        )
        self.share = Gauge(
            f"{prefix}share_ratio",
            "Share of the users that meet a variant, 0 to 1.",
            LABELS,
            registry=registry,
        )
        self._split: TrafficSplit | None = None

    def show(self, split: TrafficSplit, places: Places, down: Collection[str]) -> None:
        """Take over how things stand."""
        if self._split is None or _names(self._split) != _names(split):
            for name in split.shares:
                self.repeated.labels(**_labels(split, name))
                self.seconds.labels(**_labels(split, name))
        self._split = split
        self.up.clear()
        for variant in split.variants:
            labels = _labels(split, variant.name)
            self.share.labels(**labels).set(variant.share / WHOLE)
            for server in servers_of(variant, places):
                self.up.labels(**labels, server=server).set(server not in down)

    def count(self, line: str) -> None:
        """One line of nginx, `<190>Nov 30 07:00:00 nginx: 200|int4|int4|search|0.125|10.0.0.1:80`;
        what is not one is not counted."""
        fields = line.rpartition(" nginx: ")[2].strip().split("|")
        if len(fields) != FIELDS or self._split is None:
            return
        code, answered, first, tenant, seconds, servers = fields
        if answered not in self._split.shares and answered:
            return
        labels = _labels(self._split, answered or NOBODY)
        self.requests.labels(**labels, code=code, tenant=tenant).inc()
        if answered:
            self.seconds.labels(**labels).observe(float(seconds))
        if ("," in servers or " : " in servers) and first in self._split.shares:
            self.repeated.labels(**_labels(self._split, first)).inc()


def _names(split: TrafficSplit) -> list[str]:
    return [variant.deployment for variant in split.variants]


def _labels(split: TrafficSplit, name: str) -> Mapping[str, str]:
    deployments = {variant.name: variant.deployment for variant in split.variants}
    return {
        "deployment": deployments.get(name, NOBODY),
        "service": split.service,
        "variant": name,
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True


class _ServerOf6(_Server):
    address_family = socket.AF_INET6


@contextmanager
def serving(metrics: GatewayMetrics, host: str, port: int) -> Iterator[None]:
    """Listen to nginx and answer Prometheus, both at `port`, while the block lasts."""
    kind = _ServerOf6 if ":" in host else _Server
    with ExitStack() as stack:
        told = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        try:
            told.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            told.bind(("127.0.0.1", port))
            server = kind((host, port), MetricsHandler.factory(metrics.registry))
        except OSError as problem:
            raise GatewayError(f"--metrics-port {port}: {problem.strerror}") from problem
        stack.callback(server.server_close)
        told.settimeout(PAUSE)
        ended = threading.Event()

        def listen() -> None:
            while not ended.is_set():
                try:
                    metrics.count(told.recv(4096).decode(errors="replace"))
                except (TimeoutError, ValueError):
                    continue

        listener = threading.Thread(target=listen, daemon=True)
        answerer = threading.Thread(target=server.serve_forever, args=(PAUSE,), daemon=True)
        for thread in (listener, answerer):
            thread.start()
            stack.callback(thread.join)
        stack.callback(ended.set)
        stack.callback(server.shutdown)
        yield
