"""`rollout` asks a real Prometheus before it goes up, and nobody before it goes down."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from tests.e2e.support.operations.nginx import Nginx
from tests.e2e.support.operations.prometheus import Prometheus, scrape_config
from tests.e2e.support.server import free_port
from vllm_compress.cli import main
from vllm_compress.operations.gateway.control import NginxGateway
from vllm_compress.operations.gateway.nginx import Listening, write_gateway
from vllm_compress.operations.gateway.traffic_split import Variant, all_to_baseline

pytestmark = pytest.mark.e2e
EXPORTED = """\
vllm_compress_deployment_info{deployment="chat-int4",service="chat"} 1
perhaps_worse{service="chat"} 1
"""
RULES = """
groups:
  - name: test
    rules:
      - {alert: Worse, expr: worse == 1}
      - {alert: PerhapsWorse, expr: perhaps_worse == 1, for: 1h}
"""


class Exporter:
    """Serves `text` as metrics."""

    def __init__(self, text: str) -> None:
        self.text = text
        exporter = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(exporter.text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port

    def __enter__(self) -> Exporter:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def exporter() -> Iterator[Exporter]:
    with Exporter(EXPORTED) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(
    exporter: Exporter, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    rules = tmp_path_factory.mktemp("rules") / "rules.yml"
    rules.write_text(RULES)
    with Prometheus(scrape_config({"test": exporter.port}, [rules], interval=0.5)) as running:
        running.wait_for("vllm_compress_deployment_info")
        yield running


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[NginxGateway]:
    variants = [
        Variant("full", "chat-full", "127.0.0.1:1"),
        Variant("int4", "chat-int4", "127.0.0.1:2"),
    ]
    split = all_to_baseline("chat", "full", variants).with_shares({"int4": 3000})
    write_gateway(tmp_path / "gateway", split, Listening("127.0.0.1", free_port()))
    with Nginx(tmp_path / "gateway"):
        yield NginxGateway(tmp_path / "gateway")


def rollout(gateway: NginxGateway, to: str, *more: str) -> int:
    return main(["rollout", "--gateway", str(gateway.folder), "--to", to, *more])


def share(gateway: NginxGateway) -> float:
    return gateway.live().shares["int4"] / 100


def alert(exporter: Exporter, prometheus: Prometheus, **labels: str) -> None:
    """Have `Worse` fire with these labels, and no other."""
    inside = ",".join(f'{name}="{value}"' for name, value in labels.items())
    exporter.text = EXPORTED + f"worse{{{inside}}} 1\n"
    selector = ",".join(['alertname="Worse"', 'alertstate="firing"', inside])
    prometheus.wait_for(f"ALERTS{{{selector}}}")
    prometheus.wait_for("count(worse) == 1")


def test_up_only_without_an_alert_of_the_service(
    gateway: NginxGateway,
    exporter: Exporter,
    prometheus: Prometheus,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["--prometheus", prometheus.url]
    alert(exporter, prometheus, service="other", deployment="other-int4")
    prometheus.wait_for('ALERTS{alertname="PerhapsWorse",alertstate="pending",service="chat"}')
    assert rollout(gateway, "50%", *asked) == 0
    assert share(gateway) == 50

    for labels in ({"service": "chat"}, {"deployment": "chat-int4"}, {"deployment": "chat-full"}):
        alert(exporter, prometheus, **labels)
        capsys.readouterr()
        assert rollout(gateway, "60%", *asked) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "chat: int4 gets no more traffic while Worse" in line
        assert share(gateway) == 50

    assert rollout(gateway, "60%", "--no-alert-check") == 0
    assert rollout(gateway, "12.5%", *asked, "--json") == 0
    told = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert {k: told[k] for k in ("service", "variant", "from", "to", "changed")} == {
        "service": "chat",
        "variant": "int4",
        "from": 60,
        "to": 12.5,
        "changed": True,
    }
    assert told["split"] == {"int4": 12.5, "full": 87.5}
    assert share(gateway) == 12.5

    alert(exporter, prometheus, service="other")
    assert rollout(gateway, "100%", *asked, "--dry-run") == 0
    assert share(gateway) == 12.5


def test_silence_of_a_prometheus_that_is_blind_is_no_consent(
    gateway: NginxGateway, exporter: Exporter, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(url: str) -> str:
        assert rollout(gateway, "50%", "--prometheus", url) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("--no-alert-check goes up regardless")
        assert share(gateway) == 30
        return line

    with Prometheus(scrape_config({"test": exporter.port}, interval=0.5)) as without_rules:
        assert "it has no series of chat-int4" in refusal(without_rules.url)
        without_rules.wait_for("vllm_compress_deployment_info")
        assert "it has no alerting rules" in refusal(without_rules.url)
        gone = without_rules.url
    assert "cannot reach Prometheus" in refusal(gone)
    assert rollout(gateway, "0%", "--prometheus", gone) == 0
    assert share(gateway) == 0


def test_without_to_the_split_is_shown(
    gateway: NginxGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rollout", "--gateway", str(gateway.folder)]) == 0
    assert capsys.readouterr().out == "chat: int4 30%, full 70%\n"
    assert main(["rollout", "--gateway", str(gateway.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"int4": 30, "full": 70}


def test_is_done_only_when_no_old_worker_takes_requests(gateway: NginxGateway) -> None:
    """One that sleeps through the news would still send users by the old split."""
    master = int((gateway.folder / "nginx.pid").read_text())
    worker = psutil.Process(master).children()[0]
    worker.suspend()
    try:
        done = threading.Thread(target=rollout, args=(gateway, "0%", "--no-alert-check"))
        done.start()
        done.join(2)
        assert done.is_alive()
        assert share(gateway) == 0
    finally:
        worker.resume()
    done.join(10)
    assert not done.is_alive()
