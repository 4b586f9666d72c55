"""A split as nginx configuration: nginx.conf, which stays, and split.conf, which changes.

split.conf opens with the split as JSON in a comment and is derived from it, so the one file is the
state and replacing it the change. nginx hashes the user with MurmurHash2 (`split_clients`), and
`GET /split` on the gateway's machine returns the split that the answering worker runs with.

nginx closes idle client connections on a reload, and what a client sends in that moment is lost
(11 requests per reload with 16 busy clients, measured); so its connections carry one request.
A request whose variant refuses the connection goes to `second`. One that the server may have begun
is answered 502 instead: another server would generate, and bill, it again.
"""

from __future__ import annotations

import json
import re
import string
from pathlib import Path

from compress_methods.files import write_text
from vllm_compress.gateway.split import GatewayError, Split, from_dict, percent

CONFIG, SPLIT = "nginx.conf", "split.conf"
TEMPLATE = Path(__file__).with_name(CONFIG)
# vLLM closes connections that idle for 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE).
UPSTREAM = """\
    upstream variant-{name} {{
        server {address};
        keepalive 64;
        keepalive_timeout 3s;
    }}
"""


class _Template(string.Template):
    """`%{name}`, as nginx has `$` for itself."""

    delimiter = "%"


def write_gateway(folder: Path, split: Split, host: str, port: int) -> None:
    """Both files. nginx.conf comes last: with it there, the folder is complete."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / SPLIT, render_split(split))
        write_text(folder / CONFIG, render_config(split, host, port))
    except OSError as problem:
        raise GatewayError(f"{folder}: cannot be written ({problem.strerror})") from problem


def render_config(split: Split, host: str, port: int) -> str:
    """nginx.conf: everything but the shares."""
    upstreams = "\n".join(
        UPSTREAM.format(name=variant.name, address=variant.address) for variant in split.variants
    )
    template = _Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(service=split.service, host=host, port=port, upstreams=upstreams)


def render_split(split: Split) -> str:
    """split.conf: the shares, and who stands in for whom."""
    state = split.to_json()
    lines = [f"# {state}", "split_clients $user $variant {"]
    given = [(name, share) for name, share in split.shares.items() if share]
    # The last takes all that is left; nginx would leave the hash's last value without a variant.
    lines += [f"    {percent(share)} {name};" for name, share in given[:-1]]
    lines += [f"    * {given[-1][0]};", "}", "map $variant $second {", '    default "";']
    lines += [f"    {name} {other};" for name, other in _seconds(split).items()]
    lines += ["}", "map $uri $split {", f"    default '{state}\\n';", "}", ""]
    return "\n".join(lines)


def _seconds(split: Split) -> dict[str, str]:
    """Who takes the users of a dead variant: the baseline, and for the baseline the variant that
    has most users. One that has none was taken out of service and stands in for nobody."""
    seconds = dict.fromkeys(split.compressed, split.baseline)
    largest = max(split.compressed, key=lambda name: split.shares[name])
    return seconds | ({split.baseline: largest} if split.shares[largest] else {})


def read_split(folder: Path) -> Split:
    """What split.conf of a gateway's folder says."""
    path = folder / SPLIT
    try:
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        return from_dict(json.loads(first.removeprefix("# ")), str(path))
    except FileNotFoundError as problem:
        raise GatewayError(
            f"{path}: no such file; make the gateway's folder with `vllm-compress gateway`"
        ) from problem
    except (OSError, UnicodeError, json.JSONDecodeError) as problem:
        raise GatewayError(f"{path}: not a split that vllm-compress wrote") from problem


def gateway_url(folder: Path) -> str:
    """Where the gateway of a folder answers, from its own machine."""
    path = folder / CONFIG
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    match = re.search(r"^\s*listen (\S+):(\d+);", text, re.MULTILINE)
    if match is None:
        raise GatewayError(f"{path}: no `listen HOST:PORT`; was it written by vllm-compress?")
    host = "127.0.0.1" if match[1] == "0.0.0.0" else match[1]
    return f"http://{host}:{match[2]}"
