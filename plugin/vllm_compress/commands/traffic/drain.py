"""`vllm-compress drain`: take a server out of service, so that stopping it loses nothing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from compress_methods.errors import nearest
from vllm_compress.operations.gateway.control import NginxGateway
from vllm_compress.operations.gateway.drain import stop, wait_until_idle, without
from vllm_compress.operations.gateway.traffic_split import GatewayError, percent

DESCRIPTION = """\
Send a variant's users to another one, wait until its server has finished what it has, and say so
(or stop it). Only then SIGTERM loses nothing: a server that shuts down answers new requests 500."""
EPILOG = """\
Users of a compressed variant go to the baseline, those of the baseline to the compressed variant
that has most. The order of a restart: drain, stop, start, wait for /health, then the rollout that
this prints. In Kubernetes the pods' readiness and preStop do the same.

exit code: 0 nothing is left to do there, 2 it still has requests, or cannot be asked.

examples:
  vllm-compress drain --gateway gateway --variant int4 && systemctl restart chat-int4
  vllm-compress drain --gateway gateway --variant full --stop "$(cat full.pid)"
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("drain", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "--gateway", metavar="DIR", required=True, help="folder of `vllm-compress gateway`"
    )
    parser.add_argument("--variant", metavar="NAME", required=True, help="whose server shall stop")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds to wait (default 600)"
    )
    parser.add_argument("--stop", type=int, metavar="PID", help="then send it SIGTERM")


def run(args: argparse.Namespace) -> int:
    gateway = NginxGateway(Path(args.gateway))
    with gateway.lock():
        before = gateway.live()
        if args.variant not in before.shares:
            choice = nearest(args.variant, before.shares)
            raise GatewayError(f"{before.service}: no variant {args.variant!r}; {choice}")
        after = without(before, args.variant)
        if after != before:
            gateway.check(after)
            gateway.apply(after)
    back = " && ".join(
        f"vllm-compress rollout --gateway {args.gateway} --variant {name} --to {percent(share)}"
        for name, share in before.shares.items()
        if name in before.compressed and share != after.shares[name]
    )
    print(f"{after.service}: {after}", flush=True)
    drained = next(v for v in after.variants if v.name == args.variant)
    seconds = sum(wait_until_idle(server, args.timeout) for server in drained.servers)
    if args.stop is not None:
        stop(args.stop)
    print(f"{args.variant}: nothing left to do at {drained.address} after {seconds:.1f} s")
    if back:
        print(f"once it is back: {back}", file=sys.stderr)
    return 0
