"""`vllm-compress rollout`: change how a running gateway splits its users.

Up only while Prometheus knows the variant and no alert of its service fires; down always.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_compress.operations.gateway.alerts import check_quiet
from vllm_compress.operations.gateway.control import NginxGateway
from vllm_compress.operations.gateway.route import Route, SplitMap
from vllm_compress.operations.gateway.traffic_split import TrafficSplit, parse_percent, percent

DESCRIPTION = """\
Change a variant's share of the users while the gateway runs; no request is dropped. Without --to,
show the split. A rise is refused while an alert of the service fires, or when Prometheus cannot
tell; going down is always allowed."""
EPILOG = """\
An alert is the service's if its label `service` or `deployment` is. --gateway works where nginx
runs, as in `docker compose exec gateway vllm-compress rollout ...`, --route and --config-map
wherever kubectl does. Gateways follow a ConfigMap within a minute or so.

--json prints one object with the keys
  service, variant   what was changed; from, to are its shares in percent
  split              percent of every variant, now
  changed            whether anything was
  seconds            until the new split was live (null if unchanged)

examples:
  vllm-compress rollout --gateway gateway --to 10%
  vllm-compress rollout --gateway gateway --to 50% --prometheus http://prometheus:9090
  vllm-compress rollout --route chat --namespace models --to 0%
"""
PROMETHEUS = "http://127.0.0.1:9090"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("rollout", description=DESCRIPTION, epilog=EPILOG)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--gateway", metavar="DIR", help="folder of `vllm-compress gateway`")
    where.add_argument("--route", metavar="NAME", help="HTTPRoute in a Kubernetes cluster")
    where.add_argument("--config-map", metavar="NAME", help="which gateways in a cluster --follow")
    parser.add_argument("--namespace", help="of the HTTPRoute or ConfigMap")
    parser.add_argument("--context", help="kubectl's context")
    parser.add_argument("--to", metavar="N%", help="share of the users it shall have")
    parser.add_argument("--variant", metavar="NAME", help="which; needed where two are compressed")
    alerts = parser.add_mutually_exclusive_group()
    alerts.add_argument(
        "--prometheus", metavar="URL", default=PROMETHEUS, help=f"default {PROMETHEUS}"
    )
    alerts.add_argument(
        "--no-alert-check", action="store_true", help="go up without asking Prometheus"
    )
    parser.add_argument("--dry-run", action="store_true", help="check all, change nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    share = None if args.to is None else parse_percent(args.to, "--to")
    gateway: NginxGateway | Route | SplitMap
    if args.route:
        gateway = Route(args.route, args.namespace, args.context)
    elif args.config_map:
        gateway = SplitMap(args.config_map, args.namespace, args.context)
    else:
        gateway = NginxGateway(Path(args.gateway))
    with gateway.lock():
        before = gateway.live()
        if share is None:
            shown = json.dumps(_shares(before), indent=2)
            print(shown if args.json else f"{before.service}: {before}")
            return 0
        name = before.pick(args.variant)
        after = gateway.stored().with_shares(_compressed_shares(before) | {name: share})
        seconds = _change(gateway, before, after, name, args)
    report(before, after, name, seconds, args)
    return 0


def _change(
    gateway: NginxGateway | Route | SplitMap,
    before: TrafficSplit,
    after: TrafficSplit,
    name: str,
    args: argparse.Namespace,
) -> float | None:
    """The seconds it took, None where nothing was done."""
    if after.shares[name] > before.shares[name] and not args.no_alert_check:
        check_quiet(args.prometheus, after, name)
    if after == before:
        return None
    gateway.check(after)
    return None if args.dry_run else gateway.apply(after)


def report(
    before: TrafficSplit,
    after: TrafficSplit,
    name: str,
    seconds: float | None,
    args: argparse.Namespace,
) -> None:
    """Print what happened, for people or programs."""
    old, new = before.shares[name], after.shares[name]
    if args.json:
        block = {
            "service": after.service,
            "variant": name,
            "from": old / 100,
            "to": new / 100,
            "split": _shares(before if args.dry_run else after),
            "changed": seconds is not None,
            "seconds": seconds,
        }
        print(json.dumps(block, indent=2))
        return
    how = "already there" if old == new else f"live after {seconds or 0:.1f} s"
    if args.dry_run:
        how = "nothing changed (--dry-run)"
    print(f"{after.service}: {name} {percent(old)} -> {percent(new)}; {after}; {how}")


def _compressed_shares(split: TrafficSplit) -> dict[str, int]:
    return {name: split.shares[name] for name in split.compressed}


def _shares(split: TrafficSplit) -> dict[str, float]:
    return {name: share / 100 for name, share in split.shares.items()}
