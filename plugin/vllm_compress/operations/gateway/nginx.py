"""A split as nginx configuration: nginx.conf, which stays, and the files that change.

split.conf opens with the split as JSON in a comment and is derived from it, so the one file is the
state and replacing it the change. nginx hashes the user with MurmurHash2 (`split_clients`), and
`GET /split` on the gateway's machine returns the split that the answering worker runs with.
servers.conf says where the servers are (`servers`), keys.conf who may ask (`tenants`).

nginx closes idle client connections on a reload, and what a client sends in that moment is lost
(11 requests per reload with 16 busy clients, measured); so its connections carry one request.

A request is sent to another server where nobody answered it: the connection was refused or broke,
the answer was 500 or 503, or none came for `patience` seconds. Of answers of which the client has
got the beginning nothing can be repeated. Nor is anything that a server may have kept, and no
request goes to more than two servers that may be at work on it: one that kills them ends there.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path

from compress_methods.system.files import write_text
from vllm_compress.operations.gateway.servers import host_port, look_up, write_servers
from vllm_compress.operations.gateway.tenants import (
    KEYS_FILE,
    TOO_MANY,
    UNKNOWN,
    Limits,
    write_keys,
)
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
# What `metrics` counts: no word of a request, and nothing that a client chooses.
COUNTED = "$status|$answered|$variant|$tenant|$request_time|$upstream_addr"


class _Template(string.Template):
    """`%{name}`, as nginx has `$` for itself."""

    delimiter = "%"


@dataclass(frozen=True)
class Listening:
    """Where a gateway listens and for whom. `proxies` are addresses or networks of load balancers
    whose word on a client's address is taken; `certificate` and `key` are PEM files of TLS; `keys`
    is the file of tenants' API keys; `patience` the seconds until a silent server is given up;
    `metrics_port` where requests are told for counting; `body_mb` what a request may have."""

    host: str
    port: int
    proxies: tuple[str, ...] = ()
    certificate: Path | None = None
    key: Path | None = None
    keys: Path | None = None
    limits: Limits = field(default_factory=Limits)
    patience: int = 600
    metrics_port: int | None = None
    body_mb: int = 64

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise GatewayError("--tls-certificate and --tls-key go together")
        for path in (self.certificate, self.key, self.keys):
            if path is not None and not path.is_file():
                raise GatewayError(f"{path}: no such file")
        for option, value, most in (
            ("--answer-timeout", self.patience, 86_400),
            ("--max-body", self.body_mb, 10_000),
            ("--metrics-port", self.metrics_port or 1, 65_535),
        ):
            if not 1 <= value <= most:
                raise GatewayError(f"{option} is {value}, expected 1 to {most}")

    @cached_property
    def address(self) -> IPv4Address | IPv6Address:
        """The address of the host; raises `GatewayError`."""
        found = look_up(self.host.strip("[]"))
        if not found:
            raise GatewayError(f"--host {self.host}: not an address, and no host of that name")
        return ip_address(found[0])

    def directives(self) -> list[str]:
        """Of `server`: listen, and TLS where it has a certificate."""
        pair = host_port(str(self.address), self.port)
        if self.certificate is None or self.key is None:
            return [f"listen {pair};"]
        paths = [json.dumps(str(path.absolute())) for path in (self.certificate, self.key)]
        tls = [f"ssl_certificate {paths[0]};", f"ssl_certificate_key {paths[1]};"]
        return [f"listen {pair} ssl;", *tls, "ssl_protocols TLSv1.2 TLSv1.3;"]

    def in_front(self) -> list[str]:
        """Of `http`: which load balancers are believed."""
        if not self.proxies:
            return ["# No load balancer in front is trusted (--trust-proxy)."]
        return [
            "# Load balancers in front, whose X-Forwarded-For is true.",
            *(f"set_real_ip_from {_network(proxy)};" for proxy in self.proxies),
            "real_ip_header X-Forwarded-For;",
            "real_ip_recursive on;",
        ]

    def guards(self) -> list[str]:
        """Of a location: which requests are not passed on."""
        known = [] if self.keys is None else ['if ($tenant = "") {', f"    return {UNKNOWN};", "}"]
        return [
            "if ($plain = 0) {",
            f"    return 404 '{REFUSAL}\\n';",
            "}",
            *known,
            *self.limits.guards(),
            f"error_page {UNKNOWN} = @unknown;",
            f"error_page {TOO_MANY} = @later;",
        ]


def _network(text: str) -> str:
    try:
        return str(ip_network(text, strict=False))
    except ValueError as problem:
        raise GatewayError(
            f"--trust-proxy is {text!r}, expected an address or a network such as 10.0.0.0/8"
        ) from problem


def write_gateway(folder: Path, split: TrafficSplit, listening: Listening) -> None:
    """All files. nginx.conf comes last: with it there, the folder is complete."""
    config = render_config(split, listening)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_keys(folder, listening.keys)
        write_servers(folder, split)
        write_text(folder / SPLIT_FILE, render_traffic_split(split))
        write_text(folder / CONFIG_FILE, config)
    except OSError as problem:
        raise GatewayError(f"{folder}: cannot be written ({problem.strerror})") from problem


def render_config(split: TrafficSplit, listening: Listening) -> str:
    """nginx.conf: everything but the shares, the servers and the keys."""
    who = "$caller" if listening.keys is None else "$tenant"
    counted = []
    if listening.metrics_port is not None:
        log = f"syslog:server=127.0.0.1:{listening.metrics_port},nohostname"
        counted = [f"log_format counted '{COUNTED}';", f"access_log {log} counted;"]
    allowed = dict.fromkeys(["127.0.0.1", "::1", str(listening.address)])
    template = _Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(
        service=split.service,
        proxies=_indented(listening.in_front(), 4),
        tenants=_indented([f"include {KEYS_FILE};", *listening.limits.zones(who)], 4),
        counted=_indented(counted, 4),
        listen=_indented(listening.directives(), 8),
        guards=_indented(listening.guards(), 12),
        allow=_indented([f"allow {address};" for address in allowed], 12),
        patience=listening.patience,
        body=f"{listening.body_mb}m",
        refusal=REFUSAL + "\\n",
    )


def _indented(lines: Sequence[str], columns: int) -> str:
    return "\n".join(" " * columns + line for line in lines)


def render_traffic_split(split: TrafficSplit) -> str:
    """split.conf: the shares, and who stands in for whom."""
    state = json.dumps(split.to_dict())
    lines = [f"# {state}", "split_clients $user $variant {"]
    given = [(name, share) for name, share in split.shares.items() if share]
    # The last takes all that is left; nginx would leave the hash's last value without a variant.
    lines += [f"    {percent(share)} {name};" for name, share in given[:-1]]
    lines += [f"    * {given[-1][0]};", "}", "map $variant $second {", '    default "";']
    lines += [f"    {name} {other};" for name, other in _seconds(split).items()]
    lines += ["}", "map $uri $split {", f"    default '{state}\\n';", "}", ""]
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
    match = re.search(r"^\s*listen (\S+):(\d+)( ssl)?;", text, re.MULTILINE)
    if match is None:
        raise GatewayError(f"{path}: no `listen HOST:PORT`; was it written by vllm-compress?")
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(match[1], match[1])
    return f"http{'s' if match[3] else ''}://{host}:{match[2]}"
