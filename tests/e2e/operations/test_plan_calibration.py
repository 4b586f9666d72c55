"""The planner against a real Prometheus with a history; test_operate.py has that against vLLM."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.support.operations.prometheus import tool
from tests.e2e.support.server import free_port
from vllm_compress.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


def law(tokens: float) -> float:
    """The time of a step in the history below."""
    return 0.02 + 0.001 * tokens


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Prometheus over three hours of made-up service, loaded by promtool."""
    folder = tmp_path_factory.mktemp("history")
    (folder / "series").write_text(_open_metrics(time.time()))
    blocks = ["tsdb", "create-blocks-from", "openmetrics", "series", "data"]
    subprocess.run([tool("promtool"), *blocks], cwd=folder, check=True, capture_output=True)
    (folder / "prometheus.yml").write_text("global: {scrape_interval: 1m}\n")
    port = free_port()
    process = subprocess.Popen(
        [
            tool("prometheus"),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def _open_metrics(now: float) -> str:
    """An hour each of single requests, of 8 and of 24 at once, all by the law."""
    columns: dict[str, list[tuple[float, float]]] = {}
    totals: dict[str, float] = {}
    for minute in range(180):
        at = now - 60 * (185 - minute)
        running = (0.2, 8.0, 24.0)[minute // 60]
        requests = (0.1, 0.4, 1.0)[minute // 60]
        prompts = 100 * requests
        tpot = law(1) if running < 1 else (0.02 + 0.001 * running) / (1 - 0.001 * prompts)
        ttft = law(100) if running < 1 else 5.0
        added = {
            "requests_total": 60 * requests,
            "prompt_tokens_total": 60 * prompts,
            "time_per_output_token_seconds_sum": 60 * requests * tpot,
            "time_per_output_token_seconds_count": 60 * requests,
            "time_to_first_token_seconds_sum": 60 * requests * ttft,
            "time_to_first_token_seconds_count": 60 * requests,
        }
        for name, value in added.items():
            totals[name] = totals.get(name, 0.0) + value
            columns.setdefault(name, []).append((at, totals[name]))
        columns.setdefault("requests_running", []).append((at, running))
    # Gauges last to now, so that they have a present value.
    for name, value in (("weight_bytes", 16785920), ("devices", 1), ("deployment_info", 1)):
        columns[name] = [(now - 60 * i, value) for i in range(185, -1, -1)]
    lines = []
    for name, points in sorted(columns.items()):
        labels = 'deployment="chat",model_name="novels"'
        lines += [f"vllm_compress_{name}{{{labels}}} {v} {at:.3f}" for at, v in points]
    return "\n".join([*lines, "# EOF\n"])


def test_history_in_prometheus_tells_the_time_of_a_step(
    history: str, novels_8m: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vllm_compress.operations.capacity.calibration.history import is_prometheus

    until = time.monotonic() + 30
    while not is_prometheus(history) and time.monotonic() < until:
        time.sleep(0.2)
    saved = tmp_path / "history.json"
    arguments = ["plan", str(novels_8m), "--hardware", "l4", "--rate", "1/s", "--context", "512"]
    arguments += ["--input", "50", "--output", "20", "--calibrate", history]
    assert main([*arguments, "--save-calibration", str(saved), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "measured" in {o["basis"] for o in found["options"]}
    points = json.loads(saved.read_text())["tokens"]
    assert {round(tokens) for tokens, _ in points} >= {1, 9, 29, 100}
    for tokens, seconds in points:
        assert seconds == pytest.approx(law(tokens), rel=0.05)
    assert main([*arguments, "--deployment", "chad"]) == 2
    assert "did you mean 'chat'" in capsys.readouterr().err
