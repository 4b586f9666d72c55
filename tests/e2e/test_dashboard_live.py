"""Two real servers, scraped by the real Prometheus as deploy/ ships it: every rule and every query
of the dashboard returns data, and the page draws it.

Only time is shortened: scraping and evaluating every second instead of every 15. What may be empty
is decided per query: it says what it `needs`, and the servers say whether they have it.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.e2e.browser import Drawn, page_after_scripts, screenshot
from tests.e2e.prometheus import Prometheus, tool
from tests.e2e.server import VllmServer
from vllm_compress.cli import main
from vllm_compress.dashboard.grafana import dashboard
from vllm_compress.dashboard.page import serve
from vllm_compress.dashboard.panels import ALERTS, ENERGY, panels
from vllm_compress.prometheus import Prometheus as Client

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
SHIPPED = REPOSITORY / "deploy" / "prometheus"
VARIANTS = ("full", "int4")
CLIENTS = 4
LOAD_SECONDS = 15
# Of these machines: no GPU to divide by; energy where the processor tells it.
NEEDS_GPU = "deployment:vllm_compress_generation_tokens_per_gpu:rate2m"
COLORS = {"full": (0x25, 0x63, 0xEB), "int4": (0xE8, 0x59, 0x0C)}


class Variant(VllmServer):
    """`vllm-compress serve --config` of one variant of the service `novels`, on one core."""

    def __init__(self, variant: str, model: Path, folder: Path, core: int) -> None:
        super().__init__(model, env={"VLLM_CPU_OMP_THREADS_BIND": str(core)})
        self.variant = variant
        file = folder / f"{variant}.yaml"
        deployment = {
            "version": 1,
            "name": f"novels-{variant}",
            "service": "novels",
            "variant": variant,
            "model": str(model),
            "device": {"type": "cpu", "price_per_hour": 0.2},
            "objectives": {"ttft": 0.5, "tpot": 0.05, "target": 0.9},
            "vllm": {"host": "127.0.0.1", "port": self.port, "served-model-name": "novels"},
        }
        file.write_text(yaml.safe_dump(deployment))
        small = ["--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"]
        self.command = [sys.executable, "-m", "vllm_compress.cli", "serve"]
        self.command += ["--config", str(file), *small]

    def ask(self, index: int) -> int:
        """One streamed completion; prompts, lengths and ends differ. Tokens it got."""
        body = {
            "model": "novels",
            "prompt": "It was a dark and stormy night; " * (1 + index % 12),
            "max_tokens": 8 + 12 * (index % 5),
            "ignore_eos": True,
            "seed": index,
            "stop": [","] if index % 3 == 2 else None,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        tokens = 0
        with connection.getresponse() as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    usage = json.loads(line.removeprefix(b"data: ")).get("usage")
                    tokens = usage["completion_tokens"] if usage else tokens
        connection.close()
        return tokens


def load(servers: list[Variant], seconds: float) -> dict[str, int]:
    """CLIENTS clients each for `seconds`; tokens that each variant generated."""
    end = time.monotonic() + seconds

    def client(number: int, server: Variant) -> int:
        tokens, index = 0, number
        while time.monotonic() < end:
            tokens += server.ask(index)
            index += CLIENTS
        return tokens

    with ThreadPoolExecutor(CLIENTS * len(servers)) as pool:
        runs = {s.variant: [pool.submit(client, n, s) for n in range(CLIENTS)] for s in servers}
        return {variant: sum(run.result() for run in some) for variant, some in runs.items()}


def shipped(folder: Path, servers: list[Variant]) -> Path:
    """deploy/prometheus with the servers as its targets and a second for its intervals."""
    shutil.copytree(SHIPPED, folder)
    targets = [
        {"targets": [f"127.0.0.1:{s.port}"], "labels": {"deployment": f"novels-{s.variant}"}}
        for s in servers
    ]
    (folder / "targets" / "vllm.yml").write_text(yaml.safe_dump(targets))
    config = folder / "prometheus.yml"
    block = yaml.safe_load(config.read_text())
    block["global"] = dict.fromkeys(block["global"], "1s")
    config.write_text(yaml.safe_dump(block))
    return config


@pytest.fixture(scope="module")
def servers(
    novels_8m: Path, novels_int4: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Variant]]:
    tool("prometheus")
    folder = tmp_path_factory.mktemp("variants")
    models = zip(VARIANTS, (novels_8m, novels_int4), strict=True)
    both = [Variant(name, model, folder, core) for core, (name, model) in enumerate(models)]
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        list(pool.map(stack.enter_context, both))
        yield both


@pytest.fixture(scope="module")
def tokens() -> dict[str, int]:
    """Filled by the load, before the first scrape and after it."""
    return {}


@pytest.fixture(scope="module")
def prometheus(
    servers: list[Variant], tokens: dict[str, int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Has scraped both servers before, during and after a load."""
    config = shipped(tmp_path_factory.mktemp("deploy") / "prometheus", servers)
    with Prometheus(config) as running:
        running.wait_for("vllm_compress_deployment_info", series=2)
        tokens.update(load(servers, LOAD_SECONDS))
        at_rest = 'sum by (deployment) (vllm_compress_generation_tokens_total{deployment="novels-'
        for variant, count in tokens.items():
            running.wait_for(f'{at_rest}{variant}"}}) == {count}', seconds=20)
        time.sleep(2.5)  # for the rules to follow, those on rules too
        yield running


