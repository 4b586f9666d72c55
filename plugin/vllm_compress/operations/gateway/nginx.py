"""A split as nginx configuration: nginx.conf, which stays, and split.conf, which changes.

split.conf opens with the split as JSON in a comment and is derived from it, so the one file is the
state and replacing it the change. nginx hashes the user with MurmurHash2 (`split_clients`), and
`GET /split` on the gateway's machine returns the split that the answering worker runs with.

nginx closes idle client connections on a reload, and what a client sends in that moment is lost
(11 requests per reload with 16 busy clients, measured); so its connections carry one request.
A request whose variant refuses the connection, or answers 500 or 503, goes to `second`. One that
the server may be at work on is answered 502 instead: another server would generate, and bill, it
again. nginx looks names of variants up when it starts or reloads, and refuses a configuration with
one that is not known; so names are looked up before, and a variant without an address is written
as down: its users go to `second`, and a rollout away from it works.
"""

from __future__ import annotations

import json
import re
import socket
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path

from compress_methods.system.files import write_text
from vllm_compress.operations.gateway.traffic_split import GatewayError, TrafficSplit, percent

CONFIG_FILE, SPLIT_FILE = "nginx.conf", "split.conf"
TEMPLATE = Path(__file__).with_name(CONFIG_FILE)
REFUSAL = json.dumps(
    {
        "error": {
            "message": "this gateway passes on /v1/, /v2/, /tokenize and /detokenize",
            "type": "not_found",
            "code": 404,
        }
    }
)
# vLLM closes connections that idle for 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE).
UPSTREAM = """\
upstream variant-{name} {{
    server {server};
    keepalive 64;
    keepalive_timeout 3s;
}}
"""


class _Template(string.Template):
    """`%{name}`, as nginx has `$` for itself."""

    delimiter = "%"


@dataclass(frozen=True)
class Listening:
    """Where a gateway listens, and whose word on a client's address it takes: `proxies` are
    addresses or networks of load balancers in front of it."""

    host: str
    port: int
    proxies: tuple[str, ...] = ()

    @cached_property
    def address(self) -> IPv4Address | IPv6Address:
        """The address of the host; raises `GatewayError`."""
        found = look_up(self.host.strip("[]"))
        if found is None:
            raise GatewayError(f"--host {self.host}: not an address, and no host of that name")
        return ip_address(found)

    @property
    def pair(self) -> str:
        """`127.0.0.1:8080`, `[::1]:8080`."""
        return _pair(str(self.address), self.port)


def _pair(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def look_up(host: str) -> str | None:
    """An address of a host; None where there is none."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError):
        return None


def unknown_hosts(split: TrafficSplit) -> list[str]:
    """Names of variants whose host has no address now."""
    hosts = {v.name: v.address.rpartition(":")[0].strip("[]") for v in split.variants}
    return [name for name, host in hosts.items() if look_up(host) is None]


def write_gateway(
    folder: Path, split: TrafficSplit, host: str, port: int, proxies: Sequence[str] = ()
) -> None:
    """Both files. nginx.conf comes last: with it there, the folder is complete."""
    config = render_config(split, host, port, proxies)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / SPLIT_FILE, render_traffic_split(split))
        write_text(folder / CONFIG_FILE, config)
    except OSError as problem:
        raise GatewayError(f"{folder}: cannot be written ({problem.strerror})") from problem


def render_config(split: TrafficSplit, host: str, port: int, proxies: Sequence[str] = ()) -> str:
    """nginx.conf: everything but the shares and the servers."""
    listening = Listening(host, port, tuple(proxies))
    allowed = dict.fromkeys(["127.0.0.1", "::1", str(listening.address)])
    trusted = [f"    set_real_ip_from {network};" for network in map(_network, listening.proxies)]
    proxies_in_front = ["    # No load balancer in front is trusted (--trust-proxy)."]
    if trusted:
        proxies_in_front = [
            "    # Load balancers in front, whose X-Forwarded-For is true.",
            *trusted,
        ]
        proxies_in_front += ["    real_ip_header X-Forwarded-For;", "    real_ip_recursive on;"]
    template = _Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(
        service=split.service,
        listen=f"        listen {listening.pair};",
        allow="\n".join(f"            allow {address};" for address in allowed),
        proxies="\n".join(proxies_in_front),
        refusal=REFUSAL + "\\n",
    )


def _network(text: str) -> str:
    try:
        return str(ip_network(text, strict=False))
    except ValueError as problem:
        raise GatewayError(
            f"--trust-proxy is {text!r}, expected an address or a network such as 10.0.0.0/8"
        ) from problem


def render_traffic_split(split: TrafficSplit) -> str:
    """split.conf: the shares, who stands in for whom, and where each variant is."""
    state = json.dumps(split.to_dict())
    lines = [f"# {state}", "split_clients $user $variant {"]
    given = [(name, share) for name, share in split.shares.items() if share]
    # The last takes all that is left; nginx would leave the hash's last value without a variant.
    lines += [f"    {percent(share)} {name};" for name, share in given[:-1]]
    lines += [f"    * {given[-1][0]};", "}", "map $variant $second {", '    default "";']
    lines += [f"    {name} {other};" for name, other in _seconds(split).items()]
    lines += ["}", "map $uri $split {", f"    default '{state}\\n';", "}", ""]
    nowhere = unknown_hosts(split)
    for variant in split.variants:
        server = "127.0.0.1:9 down" if variant.name in nowhere else variant.address
        lines += [UPSTREAM.format(name=variant.name, server=server)]
    return "\n".join(lines)


def _seconds(split: TrafficSplit) -> dict[str, str]:
    """Who takes the users of a dead variant: the baseline, and for the baseline the variant that
    has most users. One that has none was taken out of service and stands in for nobody."""
    seconds = dict.fromkeys(split.compressed, split.baseline)
    largest = max(split.compressed, key=lambda name: split.shares[name])
    return seconds | ({split.baseline: largest} if split.shares[largest] else {})


def read_traffic_split(folder: Path) -> TrafficSplit:
    """Read split.conf of a gateway's folder."""
    path = folder / SPLIT_FILE
    try:
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        return TrafficSplit.from_dict(json.loads(first.removeprefix("# ")), str(path))
    except FileNotFoundError as problem:
        raise GatewayError(
            f"{path}: no such file; make the gateway's folder with `vllm-compress gateway`"
        ) from problem
    except (OSError, UnicodeError, json.JSONDecodeError) as problem:
        raise GatewayError(f"{path}: not a split that vllm-compress wrote") from problem


def gateway_url(folder: Path) -> str:
    """Where the gateway of a folder answers, from its own machine."""
    path = folder / CONFIG_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    match = re.search(r"^\s*listen (\S+):(\d+);", text, re.MULTILINE)
    if match is None:
        raise GatewayError(f"{path}: no `listen HOST:PORT`; was it written by vllm-compress?")
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(match[1], match[1])
    return f"http://{host}:{match[2]}"
