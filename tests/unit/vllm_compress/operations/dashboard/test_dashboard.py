"""The dashboard: one declaration, drawn twice; what Prometheus holds is what the page shows."""

from __future__ import annotations

import html
import itertools
import json
import math
import re
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.support.operations.browser import Drawn, page_after_scripts
from tests.e2e.support.operations.prometheus import Prometheus as Server
from tests.e2e.support.operations.prometheus import scrape_config, tool
from tests.e2e.support.server import free_port
from vllm_compress.cli import main
from vllm_compress.operations.dashboard.collect import collect, marks_of
from vllm_compress.operations.dashboard.declaration import Query
from vllm_compress.operations.dashboard.grafana import dashboard
from vllm_compress.operations.dashboard.operation import MARKS
from vllm_compress.operations.dashboard.page import render, serve
from vllm_compress.operations.dashboard.panels import FACTS, INFO, headlines, panels
from vllm_compress.operations.prometheus import Prometheus, PrometheusError

DEPLOY = Path(__file__).resolve().parents[5] / "deploy"
BEGIN, MINUTES, EVERY = 1_700_000_100, 40, 15
END = BEGIN + MINUTES * 60
GAP = range(BEGIN + 1200, BEGIN + 1500)
NAMES = {"chat-full": "full", "chat-int4": "int4"}


def queries() -> list[Query]:
    return [query for panel in panels() for query in panel.queries] + [q for q, _ in FACTS]


def value(index: int, at: int) -> float:
    """Of the query with this index, in every deployment."""
    return 100.0 * (index + 1) + (at - BEGIN) / 60


def history(folder: Path) -> Path:
    """Prometheus data of two deployments: full ends half way, int4 has a gap of 5 minutes."""
    lines = []
    for index, series in enumerate([INFO, *dict.fromkeys(q.series for q in queries())]):
        lines.append(f"# TYPE {series} unknown")
        for name, variant in NAMES.items():
            labels = f'deployment="{name}",service="chat",variant="{variant}"'
            if "finish_reason" in series:
                labels += ',finish_reason="stop"'
            for at in range(BEGIN, END + 1, EVERY):
                gone = at >= BEGIN + MINUTES * 30 if variant == "full" else at in GAP
                shown = "NaN" if gone else value(index, at)
                lines.append(f"{series}{{{labels}}} {shown} {at}")
    text = folder / "history.txt"
    text.write_text("\n".join([*lines, "# EOF\n"]))
    command = ["tsdb", "create-blocks-from", "openmetrics", str(text), str(folder / "data")]
    subprocess.run([tool("promtool"), *command], check=True, capture_output=True)
    return folder / "data"


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    data = history(tmp_path_factory.mktemp("prometheus"))
    forever = "--storage.tsdb.retention.time=100y"
    with Server(scrape_config({}), forever, data=data) as server:
        yield Prometheus(server.url)


@pytest.fixture(scope="module")
def drawn(prometheus: Prometheus) -> dict[str, Any]:
    return collect(prometheus, 1800, end=END)


# One declaration.


