"""Who may ask a gateway: API keys of tenants, and how much each may ask.

The file of keys is YAML, one tenant a line, with one key or, while a key is changed, several:

    search: sk-3f9c...
    mobile: [sk-old..., sk-new...]

nginx looks the header Authorization up in keys.conf, which only its own user may read; servers get
the gateway's key (VLLM_API_KEY), never a tenant's. Without a file everybody may ask, and what they
send as Authorization is passed on.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from compress_methods.system.files import write_changed
from compress_methods.system.http import KEY_VARIABLE
from compress_methods.system.user_file import read_yaml
from vllm_compress.operations.gateway.traffic_split import GatewayError

KEYS_FILE = "keys.conf"
# Inside nginx, so that a server's own 401 and 429 pass as they are.
UNKNOWN, TOO_MANY = 491, 490
MOST = 100
SHORTEST = 16
# Neither can carry configuration.
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_KEY = re.compile(r"[A-Za-z0-9._~+/=-]+")
# Where nobody is told apart, the limits are those of an Authorization, else of an address.
OPEN = """\
map "" $tenant {
    default "";
}
map "" $server_key {
    default $http_authorization;
}
"""


@dataclass(frozen=True)
class Limits:
    """What a tenant, or without keys a caller, may ask: requests per second on average, with a
    burst of two seconds' worth, and requests unanswered at once. None is no limit."""

    rate: float | None = None
    at_once: int | None = None

    def __post_init__(self) -> None:
        if self.rate is not None and not 1 / 60 <= self.rate <= 1e6:
            raise GatewayError(f"--rate is {self.rate:g}, expected requests/s from 1/60 to 1e6")
        if self.at_once is not None and not 1 <= self.at_once <= 1_000_000:
            raise GatewayError(f"--at-once is {self.at_once}, expected a number from 1 to 1000000")

    def zones(self, who: str) -> list[str]:
        """Directives of `http`."""
        lines = []
        if self.rate is not None:
            each = f"{round(self.rate * 60)}r/m"
            lines += [
                f"limit_req_zone {who} zone=rate:10m rate={each};",
                f"limit_req_status {TOO_MANY};",
            ]
        if self.at_once is not None:
            lines += [f"limit_conn_zone {who} zone=at_once:10m;", f"limit_conn_status {TOO_MANY};"]
        return lines

    def guards(self) -> list[str]:
        """Directives of a location."""
        lines = []
        if self.rate is not None:
            lines.append(f"limit_req zone=rate burst={max(1, round(2 * self.rate))} nodelay;")
        if self.at_once is not None:
            lines.append(f"limit_conn at_once {self.at_once};")
        return lines


def read_keys(path: Path) -> dict[str, str]:
    """Tenant of each key; raises `GatewayError`, which never shows a key."""
    block = read_yaml(path, GatewayError)
    if not isinstance(block, dict) or not 1 <= len(block) <= MOST:
        raise GatewayError(f"{path}: expected 1 to {MOST} lines TENANT: KEY")
    found: dict[str, str] = {}
    for tenant, given in block.items():
        if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
            raise GatewayError(f"{path}: tenant {tenant!r}, expected letters, digits and ._-")
        for key in given if isinstance(given, list) else [given]:
            if not isinstance(key, str) or not _KEY.fullmatch(key) or len(key) < SHORTEST:
                raise GatewayError(
                    f"{path}: a key of {tenant} is not {SHORTEST} or more letters, digits, ._~+/=-"
                )
            if found.setdefault(key, tenant) != tenant:
                raise GatewayError(f"{path}: {tenant} and {found[key]} have the same key")
    return found


def write_keys(folder: Path, source: Path | None) -> bool:
    """Write keys.conf, for the eyes of this user; tell whether it is another one than before."""
    text = OPEN if source is None else _rendered(read_keys(source))
    before = os.umask(0o077)
    try:
        return write_changed(folder / KEYS_FILE, text)
    finally:
        os.umask(before)


def _rendered(keys: dict[str, str]) -> str:
    own = os.environ.get(KEY_VARIABLE, "")
    if own and not _KEY.fullmatch(own):
        raise GatewayError(f"{KEY_VARIABLE} has characters that a key cannot have")
    lines = ["map $http_authorization $tenant {", '    default "";']
    lines += [f'    "~^Bearer {re.escape(key)}$" "{tenant}";' for key, tenant in keys.items()]
    lines += ["}", 'map "" $server_key {']
    lines += [f'    default "{"Bearer " + own if own else ""}";', "}", ""]
    return "\n".join(lines)
