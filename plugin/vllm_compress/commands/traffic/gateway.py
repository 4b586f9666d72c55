"""`vllm-compress gateway`: one address for all variants of a service, as nginx or HTTPRoute."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress_methods.errors import nearest
from compress_methods.system.files import write_text
from vllm_compress.metrics.checkpoint_summary import FULL
from vllm_compress.operations.deployment_file import Deployment, load_deployment
from vllm_compress.operations.gateway.control import check_files, nginx_is_here, run_nginx
from vllm_compress.operations.gateway.nginx import (
    SPLIT_FILE,
    read_traffic_split,
    unknown_hosts,
    write_gateway,
)
from vllm_compress.operations.gateway.route import render_route
from vllm_compress.operations.gateway.traffic_split import (
    GatewayError,
    TrafficSplit,
    Variant,
    all_to_baseline,
    parse_percent,
)

DESCRIPTION = """\
Write the configuration of a gateway that splits a service's users between its variants. A user
stays with a variant; the response header X-Variant says which one answered."""
EPILOG = """\
A user is known by the header X-User-Id, else by the cookie user_id, else by Authorization, else by
address. So have clients send X-User-Id (extra_headers of OpenAI's client; what it calls `user` is
in the body, which nginx does not read): all that share a key, or come from a load balancer that is
not in --trust-proxy, are one user, and 50% of one user are all or nothing. The baseline is the
variant `full`, else the first --config, and gets what --weight leaves; without --weight the split
that is in DIR already stays, and a new gateway sends everybody to the baseline. Change the split
with `vllm-compress rollout`. All variants must be served under one name (served-model-name).

examples:
  vllm-compress gateway --config full.yaml --config int4.yaml --weight int4=30% -o gateway
  nginx -p gateway -c nginx.conf
  vllm-compress gateway --config full.yaml --config int4.yaml -o gateway --run
  vllm-compress gateway --config full.yaml --config int4.yaml -o . --kubernetes inference-gateway