def test_committed_grafana_dashboard_is_the_generated_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run `vllm-compress dashboard --grafana -o deploy/grafana/vllm-compress.json` if not."""
    assert main(["dashboard", "--grafana"]) == 0
    assert (DEPLOY / "grafana" / "vllm-compress.json").read_text() == capsys.readouterr().out


def test_every_query_names_a_recorded_series() -> None:
    recorded = {
        rule["record"]
        for name in ("recording.yml", "operation.yml")
        for group in yaml.safe_load((DEPLOY / "prometheus" / "rules" / name).read_text())["groups"]
        for rule in group["rules"]
    }
    assert {query.series for query in queries()} | {INFO, *MARKS.values()} <= recorded


def test_grafana_has_every_panel_twice_with_unit_and_help() -> None:
    charts = [p for p in dashboard()["panels"] if p["type"] == "timeseries"]
    titles = [panel.title for panel in panels()]
    assert [chart["title"] for chart in charts] == [*titles, *titles]
    for chart in charts:
        assert chart["description"], chart["title"]
        assert chart["fieldConfig"]["defaults"]["unit"], chart["title"]
        assert all(target["legendFormat"] for target in chart["targets"]), chart["title"]
    stats = [p["title"] for p in dashboard()["panels"] if p["type"] == "stat"]
    assert stats == [q.headline for q, _ in FACTS] + [q.headline for q, _ in headlines()]


def test_grafana_panels_have_their_own_ids_and_places() -> None:
    placed = dashboard()["panels"]
    assert len({panel["id"] for panel in placed}) == len(placed)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in placed)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    for panel in placed:
        refs = [target["refId"] for target in panel.get("targets", [])]
        assert len(set(refs)) == len(refs)


def test_grafana_uses_only_variables_that_it_declares() -> None:
    made = dashboard()
    declared = {variable["name"] for variable in made["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z_]+)", json.dumps(made)))
    assert used - {"__range", "__interval", "__all"} == declared


def test_provisioning_loads_the_dashboard_and_a_datasource() -> None:
    folder = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["type"] == "prometheus"
    (provider,) = yaml.safe_load((folder / "dashboards" / "vllm-compress.yml").read_text())[
        "providers"
    ]
    assert provider["options"]["path"]


# What Prometheus holds.


def lines_of(data: dict[str, Any], series: str) -> dict[str, list[float | None]]:
    found = [q for s in data["sections"] for p in s["panels"] for q in p["queries"]]
    (query,) = [q for q in [*found, *data["facts"]] if q["series"] == series]
    return {line["labels"]["deployment"]: line["values"] for line in query["lines"]}


def test_page_gets_the_value_of_every_series_at_every_moment(drawn: dict[str, Any]) -> None:
    step = drawn["step"]
    assert drawn["end"] - drawn["start"] == 1800
    names = dict.fromkeys(query.series for query in queries())
    for index, series in enumerate(names, start=1):
        values = lines_of(drawn, series)["chat-int4"]
        for at, shown in zip(range(drawn["start"], END + 1, step), values, strict=True):
            written = at - (at - BEGIN) % EVERY  # Prometheus gives the latest sample
            want = None if written in GAP else float(f"{value(index, written):.6g}")
            assert shown == want, (series, at)


def test_deployments_that_went_away_are_listed_as_such(drawn: dict[str, Any]) -> None:
    assert [(d["name"], d["here"]) for d in drawn["deployments"]] == [
        ("chat-full", False),
        ("chat-int4", True),
    ]
    assert drawn["deployments"][1]["labels"]["service"] == "chat"
    assert drawn["problem"] == ""


def test_wide_steps_show_means_not_what_happened_to_be_sampled(prometheus: Prometheus) -> None:
    data = collect(prometheus, 7 * 86400, end=END)
    step, series = data["step"], panels()[0].queries[0].series
    assert step > MINUTES * 60
    values = lines_of(data, series)["chat-full"]
    (shown,) = [v for v in values if v is not None]
    written = [value(1, at) for at in range(BEGIN, BEGIN + MINUTES * 30, EVERY)]
    inside = [v for i, v in enumerate(written) if BEGIN + i * EVERY <= data["end"]]
    assert math.isclose(shown, sum(inside) / len(inside), rel_tol=1e-4)


def test_page_in_a_browser_draws_every_panel(drawn: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render(drawn))
    for view, lines in (("overview", 2), ("ab", 2)):
        seen = Drawn(page_after_scripts(f"{page.as_uri()}#view={view}"))
        assert list(seen.panels) == [panel.title for panel in panels()]
        for panel in panels():
            drawings = [d for d in seen.panels[panel.title] if d.count("L") > 20]
            assert len(drawings) == lines * len(panel.queries), (view, panel.title)
            # The gap of int4 is one in the line: it starts twice.
            assert {d.count("M") for d in drawings} == {1, 2}
        assert "gone" in seen.text or view == "ab"
        assert "B against A" in seen.text or view == "overview"


def test_marks_are_where_shares_change_and_servers_start() -> None:
    shares = {"labels": {"deployment": "a"}, "values": [None, 0.1, 0.1, 0.3, 0.0, None, 0.5]}
    assert marks_of("rollout", [shares]) == [
        {"deployment": "a", "kind": "rollout", "index": index} for index in (3, 4)
    ]
    starts = {"labels": {"deployment": "a"}, "values": [0, 2, 2, 0, None, 1]}
    assert marks_of("start", [starts]) == [{"deployment": "a", "kind": "start", "index": 1}]


def test_spikes_are_cut_off_wide_axes_are_logarithmic_and_marks_are_drawn(
    drawn: dict[str, Any], tmp_path: Path
) -> None:
    data = json.loads(json.dumps(drawn))
    data["marks"] = [{"deployment": "chat-int4", "kind": "rollout", "index": 9}]
    by_title = {panel["title"]: panel for s in data["sections"] for panel in s["panels"]}
    for title in ("Requests", "Request latency"):
        for query in by_title[title]["queries"]:
            for line in query["lines"]:
                line["values"] = [None if v is None else 2.0 for v in line["values"]]
            line["values"][9] = 3_000_000.0
    page = tmp_path / "page.html"
    page.write_text(render(data))
    after = page_after_scripts(page.as_uri())
    assert after.count("cut off, up to 3M") == 1
    assert after.count('class="mark rollout"') == len(panels())
    (latency,) = re.findall(r'<svg[^>]*aria-label="Request latency:.*?</svg>', after, re.DOTALL)
    heights = [float(y) for y in re.findall(r'gridline"[^>]* y1="([\d.]+)"', latency)]
    steps = [one - other for one, other in itertools.pairwise(heights)]
    assert len(steps) >= 5
    assert max(steps) - min(steps) < 0.01, "a decade is as high as any other"


def test_labels_are_text_wherever_they_come_from(drawn: dict[str, Any], tmp_path: Path) -> None:
    """A deployment's name can end neither the script that carries it nor an element."""
    evil = "</script><script>document.title='owned'</script><img src=x onerror=document.title=1>"
    text = json.dumps(drawn).replace('"chat-int4"', json.dumps(evil))
    page = tmp_path / "page.html"
    page.write_text(render(json.loads(text)))
    after = page_after_scripts(page.as_uri())
    assert "<title>vllm-compress</title>" in after
    assert after.count("<script") == (render().count("<script"))
    assert f"<b>{html.escape(evil, quote=False)}</b>" in after


