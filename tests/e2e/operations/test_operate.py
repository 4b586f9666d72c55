"""Two variants of a service in operation, with the processes that deploy/compose starts.

Real vLLM servers behind the real nginx, watched by the real Prometheus: every rule and every query
of the dashboard returns data, and the page draws it; users are split and stick, the counts of
Prometheus are those of the clients, a rollout loses nothing and heeds alerts, `plan` calibrates on
a server, and `compare` tells a good variant from a bad one.

The tests are in the order of an operation's life, and each leaves it as the next one finds it.
Only time is shortened: Prometheus reads every 2 seconds instead of every 15. What may be empty is
decided per query: it says what it `needs`, and the servers say whether they have it.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.support.operations.browser import Drawn, assert_colored, page_after_scripts, too_few
from tests.e2e.support.operations.composed import Composed, Stack
from tests.e2e.support.operations.failures import failing
from tests.e2e.support.operations.operation import (
    CLIENTS,
    Operation,
    binomial_interval,
    check_counts,
    running,
    start_all,
)
from tests.e2e.support.operations.probing import check_every_kind, shorter_probes
from tests.e2e.support.operations.prometheus import Prometheus, tool
from tests.e2e.support.tiny import compress
from vllm_compress.cli import main
from vllm_compress.operations.abtest.probes import files
from vllm_compress.operations.dashboard.grafana import dashboard
from vllm_compress.operations.dashboard.operation import DRAFT, QUALITY
from vllm_compress.operations.dashboard.page import serve
from vllm_compress.operations.dashboard.panels import ALERTS, ENERGY, panels
from vllm_compress.operations.prometheus import Prometheus as Client

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
REQUESTS, USERS, SHARE = 300, 150, 0.3
VARIANTS, CANDIDATES = ("full", "int4"), ("int8", "int2")
LOAD_SECONDS = 15
KV_SPACE = 2**30
# Of these machines: no GPU to divide by; energy where the processor tells it.
NEEDS_GPU = "deployment:vllm_compress_generation_tokens_per_gpu:rate2m"
NEEDS_FAILURES = "vllm_compress_http_failures"
# Neither has a draft, and nobody compares them at night.
NOT_HERE = (DRAFT, QUALITY)
LOOKS = 4
ABSENT = {query.series for p in panels() for query in p.queries if query.needs in NOT_HERE}
ALERT = """
groups:
  - name: test
    rules:
      - alert: TestVariantServes
        expr: sum by (deployment) (vllm_compress_requests_total{deployment="chat-int4"}) > 0
"""


@pytest.fixture(scope="module")
def models(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """full, int8, int4 and int2: novels-8m and its blocks rounded to nearest."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("models")
    found = {"full": novels_8m}
    for bits in (8, 4, 2):
        formats = {"w": {"format": "integer", "bits": bits, "group_size": 128}}
        name = f"int{bits}"
        found[name] = compress(novels_8m, folder / name, formats, {"blocks": "w"})
    return found


@pytest.fixture(scope="module")
def operation(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Operation]:
    tool("prometheus")
    with running(tmp_path_factory.mktemp("operate") / "stack", models) as operation:
        yield operation


@pytest.fixture(scope="module")
def prometheus(operation: Operation) -> Prometheus:
    """Has scraped both servers before, during and after a load on both alike."""
    clients = operation.clients
    assert operation.rollout("50%") == 0
    with clients.keep_asking():
        time.sleep(LOAD_SECONDS)
    assert not clients.lost
    check_counts(operation)
    # The rule whose data comes last, for long enough that a line can be drawn.
    last = "count_over_time(deployment_objective:vllm_compress_objective_missed:ratio_rate5m[2m])"
    operation.prometheus.wait_for(f"{last} >= 12", series=4)
    return operation.prometheus


def has_energy(prometheus: Prometheus) -> bool:
    return bool(prometheus.query("vllm_compress_energy_joules_total"))


