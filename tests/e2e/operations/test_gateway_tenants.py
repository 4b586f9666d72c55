"""Keys, limits and TLS of a real nginx: who may ask, how much, and what servers and logs see."""

from __future__ import annotations

import os
import ssl
import stat
import subprocess
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from compress_methods.errors import CompressError
from tests.e2e.support.operations.nginx import Nginx, Upstream
from tests.e2e.support.operations.prometheus import tool
from tests.e2e.support.server import free_port
from vllm_compress.operations.gateway.control import NginxGateway
from vllm_compress.operations.gateway.nginx import Listening, write_gateway
from vllm_compress.operations.gateway.tenants import Limits, read_keys
from vllm_compress.operations.gateway.traffic_split import Variant, all_to_baseline
from vllm_compress.operations.gateway.watch import Watch

pytestmark = pytest.mark.e2e
SEARCH, MOBILE, NEW = (f"sk-{name}-0123456789.abc" for name in ("search", "mobile", "new"))
KEYS = f"search: {SEARCH}\nmobile: [{MOBILE}, {NEW}]\n"


def write(folder: Path, full: Upstream, **options: object) -> None:
    both = [Variant("full", "a", full.address), Variant("int4", "b", "127.0.0.1:9")]
    split = all_to_baseline("chat", "full", both)
    write_gateway(folder, split, Listening("127.0.0.1", free_port(), **options))


def test_only_tenants_are_served_and_servers_get_the_gateways_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "the-servers-own-key")
    keys = tmp_path / "keys.yaml"
    keys.write_text(KEYS)
    folder = tmp_path / "gateway"
    with Upstream("full") as full:
        write(folder, full, keys=keys)
        assert stat.S_IMODE(os.stat(folder / "keys.conf").st_mode) == 0o600
        with Nginx(folder) as gateway:

            def status(key: str | None) -> int:
                return gateway.ask("/v1/completions", key=key).status

            assert [status(f"Bearer {key}") for key in (SEARCH, MOBILE, NEW)] == [200] * 3
            assert full.authorization == "Bearer the-servers-own-key"
            strangers = [None, "", SEARCH, f"Bearer {SEARCH}x", f"Bearer {SEARCH.upper()}"]
            strangers += [f"Bearer x{SEARCH}", f"Bearer {SEARCH.replace('.', '-')}", "Bearer "]
            assert [status(key) for key in strangers] == [401] * len(strangers)
            assert "does not know this API key" in gateway.ask().body
            assert full.requests == 3
            refused = gateway.ask("/v1/completions", key=f"Bearer {SEARCH}", body=b"refuse")
            assert (refused.status, refused.body) == (401, "full 6"), "a server's own word passes"
            watch = Watch(NginxGateway(folder), keys=keys)
            keys.write_text(f"search: {NEW}\n")
            watch.round()
            _until(lambda: (status(f"Bearer {SEARCH}"), status(f"Bearer {NEW}")) == (401, 200))
            keys.write_text("search: short\n")
            watch.round()
            assert status(f"Bearer {NEW}") == 200
            assert '"tenant":"search"' in gateway.log
            assert all(key not in gateway.log for key in (SEARCH, MOBILE, NEW))


def _until(condition: Callable[[], bool]) -> None:
    """While workers change places either may answer."""
    deadline = time.monotonic() + 10
    while not all(condition() for _ in range(5)):
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected 1 to 100 lines TENANT: KEY"),
        ("[a]", "expected 1 to 100 lines TENANT: KEY"),
        ("a b: sk-0123456789abcdef", "tenant 'a b', expected letters, digits and ._-"),
        ("a: secret", "a key of a is not 16 or more letters"),
        ("a: 'sk-0123456789abc;\"'", "a key of a is not 16 or more letters"),
        ("{a: sk-0123456789abcdef, b: sk-0123456789abcdef}", "b and a have the same key"),
    ],
)
def test_keys_that_cannot_be_are_refused_without_showing_them(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(CompressError, match=message) as found:
        read_keys(path)
    assert "sk-0" not in str(found.value)
    assert "secret" not in str(found.value)


def test_a_tenant_has_its_own_limits(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(KEYS)
    folder = tmp_path / "gateway"
    with Upstream("full") as full:
        write(folder, full, keys=keys, limits=Limits(rate=0.5), body_mb=1)
        with Nginx(folder) as gateway:
            statuses = [gateway.ask(key=f"Bearer {SEARCH}").status for _ in range(4)]
            assert statuses == [200, 200, 429, 429]
            reply = gateway.ask(key=f"Bearer {SEARCH}")
            assert '"type": "rate_limit_exceeded"' in reply.body
            assert gateway.ask(key=f"Bearer {MOBILE}").status == 200
            large = gateway.ask(key=f"Bearer {NEW}", body=b"x" * 1_100_000)
            assert large.status == 413


def test_requests_at_once_are_limited_per_caller(tmp_path: Path) -> None:
    with Upstream("full", 0.5) as full:
        write(tmp_path, full, limits=Limits(at_once=2))
        with Nginx(tmp_path) as gateway, ThreadPoolExecutor(8) as pool:
            keys = ["Bearer a"] * 5 + ["Bearer b"] * 2
            statuses = list(pool.map(lambda key: gateway.ask(key=key).status, keys))
    assert sorted(statuses[:5]) == [200, 200, 429, 429, 429]
    assert statuses[5:] == [200, 200]


def test_tls_is_spoken_where_there_is_a_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=chat"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key)]
    command += ["-out", str(certificate)]
    subprocess.run([tool("openssl"), *command], check=True, capture_output=True)
    context = ssl.create_default_context(cafile=str(certificate))
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))
    monkeypatch.setattr(urllib.request, "urlopen", opener.open)
    with Upstream("full") as full:
        write(tmp_path / "gateway", full, certificate=certificate, key=key)
        with Nginx(tmp_path / "gateway") as gateway:
            assert gateway.url.startswith("https://")
            assert gateway.ask(body=b"12").body == "full 2"
            control = NginxGateway(tmp_path / "gateway")
            after = control.live().with_shares({"int4": 100})
            control.check(after)
            control.apply(after)
            assert control.live() == after
    with pytest.raises(CompressError, match="--tls-certificate and --tls-key go together"):
        Listening("127.0.0.1", 1, certificate=certificate)
    with pytest.raises(CompressError, match=r"none\.pem: no such file"):
        Listening("127.0.0.1", 1, certificate=tmp_path / "none.pem", key=key)