def test_page_needs_nothing_from_elsewhere() -> None:
    page = render()
    # The one address is the name of SVG, which nobody fetches.
    assert set(re.findall(r"https?://[\w./]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(script|img|link)[^>]*(src|href)=\"(?!data:)", page)
    assert "default-src 'none'" in page


# The command.


def test_served_page_and_its_data(prometheus: Prometheus) -> None:
    with serve(prometheus, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"

        def get(path: str) -> str:
            return str(urllib.request.urlopen(url + path, timeout=30).read().decode())

        assert get("/") == render()
        data = json.loads(get("/data?seconds=3600"))
        assert data["deployments"] == []
        assert "no target of vllm-compress" in data["problem"]
        for wrong in ("", "?seconds=abc", "?seconds=-1", "?seconds=1e99", "?seconds=nan"):
            assert "seconds is not a number" in json.loads(get(f"/data{wrong}"))["error"]
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get("/../etc/passwd")
        server.shutdown()


def test_page_says_that_prometheus_went_away() -> None:
    gone = Prometheus(f"http://127.0.0.1:{free_port()}")
    with serve(gone, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        seen = Drawn(page_after_scripts(url))
        server.shutdown()
    assert f"cannot reach Prometheus at {gone.url}" in seen.text
    assert seen.panels == {}


def test_file_has_what_the_page_would_show(prometheus: Prometheus, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    arguments = ["dashboard", "--prometheus", prometheus.url, "-o", str(out)]
    assert main([*arguments, "--range", "36500d"]) == 0
    (text,) = re.findall(r'id="data">(.*?)</script>', out.read_text())
    assert [d["name"] for d in json.loads(text)["deployments"]] == list(NAMES)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prometheus", "http://127.0.0.1:1"], "cannot reach Prometheus at http://127.0.0.1:1"),
        (["--prometheus", "localhost:9090"], "expected something like http://localhost:9090"),
        (["--prometheus", "{url}", "--range", "5x"], "--range is '5x', expected a time such as"),
        (["--prometheus", "{url}", "-o", "{tmp}/no/a.html", "--range", "36500d"], "No such file"),
        (["--prometheus", "{url}", "-o", "{tmp}/a.html"], "nothing to draw"),
        (["--prometheus", "{url}", "--port", "{port}"], "cannot listen on 127.0.0.1:"),
        (["--prometheus", "{url}", "--port", "70000"], "cannot listen on 127.0.0.1:70000"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    arguments: list[str],
    said: str,
    prometheus: Prometheus,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"url": prometheus.url, "tmp": tmp_path, "port": prometheus.url.rpartition(":")[2]}
    assert main(["dashboard", *(argument.format(**names) for argument in arguments)]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# The client of Prometheus.


def test_prometheus_own_words_reach_the_user(prometheus: Prometheus) -> None:
    with pytest.raises(PrometheusError, match=r"parse error|unclosed"):
        prometheus.query("sum(")
    assert prometheus.query("1 + 1")[0].value == 2
    assert prometheus.query("vector(3)")[0].labels == {}


def test_servers_that_are_not_prometheus_are_named() -> None:
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(PrometheusError, match="HTTP 404"):
            Prometheus(f"http://127.0.0.1:{other.server_address[1]}").query("up")
        other.shutdown()
