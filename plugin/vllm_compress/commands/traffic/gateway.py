"""`vllm-compress gateway`: one address for all variants of a service, as nginx or HTTPRoute."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from compress_methods.errors import nearest
from compress_methods.system.files import write_text
from vllm_compress.metrics.checkpoint_summary import FULL
from vllm_compress.operations.deployment_file import Deployment, load_deployment
from vllm_compress.operations.gateway.control import (
    NginxGateway,
    check_files,
    nginx_is_here,
    run_nginx,
)
from vllm_compress.operations.gateway.nginx import (
    SPLIT_FILE,
    Listening,
    read_traffic_split,
    write_gateway,
)
from vllm_compress.operations.gateway.route import render_route
from vllm_compress.operations.gateway.servers import unknown_hosts
from vllm_compress.operations.gateway.tenants import Limits
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

A request that nobody answered goes to another server of the variant, then to another variant: the
connection was refused or broke, the answer was 500 or 503, or none came within --answer-timeout.
Not repeated: answers that have begun, and what servers keep (anything but completions, embeddings,
scores, tokens). With --run servers are asked /health; one that hangs gets no more requests.
--metrics-port adds vllm_compress_gateway_* for Prometheus: requests, codes and seconds per variant,
requests repeated, servers up, shares. The access log names no user, key or text of a request.

--keys FILE has a line `TENANT: KEY`, or `TENANT: [OLD, NEW]`, for each tenant; others are answered
401, servers get VLLM_API_KEY. With --run a changed file is read again.

examples:
  vllm-compress gateway --config full.yaml --config int4.yaml --weight int4=30% -o gateway
  vllm-compress gateway --config full.yaml --config int4.yaml -o gateway --run \\
    --address int4=10.0.0.1:8000,10.0.0.2:8000 --metrics-port 9145 --keys keys.yaml --rate 10
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
        metavar="VARIANT=HOST:PORT,...",
        help="where it answers, if not on this machine at the port of its file; several servers "
        "with commas between, which share its requests by fewest connections",
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
    _add_front(parser)
    parser.add_argument(
        "--run", action="store_true", help="then run nginx; SIGTERM lets it finish its streams"
    )
    parser.add_argument(
        "--follow",
        metavar="FILE",
        help="with --run: take over the shares of a split.json, as a ConfigMap mounts it",
    )
    parser.add_argument(
        "--health-interval",
        type=float,
        default=5.0,
        metavar="S",
        help="with --run: seconds between probes of a server, and until one has failed; three that "
        "fail in a row take it out, one that answers brings it back (5)",
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


def _add_front(parser: argparse.ArgumentParser) -> None:
    """Options of what nginx does for clients, whichever variant answers."""
    add = parser.add_argument
    add("--tls-certificate", type=Path, metavar="PEM", help="serve HTTPS, with its chain")
    add("--tls-key", type=Path, metavar="PEM", help="of the certificate")
    add("--keys", type=Path, metavar="FILE", help="YAML of tenants and their API keys")
    add("--rate", type=float, metavar="R", help="requests/s of a tenant, else 429 (default: any)")
    add("--at-once", type=int, metavar="N", help="a tenant's unanswered requests, else 429 (any)")
    add("--max-body", type=int, default=64, metavar="MB", help="a request's body at most (64)")
    add(
        "--answer-timeout",
        type=int,
        default=600,
        metavar="S",
        help="silence of a server after which another one is asked (600, as OpenAI's clients wait)",
    )
    add("--metrics-port", type=int, metavar="PORT", help="with --run: /metrics for Prometheus")


def run(args: argparse.Namespace) -> int:
    if args.session and not args.kubernetes:
        raise GatewayError("--session is for --kubernetes; nginx keeps users by hash")
    if args.run and args.kubernetes:
        raise GatewayError("--run starts nginx, --kubernetes writes for a cluster; choose one")
    if args.metrics_port is not None and not args.run:
        raise GatewayError("--metrics-port needs --run, which counts and answers there")
    if args.follow is not None and not args.run:
        raise GatewayError("--follow needs --run, which takes the shares over")
    if not 0.1 <= args.health_interval <= 600:
        raise GatewayError(f"--health-interval is {args.health_interval:g}, expected 0.1 to 600")
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

    if args.follow is not None:
        from vllm_compress.operations.gateway.watch import followed

        split = followed(Path(args.follow), split)
    listening = _listening(args)

    def write(place: Path) -> None:
        write_gateway(place, split, listening)

    if args.run or nginx_is_here():
        check_files(write)
    write(folder)
    print(f"{folder}: {split.service} on port {args.port}, {split}", file=sys.stderr)
    print(STRANGERS, file=sys.stderr)
    for name in unknown_hosts(split):
        print(
            f"{name}: its host has no address, so its users go to another variant; --run looks "
            "for it again, without it write this again once it has one",
            file=sys.stderr,
        )
    return (
        run_nginx(folder, lambda: _beside(args, folder, str(listening.address))) if args.run else 0
    )


def _listening(args: argparse.Namespace) -> Listening:
    return Listening(
        host=args.host,
        port=args.port,
        proxies=tuple(args.trust_proxy),
        certificate=args.tls_certificate,
        key=args.tls_key,
        keys=args.keys,
        limits=Limits(args.rate, args.at_once),
        patience=args.answer_timeout,
        metrics_port=args.metrics_port,
        body_mb=args.max_body,
    )


@contextmanager
def _beside(args: argparse.Namespace, folder: Path, host: str) -> Iterator[Callable[[], None]]:
    """What runs as long as nginx does: probes, and the counts."""
    # Not for every command: Prometheus' client takes a moment to import.
    from vllm_compress.operations.gateway.metrics import GatewayMetrics, serving
    from vllm_compress.operations.gateway.watch import Watch

    metrics = None if args.metrics_port is None else GatewayMetrics()
    follow = None if args.follow is None else Path(args.follow)
    watch = Watch(NginxGateway(folder), args.health_interval, args.keys, follow, metrics)
    with ExitStack() as stack:
        if metrics is not None:
            stack.enter_context(serving(metrics, host, args.metrics_port))
        stack.enter_context(watch.running())
        yield watch.stop


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