def has_energy(prometheus: Prometheus) -> bool:
    return bool(prometheus.query("vllm_compress_energy_joules_total"))


def test_every_recording_rule_returns_data_for_both_variants(prometheus: Prometheus) -> None:
    energy = has_energy(prometheus)
    rules = yaml.safe_load((SHIPPED / "rules" / "recording.yml").read_text())["groups"][0]["rules"]
    for rule in rules:
        name = rule["record"]
        found = prometheus.query(name)
        absent = name == NEEDS_GPU or ("energy_joules" in name and not energy)
        deployments = {labels["deployment"] for labels, _ in found}
        assert deployments == (set() if absent else {"novels-full", "novels-int4"}), name
        if "group_left (service, variant)" in rule["expr"]:
            joined = {(labels["service"], labels["variant"]) for labels, _ in found}
            assert joined == (set() if absent else {("novels", v) for v in VARIANTS}), name
    groups = prometheus.api("rules")["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}


def test_recorded_figures_are_those_of_the_clients(
    prometheus: Prometheus, tokens: dict[str, int]
) -> None:
    """Cost is what a device-hour costs over what an hour at this rate would generate."""
    for variant in VARIANTS:
        who = f'{{deployment="novels-{variant}"}}'
        (_, rate), (_, cost) = (
            prometheus.query(f"deployment:vllm_compress_{name}{who}")[0]
            for name in ("generation_tokens:rate2m", "cost_per_million_generation_tokens:rate2m")
        )
        assert cost == pytest.approx(0.2 / (rate * 3600) * 1e6, rel=0.02)
        # `rate` spreads what it saw over its 2 minutes, and a second more at each end.
        assert rate * 120 == pytest.approx(tokens[variant], rel=0.2)


def test_every_query_of_the_grafana_dashboard_returns_data(prometheus: Prometheus) -> None:
    energy = has_energy(prometheus)
    needs_energy = {q.series for panel in panels() for q in panel.queries if q.needs == ENERGY}
    values = {
        "service": ".*",
        "deployment": "novels-full|novels-int4",
        "a": "novels-full",
        "b": "novels-int4",
        "__range": "1m",
    }
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, value in values.items():
                expression = expression.replace(f"${name}", value)
            found = prometheus.query(expression)
            if target["expr"] == ALERTS:
                continue  # none fires, or some do
            may_be_empty = not energy and any(series in expression for series in needs_energy)
            assert found or may_be_empty, (panel["title"], expression)
            if '=~"novels-full|novels-int4"' in expression and found:
                assert len({labels["deployment"] for labels, _ in found}) == 2, expression


def test_grafana_variables_find_service_and_deployments(prometheus: Prometheus) -> None:
    for variable in dashboard()["templating"]["list"][1:]:
        inside = variable["definition"].removeprefix("label_values(").removesuffix(")")
        series, label = inside.rsplit(", ", 1)
        match = urllib.parse.urlencode({"match[]": series.replace("$service", ".*")})
        with urllib.request.urlopen(f"{prometheus.url}/api/v1/label/{label}/values?{match}") as got:
            found = json.load(got)["data"]
        names = {"service": ["novels"]}.get(label, ["novels-full", "novels-int4"])
        assert found == names, variable["name"]


def test_page_draws_every_panel_of_both_variants(prometheus: Prometheus, tmp_path: Path) -> None:
    page = tmp_path / "dashboard.html"
    arguments = ["dashboard", "--prometheus", prometheus.url, "--range", "3m", "-o", str(page)]
    assert main(arguments) == 0
    energy = has_energy(prometheus)
    for view in ("overview", "ab"):
        url = f"{page.as_uri()}#view={view}"
        seen = Drawn(page_after_scripts(url))
        expected = [panel for panel in panels() if energy or panel.needs != ENERGY]
        assert list(seen.panels) == [panel.title for panel in expected], view
        for panel in expected:
            lines = [d for d in seen.panels[panel.title] if d.count("L") >= 3]
            assert len(lines) >= 2 * len(panel.queries), (view, panel.title)
        assert "int4 g128" in seen.text
        assert_colored(screenshot(url, tmp_path / f"{view}.png"))


def assert_colored(picture: Path) -> None:
    """Both deployments' colours are drawn, and the page is not one plain surface."""
    import matplotlib.image
    import numpy as np

    pixels = np.round(matplotlib.image.imread(picture)[..., :3] * 255).astype(int)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50, picture
    for name, color in COLORS.items():
        near = (np.abs(pixels - np.array(color)).max(axis=-1) < 12).sum()
        assert near > 2000, (picture, name, near)


def test_served_page_follows_and_a_dead_server_is_told(
    prometheus: Prometheus, servers: list[Variant]
) -> None:
    """The last test: it stops a server."""
    with serve(Client(prometheus.url), "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        before = Drawn(page_after_scripts(url))
        servers[1].__exit__(None, None, None)
        pending = 'ALERTS{alertname="VllmCompressTargetDown", alertstate="pending"}'
        ((labels, _),) = prometheus.wait_for(pending, seconds=20)
        after = Drawn(page_after_scripts(url))
        server.shutdown()
    assert labels["deployment"] == "novels-int4"
    assert list(before.panels) == list(after.panels)
    assert "does not answer" not in before.text
    assert f"127.0.0.1:{servers[1].port} (novels-int4) does not answer" in after.text
