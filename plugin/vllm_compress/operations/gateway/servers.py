"""Where the servers of each variant are and which of them answer: servers.conf of a gateway.

A variant may have several servers: its address lists them, and a name may stand for several. nginx
would look names up when it starts or reloads and refuse all where one is not known; so they are
looked up here, what was found last stays where a name is lost, and a variant without any address is
written as down: its users go to another one. servers.conf opens with what was found as JSON.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Collection, Mapping
from pathlib import Path

from compress_methods.system.files import write_changed
from vllm_compress.operations.gateway.traffic_split import TrafficSplit, Variant

SERVERS_FILE = "servers.conf"
NOWHERE = "127.0.0.1:9"
# Where each server of an address is, as `10.0.0.1:8000`: by address of the variant.
Places = dict[str, list[str]]
# vLLM closes connections that idle for 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE). `zone`: workers count
# connections together. Three failures in 5 s leave a server out for 5 s, where there is another.
UPSTREAM = """\
upstream variant-{name} {{
    zone variant-{name} 128k;
    least_conn;
{servers}
    keepalive 64;
    keepalive_timeout 3s;
}}
"""


def look_up(host: str) -> list[str]:
    """Addresses of a host, IPv4 first where it has both; none where it is not known."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    every = sorted({str(entry[4][0]) for entry in found})
    return [address for address in every if ":" not in address] or every


def host_port(host: str, port: int | str) -> str:
    """`127.0.0.1:8000`, `[::1]:8000`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def find_servers(split: TrafficSplit, known: Mapping[str, list[str]]) -> Places:
    """Look all names up; where one is not known, what was `known` of it."""
    found: Places = {}
    for variant in split.variants:
        for address in variant.servers:
            host, _, port = address.rpartition(":")
            here = [host_port(one, port) for one in look_up(host.strip("[]"))]
            found[address] = here or list(known.get(address, []))
    return found


def servers_of(variant: Variant, places: Mapping[str, list[str]]) -> list[str]:
    """All servers of a variant, each once."""
    return list(dict.fromkeys(one for a in variant.servers for one in places.get(a, [])))


def unknown_hosts(split: TrafficSplit) -> list[str]:
    """Names of variants none of whose hosts has an address now."""
    places = find_servers(split, {})
    return [variant.name for variant in split.variants if not servers_of(variant, places)]


def render_servers(
    split: TrafficSplit, places: Mapping[str, list[str]], down: Collection[str] = ()
) -> str:
    """servers.conf; servers that are `down` get no request."""
    lines = [f"# {json.dumps(places)}"]
    for variant in split.variants:
        servers = servers_of(variant, places)
        each = "\n".join(
            f"    server {one} max_fails=3 fail_timeout=5s{' down' if one in down else ''};"
            for one in servers
        )
        text = each or f"    server {NOWHERE} down;"
        lines.append(UPSTREAM.format(name=variant.name, servers=text))
    return "\n".join(lines)


def read_places(folder: Path) -> Places:
    """What servers.conf of a folder found last; nothing where it is not there."""
    try:
        first = (folder / SERVERS_FILE).read_text(encoding="utf-8").partition("\n")[0]
        found: Places = json.loads(first.removeprefix("# "))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def write_servers(
    folder: Path,
    split: TrafficSplit,
    places: Mapping[str, list[str]] | None = None,
    down: Collection[str] = (),
) -> bool:
    """Write servers.conf; tell whether it is another one than before."""
    places = find_servers(split, read_places(folder)) if places is None else places
    return write_changed(folder / SERVERS_FILE, render_servers(split, places, down))