"""
STRANGERS = (
    "users without X-User-Id or cookie user_id are told apart by API key, then address: "
    "those who share one are one user, and move all at once"
)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("gateway", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "--config",
        action="append",
        required=True,
        metavar="FILE",
        help="deployment file of a variant; once for each",
    )
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--weight", action="append", default=[], metavar="VARIANT=N%", help="share of its users"
    )
    parser.add_argument(
        "--address",
        action="append",
        default=[],
        metavar="VARIANT=HOST:PORT",
        help="where it answers, if not on this machine at the port of its file",
    )
    parser.add_argument("--host", default="0.0.0.0", help="to listen on (default: all of IPv4; ::)")
    parser.add_argument("--port", type=int, default=8080, help="port to listen on (default 8080)")
    parser.add_argument(
        "--trust-proxy",
        action="append",
        default=[],
        metavar="NETWORK",
        help="of a load balancer in front whose X-Forwarded-For says who asks, as 10.0.0.0/8",
    )
    parser.add_argument(
        "--run", action="store_true", help="then run nginx; SIGTERM lets it finish its streams"
    )
    parser.add_argument(
        "--kubernetes",
        metavar="GATEWAY",
        help="write httproute.yaml for this Gateway ([NAMESPACE/]NAME) instead of nginx.conf",
    )
    parser.add_argument(
        "--session",
        choices=("cookie", "header"),
        help="with --kubernetes: experimental session persistence, for clients that send it back",
    )


def run(args: argparse.Namespace) -> int:
    if args.session and not args.kubernetes:
        raise GatewayError("--session is for --kubernetes; nginx keeps users by hash")
    if args.run and args.kubernetes:
        raise GatewayError("--run starts nginx, --kubernetes writes for a cluster; choose one")
    if not 0 < args.port < 65536:
        raise GatewayError(f"--port is {args.port}, expected 1 to 65535")
    deployments = [load_deployment(path) for path in args.config]
    split = arrange_traffic(deployments, args.address, in_cluster=bool(args.kubernetes))
    shares = _pairs(args.weight, "--weight", split.compressed)
    folder = Path(args.output)
    return _route(args, split, shares) if args.kubernetes else _nginx(args, split, shares, folder)


def _nginx(
    args: argparse.Namespace, split: TrafficSplit, weights: dict[str, str], folder: Path
) -> int:
    if weights or not (folder / SPLIT_FILE).exists():
        split = _weigh(split, weights)
    else:
        kept = read_traffic_split(folder).shares
        split = split.with_shares({n: kept[n] for n in split.compressed if n in kept})

    def write(place: Path) -> None:
        write_gateway(place, split, args.host, args.port, args.trust_proxy)

    if args.run or nginx_is_here():
        check_files(write)
    write(folder)
    print(f"{folder}: {split.service} on port {args.port}, {split}", file=sys.stderr)
    print(STRANGERS, file=sys.stderr)
    for name in unknown_hosts(split):
        print(
            f"{name}: its host has no address, so its users go to another variant; once it has "
            "one, write this again or make any rollout",
            file=sys.stderr,
        )
    return run_nginx(folder) if args.run else 0


def _route(args: argparse.Namespace, split: TrafficSplit, weights: dict[str, str]) -> int:
    text = render_route(_weigh(split, weights), args.kubernetes, args.session)
    folder = Path(args.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "httproute.yaml", text)
    except OSError as problem:
        raise GatewayError(f"{folder}: cannot be written ({problem.strerror})") from problem
    print(folder / "httproute.yaml")
    return 0


def _weigh(split: TrafficSplit, weights: dict[str, str]) -> TrafficSplit:
    return split.with_shares(
        {name: parse_percent(text, f"--weight {name}") for name, text in weights.items()}
    )


def arrange_traffic(
    deployments: Sequence[Deployment], addresses: Sequence[str] = (), *, in_cluster: bool = False
) -> TrafficSplit:
    """The split of a service's deployments, the baseline having everything."""
    service = deployments[0].service
    names = []
    for deployment in deployments:
        if deployment.service != service:
            raise GatewayError(
                f"{deployment.name} belongs to the service {deployment.service}, "
                f"{deployments[0].name} to {service}; variants of one gateway share a service"
            )
        if deployment.variant is None:
            raise GatewayError(f"{deployment.name}: variant is not known; set it in its file")
        names.append(deployment.variant)
    _check_served_names(deployments)
    given = _pairs(addresses, "--address", names)
    variants = [_variant(deployment, given, in_cluster) for deployment in deployments]
    return all_to_baseline(service, FULL if FULL in names else names[0], variants)


def _variant(deployment: Deployment, given: dict[str, str], in_cluster: bool) -> Variant:
    name = str(deployment.variant)
    host = deployment.name if in_cluster else "127.0.0.1"
    address = f"{host}:{deployment.vllm.get('port', 8000)}"
    return Variant(name, deployment.name, given.get(name, address))


def _check_served_names(deployments: Sequence[Deployment]) -> None:
    """Clients name the model in every request, so it has to have that name everywhere."""
    served = {}
    for deployment in deployments:
        name = deployment.vllm.get("served-model-name", deployment.model)
        served[deployment.name] = set(name if isinstance(name, list) else [name])
    if not set.intersection(*served.values()):
        shown = ", ".join(f"{name} as {' '.join(sorted(found))}" for name, found in served.items())
        raise GatewayError(
            f"{deployments[0].service}: variants are served under different names ({shown}); "
            "give them the same served-model-name under `vllm`"
        )


def _pairs(texts: Sequence[str], option: str, valid: Sequence[str]) -> dict[str, str]:
    """VARIANT=VALUE, each variant once."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name in found:
            raise GatewayError(f"{option} is {text!r}, expected VARIANT=VALUE, each variant once")
        if name not in valid:
            raise GatewayError(f"{option}: no variant {name!r}; {nearest(name, valid)}")
        found[name] = value
    return found
