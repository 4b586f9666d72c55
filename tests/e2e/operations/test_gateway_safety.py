"""What a gateway must not let through, lose or be stopped by, with a real nginx."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path

import pytest

from tests.e2e.operations.test_gateway import Service
from tests.e2e.support.operations.nginx import Nginx, Stream, Upstream, nginx_program
from tests.e2e.support.server import free_port
from vllm_compress.cli import main
from vllm_compress.operations.gateway.control import NginxGateway
from vllm_compress.operations.gateway.nginx import Listening, write_gateway
from vllm_compress.operations.gateway.traffic_split import Variant, all_to_baseline

pytestmark = pytest.mark.e2e


@pytest.fixture
def service(tmp_path: Path) -> Service:
    with Service(tmp_path / "gateway", "full", "int4") as running:
        yield running


def raw(gateway: Nginx, path: str, **headers: str) -> tuple[int, str | None]:
    """Status and variant of a request whose path is sent as it stands."""
    connection = HTTPConnection(gateway.url.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", path)
    for name, value in {"Content-Length": "0", **headers}.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.getheader("X-Variant")


@pytest.mark.parametrize(
    "path",
    [
        "/metrics/../v1/models",
        "/metrics/x/../../v1/models",
        "/metrics/%2e%2e/v1/models",
        "//metrics/../v1/models",
        "/v1/../metrics",
        "/v1/%2e%2e/metrics",
        "/v1//models",
        "/v1/./models",
        "/v1/%6dodels",
        "/./v1/models",
        "/metrics/../tokenize",
    ],
)
def test_a_path_that_a_server_reads_otherwise_is_not_passed_on(service: Service, path: str) -> None:
    assert raw(service.nginx, path)[0] == 404
    assert sum(upstream.requests for upstream in service.upstreams.values()) == 0


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/chat/completions?a=/../b", "/v1/responses/resp_1-a", "/tokenize"]
)
def test_plain_paths_pass(service: Service, path: str) -> None:
    assert raw(service.nginx, path) == (200, "full")


def test_a_server_that_answers_500_is_stood_in_for(service: Service) -> None:
    """As one does that drains, while its /health says 200."""
    service.share(int4=50)
    service.upstreams["int4"].draining = True
    replies = [service.nginx.ask(user=f"user-{i}", body=b"1234") for i in range(40)]
    assert {(r.status, r.variant, r.body) for r in replies} == {(200, "full", "full 4")}
    assert service.upstreams["int4"].requests > 0
    service.upstreams["int4"].draining = False
    # A request that fails everywhere fails, and is asked of each once.
    before = [upstream.requests for upstream in service.upstreams.values()]
    assert service.nginx.ask(body=b"fail").status == 500
    assert [u.requests for u in service.upstreams.values()] == [n + 1 for n in before]


def test_a_variant_whose_name_is_unknown_stops_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Upstream("full") as full:
        variants = [
            Variant("full", "a", full.address, 5000),
            Variant("int4", "b", "no-such-host.invalid:1", 5000),
        ]
        split = all_to_baseline("chat", "full", variants).with_shares({"int4": 5000})
        write_gateway(tmp_path, split, Listening("127.0.0.1", free_port()))
        with Nginx(tmp_path) as gateway:
            assert set(gateway.variants(range(20))) == {"full"}
            control = NginxGateway(tmp_path)
            gone = control.live().with_shares({"int4": 0})
            control.check(gone)
            control.apply(gone)
            assert control.live() == gone


@pytest.mark.parametrize("host", ["localhost", "::1", "[::1]", "127.0.0.1", "0.0.0.0", "::"])
def test_every_host_makes_a_gateway_that_answers(tmp_path: Path, host: str) -> None:
    with Upstream("full") as full:
        variants = [Variant("full", "a", full.address), Variant("int4", "b", "127.0.0.1:9")]
        split = all_to_baseline("chat", "full", variants)
        write_gateway(tmp_path, split, Listening(host, free_port()))
        with Nginx(tmp_path) as gateway:
            assert gateway.ask(user="a").variant == "full"
            assert NginxGateway(tmp_path).live() == split


def deployments(folder: Path, full: Upstream) -> list[str]:
    """Arguments of `vllm-compress gateway`: `full` answers, `int4` does not."""
    words = []
    for name, address in (("full", full.address), ("int4", "127.0.0.1:9")):
        path = folder / f"{name}.yaml"
        block = {"version": 1, "name": f"c-{name}", "service": "chat", "variant": name}
        path.write_text(json.dumps(block | {"model": "m", "vllm": {"served-model-name": "chat"}}))
        words += ["--config", str(path), "--address", f"{name}={address}"]
    return words


def test_a_host_that_is_none_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Upstream("full") as full:
        arguments = ["gateway", *deployments(tmp_path, full), "-o", str(tmp_path / "gateway")]
        assert main([*arguments, "--host", "no-such-host.invalid"]) == 2
        assert "no host of that name" in capsys.readouterr().err
        assert main([*arguments, "--trust-proxy", "10.0.0.0/99"]) == 2
        assert "--trust-proxy is '10.0.0.0/99'" in capsys.readouterr().err
    assert not (tmp_path / "gateway").exists()


def test_sigterm_lets_streams_end(tmp_path: Path) -> None:
    nginx_program()
    with Upstream("full") as full:
        out = tmp_path / "gateway"
        command = [sys.executable, "-m", "vllm_compress.cli", "gateway"]
        command += [*deployments(tmp_path, full), "-o", str(out), "--host", "127.0.0.1"]
        with Nginx(out, [*command, "--port", str(free_port()), "--run"]) as gateway:
            stream = Stream(gateway, "user")
            assert stream.line() == "first"
            assert gateway._process is not None
            gateway._process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                gateway._process.wait(1)
            full.go_on.set()
            assert [stream.line(), stream.line()] == ["second", ""]
            assert gateway._process.wait(20) == 0


@pytest.mark.parametrize(
    ("trusted", "header", "value", "variants"),
    [
        ([], "X_Forwarded_For", "10.1.0.{}", 1),
        (["127.0.0.0/8"], "X_Forwarded_For", "10.1.0.{}", 2),
        ([], "Cookie", "user_id={}", 2),
    ],
)
def test_users_are_told_apart_by_cookie_and_behind_trusted_load_balancers(
    tmp_path: Path, trusted: list[str], header: str, value: str, variants: int
) -> None:
    """Without trust all 30 are one user, 127.0.0.1, wherever its hash falls."""
    with Upstream("full") as full, Upstream("int4") as int4:
        both = [Variant("full", "a", full.address), Variant("int4", "b", int4.address)]
        split = all_to_baseline("chat", "full", both).with_shares({"int4": 5000})
        write_gateway(tmp_path, split, Listening("127.0.0.1", free_port(), tuple(trusted)))
        with Nginx(tmp_path) as gateway:
            met = {raw(gateway, "/v1/x", **{header: value.format(i)})[1] for i in range(30)}
    assert len(met) == variants


def test_a_variant_that_hangs_stops_only_its_own_users(service: Service) -> None:
    """It takes the connection and says no more: its users wait, the rest and rollouts do not."""
    service.share(int4=50)
    met = service.nginx.variants(range(40))
    service.upstreams["int4"].go_on.clear()
    hung = [Stream(service.nginx, f"user-{i}") for i in range(40) if met[i] == "int4"]
    began = time.monotonic()
    others = [service.nginx.ask(user=f"user-{i}") for i in range(40) if met[i] == "full"]
    assert {reply.status for reply in others} == {200}
    service.share(int4=0)
    assert service.nginx.variants(range(40)) == ["full"] * 40
    assert time.monotonic() - began < 10
    service.upstreams["int4"].go_on.set()
    assert [stream.line() for stream in hung] == ["first"] * len(hung)


def drain(service: Service, *more: str) -> int:
    return main(["drain", "--gateway", str(service.folder), *more])


def test_a_drained_server_can_stop_without_a_loss(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    """Busy clients, a stream, drain, stop: all are answered, and drain waits for the stream."""
    service.share(int4=50)
    met = service.nginx.variants(range(20))
    int4 = service.upstreams["int4"]
    stream = Stream(service.nginx, f"user-{met.index('int4')}")
    assert stream.line() == "first"
    assert drain(service, "--variant", "int4", "--timeout", "0.3") == 2
    assert "still has 1 requests" in capsys.readouterr().err
    assert service.control.live().shares == {"int4": 0, "full": 10_000}
    ended = threading.Event()
    statuses: list[int] = []

    def client() -> None:
        while not ended.is_set():
            statuses.append(service.nginx.ask(user=f"user-{len(statuses)}").status)

    clients = threading.Thread(target=client)
    clients.start()
    threading.Timer(1.0, int4.go_on.set).start()
    try:
        assert drain(service, "--variant", "int4") == 0
        assert [stream.line(), stream.line()] == ["second", ""]
        int4.stop()
        time.sleep(0.3)
    finally:
        ended.set()
        clients.join()
    assert len(statuses) > 20
    assert set(statuses) == {200}


def test_drain_says_how_to_come_back_and_drains_the_baseline_too(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    service.share(int4=30)
    process = subprocess.Popen(["sleep", "60"])
    assert drain(service, "--variant", "full", "--stop", str(process.pid)) == 0
    assert process.wait(10) == -signal.SIGTERM
    assert service.control.live().shares == {"int4": 10_000, "full": 0}
    said = capsys.readouterr()
    assert "full: nothing left to do" in said.out
    assert said.err.endswith(f"rollout --gateway {service.folder} --variant int4 --to 30%\n")
    assert drain(service, "--variant", "int5") == 2
    assert "no variant 'int5'; did you mean 'int4'" in capsys.readouterr().err
    service.upstreams["full"].stop()
    assert drain(service, "--variant", "full") == 0, "what is gone has nothing left to do"
