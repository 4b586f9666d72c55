"""No request is lost when servers are stopped, killed, hang, or lose their name, all under load."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.operations.test_gateway import Service
from tests.e2e.support.operations.nginx import (
    Nginx,
    Reply,
    Upstream,
    UpstreamProcess,
    nginx_program,
)
from tests.e2e.support.server import free_port
from vllm_compress.operations.gateway.control import NginxGateway
from vllm_compress.operations.gateway.nginx import Listening, write_gateway
from vllm_compress.operations.gateway.traffic_split import Variant, all_to_baseline
from vllm_compress.operations.gateway.watch import Watch
from vllm_compress.operations.prometheus import scrape

pytestmark = pytest.mark.e2e
CLIENTS, ANSWER_TIMEOUT, SECONDS = 6, 2, 0.05


@contextmanager
def load(gateway: Nginx, replies: list[Reply]) -> Iterator[None]:
    """Clients that ask for completions without a pause while the block lasts."""
    ended = threading.Event()

    def client(number: int) -> None:
        count = 0
        while not ended.is_set():
            user = f"user-{number}-{count % 20}"
            replies.append(gateway.ask("/v1/completions", user=user, body=b"1234"))
            count += 1

    clients = [threading.Thread(target=client, args=(i,)) for i in range(CLIENTS)]
    for thread in clients:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in clients:
            thread.join()


def configs(folder: Path, **addresses: str) -> list[str]:
    """Arguments of `vllm-compress gateway` for these variants."""
    words = []
    for name, address in addresses.items():
        path = folder / f"{name}.yaml"
        block = {"version": 1, "name": f"chat-{name}", "service": "chat", "variant": name}
        path.write_text(json.dumps(block | {"model": "m", "vllm": {"served-model-name": "chat"}}))
        words += ["--config", str(path), "--address", f"{name}={address}"]
    return words


def running_gateway(folder: Path, *arguments: str) -> Nginx:
    nginx_program()
    out = folder / "gateway"
    command = [sys.executable, "-m", "vllm_compress.cli", "gateway", "-o", str(out)]
    command += ["--host", "127.0.0.1", "--port", str(free_port()), "--run", *arguments]
    return Nginx(out, command)


def metric(port: int, name: str, **labels: str) -> list[float]:
    return [
        sample.value
        for sample in scrape(f"http://127.0.0.1:{port}")
        if sample.name == f"vllm_compress_gateway_{name}"
        and labels.items() <= sample.labels.items()
    ]


def wait_for(condition: Any, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_servers_that_stop_die_and_hang_lose_nothing_under_load(tmp_path: Path) -> None:
    """Two servers of full, of which one drains and one is killed; the one of int4 hangs."""
    port, replies = free_port(), []
    with (
        UpstreamProcess("full", SECONDS) as one,
        UpstreamProcess("full", SECONDS) as other,
        UpstreamProcess("full", SECONDS) as last,
        UpstreamProcess("int4", SECONDS) as int4,
        running_gateway(
            tmp_path,
            *configs(
                tmp_path,
                full=f"{one.address},{other.address},{last.address}",
                int4=int4.address,
            ),
            *("--weight", "int4=50%", "--metrics-port", str(port), "--health-interval", "0.3"),
            *("--answer-timeout", str(ANSWER_TIMEOUT)),
        ) as gateway,
    ):

        def up(server: UpstreamProcess) -> bool:
            return metric(port, "server_up", server=server.address) == [1]

        with load(gateway, replies):
            wait_for(lambda: len(replies) > 40)
            one.process.send_signal(signal.SIGTERM)
            wait_for(lambda: not up(one))
            other.process.kill()
            wait_for(lambda: not up(other))
            int4.process.send_signal(signal.SIGSTOP)
            wait_for(lambda: not up(int4))
            asked = len(replies)
            wait_for(lambda: len(replies) > asked + 40)
            int4.process.send_signal(signal.SIGCONT)
            wait_for(lambda: up(int4))
            asked = len(replies)
            wait_for(lambda: len(replies) > asked + 40)
        assert Counter(reply.status for reply in replies) == {200: len(replies)}
        assert {reply.variant for reply in replies[-CLIENTS * 10 :]} == {"full", "int4"}
        wait_for(lambda: sum(metric(port, "requests_total", code="200")) == len(replies))
        by_variant = Counter(reply.variant for reply in replies)
        for variant, count in by_variant.items():
            assert metric(port, "requests_total", variant=variant) == [count]
            assert metric(port, "request_seconds_count", variant=variant) == [count]
        assert metric(port, "repeated_total", variant="full") > [0]
        assert metric(port, "repeated_total", variant="int4") > [0]
        assert metric(port, "share_ratio", deployment="chat-int4") == [0.5]


@pytest.mark.parametrize(
    ("path", "expected"), [("/v1/completions", (502, 2)), ("/v1/responses", (502, 1))]
)
def test_what_kills_servers_goes_to_two_and_what_they_keep_to_one(
    tmp_path: Path, path: str, expected: tuple[int, int]
) -> None:
    with Upstream("a") as a, Upstream("b") as b, Upstream("c") as c, Upstream("int4") as int4:
        servers = ",".join(upstream.address for upstream in (a, b, c))
        both = [Variant("full", "a", servers), Variant("int4", "b", int4.address)]
        split = all_to_baseline("chat", "full", both).with_shares({"int4": 1})
        write_gateway(tmp_path, split, Listening("127.0.0.1", free_port()))
        with Nginx(tmp_path) as gateway:
            status = gateway.ask(path, user="a", body=b"hang up").status
            assert (status, sum(u.requests for u in (a, b, c, int4))) == expected


def test_the_only_server_of_a_variant_may_end_while_it_answers(tmp_path: Path) -> None:
    """Some requests are sent on a connection that it has just closed, and are refused another."""
    with Upstream("full", 0.01) as full, Upstream("int4", 0.01) as int4:
        both = [Variant("full", "a", full.address), Variant("int4", "b", int4.address)]
        split = all_to_baseline("chat", "full", both).with_shares({"int4": 5000})
        write_gateway(tmp_path, split, Listening("127.0.0.1", free_port()))
        replies: list[Reply] = []
        with Nginx(tmp_path) as gateway, load(gateway, replies):
            wait_for(lambda: len(replies) > 200)
            int4.stop()
            asked = len(replies)
            wait_for(lambda: len(replies) > asked + 100)
        assert Counter(reply.status for reply in replies) == {200: len(replies)}
        assert {reply.variant for reply in replies[:asked]} == {"full", "int4"}


def test_replicas_share_requests_by_fewest_connections(tmp_path: Path) -> None:
    with Upstream("slow", 0.2) as slow, Upstream("fast") as fast, Upstream("int4") as int4:
        address = f"{slow.address},{fast.address}"
        both = [Variant("full", "a", address), Variant("int4", "b", int4.address)]
        split = all_to_baseline("chat", "full", both)
        write_gateway(tmp_path, split, Listening("127.0.0.1", free_port()))
        replies: list[Reply] = []
        with Nginx(tmp_path) as gateway, load(gateway, replies):
            wait_for(lambda: len(replies) > 200)
        assert {reply.status for reply in replies} == {200}
        assert 0 < 4 * slow.requests < fast.requests


def test_a_lost_name_keeps_its_servers_and_a_new_address_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`chat.example` is known, then lost while nginx is reloaded, then moves."""
    place: dict[str, str | None] = {"chat.example": "127.0.0.1"}
    real = socket.getaddrinfo

    def getaddrinfo(host: str, *arguments: Any, **options: Any) -> Any:
        if host not in place:
            return real(host, *arguments, **options)
        if place[host] is None:
            raise socket.gaierror("name lost")
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (place[host], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    replies: list[Reply] = []
    with Upstream("full") as full, Upstream("int4") as int4:
        named = full.address.replace("127.0.0.1", "chat.example")
        both = [Variant("full", "a", named), Variant("int4", "b", int4.address)]
        split = all_to_baseline("chat", "full", both).with_shares({"int4": 2000})
        write_gateway(tmp_path, split, Listening("127.0.0.1", free_port()))
        control = NginxGateway(tmp_path)
        watch = Watch(control, seconds=1)
        with Nginx(tmp_path) as gateway, load(gateway, replies):
            place["chat.example"] = None
            watch.round()
            control.apply(split.with_shares({"int4": 0}))
            watch.round()
            wait_for(lambda: len(replies) > 100)
            assert {gateway.ask(user=str(i)).variant for i in range(10)} == {"full"}
            control.apply(split)
            place["chat.example"] = "127.0.0.2"  # nobody is there: int4 stands in
            watch.round()
            assert "127.0.0.2:" in (tmp_path / "servers.conf").read_text()
            place["chat.example"] = "127.0.0.1"
            watch.round()
    assert Counter(reply.status for reply in replies) == {200: len(replies)}


def test_a_gateway_that_ends_is_reloaded_no_more(tmp_path: Path) -> None:
    """nginx that was asked to finish would start anew, and never end."""
    with Service(tmp_path / "gateway", "full", "int4") as service:
        before = (service.folder / "servers.conf").read_text()
        watch = Watch(service.control, seconds=1)
        service.upstreams["int4"].stop()
        watch.round()
        watch.round()
        watch.stop()
        watch.round()
        assert (service.folder / "servers.conf").read_text() == before
        Watch(service.control, seconds=1, _failed={service.upstreams["int4"].address: 2}).round()
        assert " down" in (service.folder / "servers.conf").read_text(), "a third time it would be"


def test_where_nobody_answers_probes_nobody_is_taken_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Service(tmp_path / "gateway", "full", "int4") as service:
        for upstream in service.upstreams.values():
            upstream.stop()
        watch = Watch(service.control, seconds=1)
        for _ in range(4):
            watch.round()
        assert " down" not in (service.folder / "servers.conf").read_text()
    assert capsys.readouterr().err == "servers: none answers, so all are asked on\n"


def test_shares_of_a_followed_file_go_live_and_wrong_ones_change_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "split.json"
    with Service(tmp_path / "gateway", "full", "int4") as service:
        watch = Watch(service.control, seconds=1, follow=file)
        wanted = service.split.with_shares({"int4": 2500})
        file.write_text(json.dumps(wanted.to_dict()))
        watch.round()
        assert service.control.live() == wanted
        for wrong in ("", "{}", file.read_text().replace('"int4"', '"int5"')):
            file.write_text(wrong)
            watch.round()
            assert service.control.live() == wanted
    said = capsys.readouterr().err
    assert "split.json: not a split" in said
    assert "split.json: has int5 25%, full 75%, the gateway int4, full" in said