def test_every_recording_rule_returns_data_for_both_variants(
    operation: Operation, prometheus: Prometheus
) -> None:
    energy = has_energy(prometheus)
    rules = [
        rule
        for name in ("recording.yml", "operation.yml")
        for group in yaml.safe_load((operation.stack.rules / name).read_text())["groups"]
        for rule in group["rules"]
    ]
    for rule in rules:
        name = rule["record"]
        found = prometheus.query(name)
        absent = name == NEEDS_GPU or name in ABSENT or ("energy_joules" in name and not energy)
        # The gateway is a target too.
        deployments = {labels["deployment"] for labels, _ in found} - {"chat-gateway"}
        if NEEDS_FAILURES in name:  # of which there are none; deploy/prometheus/tests has some
            assert deployments <= {"chat-full", "chat-int4"}
            continue
        assert deployments == (set() if absent else {"chat-full", "chat-int4"}), name
        if "group_left (service, variant)" in rule["expr"]:
            joined = {(labels["service"], labels["variant"]) for labels, _ in found}
            assert joined == (set() if absent else {("chat", v) for v in VARIANTS}), name
    groups = prometheus.api("rules")["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}


def test_recorded_figures_are_those_of_the_clients(
    operation: Operation, prometheus: Prometheus
) -> None:
    """Cost is what a device-hour costs over what an hour at this rate would generate."""
    tokens = operation.clients.tokens()
    for variant in VARIANTS:
        who = f'{{deployment="chat-{variant}"}}'
        rate, cost = (
            f"deployment:vllm_compress_{name}{who}"
            for name in ("generation_tokens:rate2m", "cost_per_million_generation_tokens:rate2m")
        )
        # Asked at once: between two queries the rules may be evaluated anew.
        (_, both), *_ = prometheus.query(f"{cost} * on (deployment) {rate}")
        assert both == pytest.approx(0.2 / 3600 * 1e6, rel=0.02)
        ((_, per_second),) = prometheus.query(rate)
        # `rate` spreads what it saw over its 2 minutes, and a second more at each end.
        assert per_second * 120 == pytest.approx(tokens[variant], rel=0.2)


def test_every_query_of_the_grafana_dashboard_returns_data(prometheus: Prometheus) -> None:
    energy = has_energy(prometheus)
    needs_energy = {q.series for panel in panels() for q in panel.queries if q.needs == ENERGY}
    values = {
        "service": ".*",
        "deployment": "chat-full|chat-int4",
        "a": "chat-full",
        "b": "chat-int4",
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
            empty = ABSENT | (set() if energy else needs_energy)
            may_be_empty = any(series in expression for series in empty)
            assert found or may_be_empty, (panel["title"], expression)
            if '=~"chat-full|chat-int4"' in expression and found:
                assert len({labels["deployment"] for labels, _ in found}) == 2, expression


def test_grafana_variables_find_service_and_deployments(prometheus: Prometheus) -> None:
    for variable in dashboard()["templating"]["list"][1:]:
        inside = variable["definition"].removeprefix("label_values(").removesuffix(")")
        series, label = inside.rsplit(", ", 1)
        match = urllib.parse.urlencode({"match[]": series.replace("$service", ".*")})
        with urllib.request.urlopen(f"{prometheus.url}/api/v1/label/{label}/values?{match}") as got:
            found = json.load(got)["data"]
        names = {"service": ["chat"]}.get(label, ["chat-full", "chat-int4"])
        assert found == names, variable["name"]


def test_page_draws_every_panel_of_both_variants(prometheus: Prometheus, tmp_path: Path) -> None:
    page = tmp_path / "dashboard.html"
    arguments = ["dashboard", "--prometheus", prometheus.url, "--range", "3m", "-o", str(page)]
    energy = has_energy(prometheus)
    for view in ("overview", "ab"):
        picture = tmp_path / f"{view}.png"
        absent = NOT_HERE if energy else (*NOT_HERE, ENERGY)
        expected = [panel for panel in panels() if panel.needs not in absent]
        for _ in range(LOOKS):  # what has only just begun to happen has too few points for a line
            assert main(arguments) == 0
            seen = Drawn(page_after_scripts(f"{page.as_uri()}#view={view}", picture))
            assert list(seen.panels) == [panel.title for panel in expected], view
            short = [panel.title for panel in expected if too_few(prometheus, seen, panel)]
            if not short:
                break
            time.sleep(10)
        assert not short, view
        assert "int4 g128" in seen.text
        assert_colored(picture)


def test_users_requests_are_split_stick_and_are_counted(operation: Operation) -> None:
    assert operation.rollout("30%") == 0
    clients = operation.clients
    before = len(clients.answers)
    clients.ask_all(REQUESTS, USERS)
    answers = clients.answers[before:]
    assert not clients.lost
    assert len(answers) == REQUESTS
    variants = Counter(answer.variant for answer in answers)
    assert set(variants) == {"full", "int4"}
    low, high = binomial_interval(REQUESTS, SHARE, 0.99)
    assert low <= variants["int4"] <= high
    of_user = Counter((answer.user, answer.variant) for answer in answers)
    assert len(of_user) == USERS
    check_counts(operation)
    for server in operation.servers.values():
        assert "vllm-compress is not available" not in server.log


def test_rollout_under_load_loses_nothing_and_heeds_alerts(
    operation: Operation, capsys: pytest.CaptureFixture[str]
) -> None:
    clients, prometheus = operation.clients, operation.prometheus
    before = len(clients.answers)
    with clients.keep_asking():
        assert operation.rollout("50%") == 0
        time.sleep(1)
        (operation.stack.rules / "test.yml").write_text(ALERT)
        prometheus.reload()
        prometheus.wait_for('ALERTS{alertname="TestVariantServes",alertstate="firing"}')
        assert operation.rollout("60%") == 2
        refusal = capsys.readouterr().err
        assert operation.rollout("0%") == 0
        # Who asks from now on is a user of full; what int4 is still writing, it finishes.
        moved = len(clients.answers)
        time.sleep(2)
    assert "int4 gets no more traffic while TestVariantServes (chat-int4) fires" in refusal
    assert not clients.lost
    assert len(clients.answers) > before
    assert {a.variant for a in clients.answers[before:]} == {"full", "int4"}
    after = Counter(a.variant for a in clients.answers[moved:])
    assert after["int4"] <= CLIENTS < after["full"]
    check_counts(operation)


def test_served_page_follows_and_a_dead_server_is_told(
    operation: Operation, prometheus: Prometheus
) -> None:
    """Stopped while half of the users are its own, it loses none of their requests. No test after
    this one needs the server of int4."""
    with serve(Client(prometheus.url), "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # Of an hour the page has a point every 30 s, none yet where this test runs by itself.
        url = f"http://127.0.0.1:{server.server_address[1]}/#range=900"
        before = Drawn(page_after_scripts(url))
        gateway = ["rollout", "--gateway", str(operation.stack.state), "--no-alert-check"]
        assert main([*gateway, "--to", "50%"]) == 0
        asked = len(operation.clients.answers)
        with operation.clients.keep_asking():
            time.sleep(2)
            operation.servers["int4"].stop()  # SIGTERM: finishes what it has, streams too
            time.sleep(2)
        pending = 'ALERTS{alertname="VllmCompressTargetDown", alertstate="pending"}'
        ((labels, _),) = prometheus.wait_for(pending, seconds=20)
        after = Drawn(page_after_scripts(url))
        server.shutdown()
    assert not operation.clients.lost
    answered = [answer.variant for answer in operation.clients.answers[asked:]]
    assert set(answered) == {"full", "int4"}
    assert labels["deployment"] == "chat-int4"
    assert list(before.panels) == list(after.panels)
    assert "does not answer" not in before.text
    assert f"127.0.0.1:{operation.stack.ports['int4']} (chat-int4) does not answer" in after.text


def test_a_served_model_calibrates_the_plan_of_itself(
    operation: Operation,
    novels_8m: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from vllm_compress.operations.capacity.calibration import measure
    from vllm_compress.operations.capacity.footprint.memory import Layout, cache_of
    from vllm_compress.operations.capacity.footprint.shapes import load_shape

    monkeypatch.setattr(measure, "SECONDS", 8.0)
    saved = tmp_path / "here.json"
    common = [str(novels_8m), "--hardware", "local", "--rate", "1/s", "--input", "50"]
    common += ["--output", "20", "--context", "512", "--ttft", "p95<60s", "--tpot", "p95<60s"]
    url = operation.servers["full"].url
    calibrate = ["--calibrate", url, "--save-calibration", str(saved), "--json"]
    assert main(["plan", *common, *calibrate]) == 0
    served = measure.inspect_server(measure.Client(url))
    found = json.loads(capsys.readouterr().out)
    basis = {o["scheme"]: o["basis"] for o in found["options"]}
    assert basis == {"original": "measured", "int8": "scaled", "int4-gptq": "scaled"}
    weights = next(o["weight_bytes"] for o in found["options"] if o["scheme"] == "original")
    assert weights == pytest.approx(served.weight_bytes, rel=0.02)
    assert served.blocks is not None
    assert served.block is not None
    cache = cache_of(load_shape(str(novels_8m)), Layout(), "cpu", 2, 2048)
    per_token = KV_SPACE / (served.blocks * served.block)
    assert cache.page_bytes / cache.block == pytest.approx(per_token, rel=0.02)
    _again_from_the_file(common, saved, found, capsys)


def _again_from_the_file(
    common: list[str], saved: Path, first: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *common, "--calibrate", str(saved), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [o["latency"] for o in again["options"]] == [o["latency"] for o in first["options"]]


@pytest.fixture(scope="module")
def candidates(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Composed]]:
    """int8 and int2, beside those of the operation."""
    folder = tmp_path_factory.mktemp("candidates")
    found = {v: Stack(folder / v, models | {"int4": models[v]}).server("int4") for v in CANDIDATES}
    with ExitStack() as cleanup:
        start_all(cleanup, list(found.values()))
        yield found


def test_compare_tells_a_good_variant_from_a_bad_one(
    operation: Operation, candidates: dict[str, Composed], some_text: Path, tmp_path: Path
) -> None:
    text = " ".join(some_text.read_text(encoding="utf-8").split())
    lines = [text[i : i + 96] for i in range(0, 9600, 96)]
    # With no error at all it takes 96 prompts to show that there are few; a bad one shows sooner.
    prompts = {"int8": lines, "int2": lines[:24]}
    verdicts = {}
    for variant, candidate in candidates.items():
        file, out = tmp_path / f"{variant}.txt", tmp_path / f"{variant}-report"
        file.write_text("\n".join(prompts[variant]) + "\n")
        urls = [operation.servers["full"].url, candidate.url]
        more = ["--prompts", str(file), "-o", str(out), "--max-tokens", "4", "--quiet"]
        more += ["--metrics", str(tmp_path / f"{variant}.prom")]
        more += ["--probes", "choices", "--margin", "probes=none"]  # too few to be judged
        code = main(["compare", *urls, *more])
        report = json.loads((out / "report.json").read_text())
        assert report["b"]["info"]["formats"] == f"{variant} g128"
        rows = {row["metric"]: row for row in report["metrics"]}
        assert rows["probes/choices"]["n"] == rows["probes/decisions"]["n"] == 24
        verdicts[variant] = (code, report["verdict"])
    assert verdicts == {"int8": (0, "non-inferior"), "int2": (1, "inferior")}
    for variant, verdict in (("int8", "1.0"), ("int2", "-1.0")):
        lines = (tmp_path / f"{variant}.prom").read_text().splitlines()
        (line,) = (one for one in lines if one.startswith("vllm_compress_quality_verdict{"))
        assert 'baseline="chat-full",deployment="chat-int4",service="chat"' in line
        assert line.endswith(f" {verdict}")


def test_every_probe_has_a_figure_or_the_servers_words(
    operation: Operation,
    candidates: dict[str, Composed],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither has a tool parser or room for long texts."""
    folder = shorter_probes(tmp_path / "probes", count=4, max_tokens=8)
    monkeypatch.setattr(files, "config_path", lambda _, name: folder / name)
    (tmp_path / "p.txt").write_text("It was\nThere is\n")
    urls = [server.url for server in (operation.servers["full"], candidates["int8"])]
    common = ["--prompts", str(tmp_path / "p.txt"), "--max-tokens", "2", "--quiet"]
    code = main(["compare", *urls, *common, "-o", str(tmp_path / "out"), "--probes", "all"])
    said = capsys.readouterr()
    assert code == 1, said.err
    check_every_kind(tmp_path / "out", said.out)


def test_a_variant_that_hangs_loses_its_name_or_dies_loses_nothing(
    operation: Operation, candidates: dict[str, Composed], tmp_path: Path
) -> None:
    int8 = candidates["int8"]
    with failing(tmp_path, operation.servers["full"], int8) as it, it.clients.keep_asking():
        it.answered("int4")
        it.hang()
        it.lose_name()
        it.kill()
    assert not it.clients.lost
