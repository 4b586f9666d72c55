"""Taking a server out of service without losing a request: the gateway first, then the server.

A vLLM that got SIGTERM finishes what it has (`--shutdown-timeout`), but still says on /health that
all is well and answers new requests with 500. So nothing new may come before the signal does: its
users go to another variant, and once the server has nothing left to do, it may stop.
"""

from __future__ import annotations

import os
import signal
import time

from compress_methods.system.http import HttpError, headers
from vllm_compress.metrics.series import NAMES
from vllm_compress.operations.gateway.traffic_split import GatewayError, TrafficSplit
from vllm_compress.operations.prometheus import scrape

PAUSE = 0.5
# A request that the gateway had just taken may not be in the server's numbers yet.
IDLE_IN_A_ROW = 3
BUSY = {NAMES.running, NAMES.waiting, "vllm:num_requests_running", "vllm:num_requests_waiting"}


def without(split: TrafficSplit, name: str) -> TrafficSplit:
    """The split with no user on a variant: the baseline takes those of a compressed one, and the
    compressed one with most users those of the baseline."""
    if name in split.compressed:
        return split.with_shares({name: 0})
    largest = max(split.compressed, key=lambda other: split.shares[other])
    return split.with_shares({largest: split.shares[largest] + split.shares[name]})


def wait_until_idle(address: str, patience: float) -> float:
    """Wait until the server at host:port has no request; the seconds it took. One that is gone has
    none. Raises `GatewayError` where it still has some after `patience` seconds, or cannot tell."""
    began = time.monotonic()
    idle, left = 0, 0.0
    while idle < IDLE_IN_A_ROW:
        if time.monotonic() - began > patience:
            raise GatewayError(
                f"{address}: still has {left:.0f} requests after {patience:.0f} s; it gets no new "
                "ones, so run this again, or stop it and lose them"
            )
        try:
            samples = scrape(f"http://{address}", headers=headers(), timeout=10.0)
        except HttpError as problem:
            if problem.status is None:
                return time.monotonic() - began
            raise GatewayError(f"{address}/metrics: {problem.what}") from problem
        found = [sample.value for sample in samples if sample.name in BUSY]
        if not found:
            raise GatewayError(f"{address}/metrics: says nothing of requests, as vLLM does")
        left = max(found)
        idle = idle + 1 if left == 0 else 0
        time.sleep(PAUSE)
    return time.monotonic() - began


def stop(pid: int) -> None:
    """Send SIGTERM; raises `GatewayError`."""
    try:
        os.kill(pid, signal.SIGTERM)
    except OSError as problem:
        raise GatewayError(f"--stop {pid}: {problem.strerror}") from problem
