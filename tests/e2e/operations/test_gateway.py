"""The gateway's real nginx: who meets which variant, what happens to the dead, and reloads."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from compress_methods.errors import CompressError
from tests.e2e.support.operations.nginx import Nginx, Stream, Upstream
from tests.e2e.support.server import free_port
from vllm_compress.cli import main
from vllm_compress.operations.gateway.control import NginxGateway
from vllm_compress.operations.gateway.nginx import Listening, write_gateway
from vllm_compress.operations.gateway.traffic_split import TrafficSplit, Variant, all_to_baseline

pytestmark = pytest.mark.e2e
USERS = range(400)


class Service:
    """A gateway in front of variants that each are one `Upstream`."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder = folder
        self.upstreams = {name: Upstream(name) for name in names}
        variants = [Variant(n, f"chat-{n}", u.address) for n, u in self.upstreams.items()]
        self.split = all_to_baseline("chat", "full", variants)
        write_gateway(folder, self.split, Listening("127.0.0.1", free_port()))
        self.nginx = Nginx(folder)
        self.control = NginxGateway(folder)

    def __enter__(self) -> Service:
        with ExitStack() as stack:
            for upstream in self.upstreams.values():
                stack.enter_context(upstream)
            stack.enter_context(self.nginx)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def share(self, **percents: int) -> TrafficSplit:
        """Give variants these percentages, as a rollout does."""
        split = self.split.with_shares({name: 100 * n for name, n in percents.items()})
        self.control.check(split)
        self.control.apply(split)
        assert self.control.live() == split
        return split


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("two") / "gateway", "full", "int4") as running:
        yield running


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Service]:
    """For tests that stop a variant."""
    with Service(tmp_path / "gateway", "full", "int4") as running:
        yield running


def plausible(count: int, trials: int, share: float) -> bool:
    """Whether `count` of `trials` lies within 3.3 standard deviations of `share` (99.9%)."""
    return abs(count - share * trials) <= 3.3 * math.sqrt(trials * share * (1 - share))


def test_users_stick_and_a_rise_moves_them_one_way_only(service: Service) -> None:
    met: dict[int, list[str | None]] = {}
    for percent in (0, 10, 30, 100, 30):
        service.share(int4=percent)
        seen = service.nginx.variants(USERS)
        assert plausible(seen.count("int4"), len(seen), percent / 100)
        if percent in met:
            assert seen == met[percent], "users come back to where they were"
        met[percent] = seen
    for low, high in ((0, 10), (10, 30), (30, 100)):
        moved = {pair for pair in zip(met[low], met[high], strict=True) if pair[0] != pair[1]}
        assert moved == {("full", "int4")}


def test_of_three_variants_a_rise_takes_from_the_baseline_only(tmp_path: Path) -> None:
    with Service(tmp_path / "gateway", "full", "int4", "int8") as three:
        three.share(int4=10, int8=20)
        before = three.nginx.variants(USERS)
        three.share(int4=50, int8=20)
        after = three.nginx.variants(USERS)
        for name, share in {"int4": 0.5, "full": 0.3, "int8": 0.2}.items():
            assert plausible(after.count(name), len(after), share)
        moved = {pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]}
        assert moved == {("full", "int4")}


def test_a_user_is_known_by_id_else_key_else_address(service: Service) -> None:
    service.share(int4=50)
    ask = service.nginx.ask
    keys = [f"Bearer {i}" for i in range(40)]
    by_key = [ask(key=key).variant for key in keys]
    assert set(by_key) == {"full", "int4"}
    assert [ask(key=key).variant for key in keys] == by_key
    assert len({ask(user="one", key=key).variant for key in keys}) == 1
    assert len({ask().variant for _ in range(20)}) == 1
    assert all(key not in service.nginx.log for key in keys)


def test_another_variant_stands_in_for_a_dead_one(fresh: Service) -> None:
    fresh.share(int4=50)
    before = fresh.nginx.variants(range(40))
    fresh.upstreams["int4"].stop()
    replies = [fresh.nginx.ask(user=f"user-{i}", body=b"1234") for i in range(40)]
    assert {(r.status, r.variant, r.body) for r in replies} == {(200, "full", "full 4")}
    assert before.count("int4") > 0


def test_the_baseline_is_stood_in_for_only_by_variants_in_service(fresh: Service) -> None:
    fresh.upstreams["full"].stop()
    reply = fresh.nginx.ask()
    assert (reply.status, reply.variant) == (502, None)
    assert '"message": "no server of chat answered"' in reply.body
    fresh.share(int4=1)
    assert {fresh.nginx.ask(user=str(i)).variant for i in range(20)} == {"int4"}


def test_a_request_that_a_server_began_is_not_sent_to_another(service: Service) -> None:
    service.share(int4=50)
    before = sum(upstream.requests for upstream in service.upstreams.values())
    statuses = [service.nginx.ask(user=str(i), body=b"hang up").status for i in range(20)]
    assert statuses == [502] * 20
    assert sum(upstream.requests for upstream in service.upstreams.values()) == before + 20


def test_answers_stream_and_outlive_a_reload(service: Service) -> None:
    service.share(int4=0)
    full = service.upstreams["full"]
    full.go_on.clear()
    streams = [Stream(service.nginx, f"user-{i}") for i in range(8)]
    assert [stream.line() for stream in streams] == ["first"] * 8
    service.share(int4=100)
    full.go_on.set()
    assert [stream.line() for stream in streams] == ["second"] * 8
    assert [stream.line() for stream in streams] == [""] * 8


def test_reloads_lose_no_request_of_busy_clients(service: Service) -> None:
    stop = threading.Event()
    outcomes: list[Any] = []

    def client(number: int) -> None:
        connection = None
        while not stop.is_set():
            try:
                if connection is None:
                    connection = HTTPConnection(service.nginx.url[7:], timeout=30)
                connection.request("POST", "/v1/x", b"body", {"X-User-Id": f"user-{number}"})
                answer = connection.getresponse()
                outcomes.append((answer.status, answer.read()[-1:]))
                if answer.will_close:
                    connection = None
            except OSError as problem:
                outcomes.append(problem)
                connection = None

    clients = [threading.Thread(target=client, args=(i,)) for i in range(8)]
    for thread in clients:
        thread.start()
    try:
        for percent in (10, 60, 0, 100, 30) * 2:
            service.share(int4=percent)
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    assert len(outcomes) > 100
    assert set(outcomes) == {(200, b"4")}


def test_large_bodies_pass_and_only_model_paths_do(service: Service) -> None:
    ask = service.nginx.ask
    assert ask(body=b"x" * 1_000_000).body.endswith(" 1000000")
    assert ask("/healthz", body=None).body == "ok\n"
    for path in ("/metrics", "/collective_rpc", "/v1", "/tokenizer_info"):
        assert ask(path).status == 404


def test_a_split_that_nginx_refuses_changes_nothing(service: Service) -> None:
    live = service.share(int4=20)
    config = service.folder / "nginx.conf"
    good = config.read_text()
    config.write_text(good.replace("worker_connections", "worker_conections"))
    try:
        with pytest.raises(
            CompressError, match=r"nginx refuses the new split: .*worker_conections"
        ):
            service.control.check(live.with_shares({"int4": 0}))
    finally:
        config.write_text(good)
    assert service.control.live() == service.control.stored() == live
    assert not list(service.folder.glob("next-*"))


def test_a_split_that_does_not_go_live_is_taken_back(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = service.share(int4=20)
    config = service.folder / "nginx.conf"
    good = config.read_text()
    monkeypatch.setattr("vllm_compress.operations.gateway.control.PATIENCE", 0.5)
    config.write_text(good.replace("worker_connections", "worker_conections"))
    try:
        with pytest.raises(CompressError, match="the old split is back"):
            service.control.apply(live.with_shares({"int4": 50}))
    finally:
        config.write_text(good)
    assert service.control.live() == service.control.stored() == live


def test_two_rollouts_at_once_are_one_too_many(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    with service.control.lock():
        assert main(["rollout", "--gateway", str(service.folder), "--to", "0%"]) == 2
    assert "another rollout is at work" in capsys.readouterr().err


def test_rollout_needs_a_gateway_that_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rollout", "--gateway", str(tmp_path), "--to", "0%"]) == 2
    assert "split.conf: no such file" in capsys.readouterr().err
    variants = [Variant("full", "a", "127.0.0.1:1"), Variant("int4", "b", "127.0.0.1:2")]
    listening = Listening("127.0.0.1", free_port())
    write_gateway(tmp_path, all_to_baseline("chat", "full", variants), listening)
    assert main(["rollout", "--gateway", str(tmp_path), "--to", "0%"]) == 2
    assert "no answer" in capsys.readouterr().err
