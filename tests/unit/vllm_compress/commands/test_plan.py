"""`vllm-compress plan` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vllm_compress.cli import main

ISSUE = ["--rate", "20/s", "--input", "1000", "--output", "200"]
ISSUE += ["--ttft", "p95<500ms", "--tpot", "p95<50ms", "--hardware", "h100-80gb"]


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_scout_has_its_answer_in_two_seconds_without_torch() -> None:
    """Processor time, so that other work on the machine does not count."""
    code = (
        "import sys, time; from vllm_compress.cli import main; code = main(sys.argv[1:]); "
        "print(time.process_time(), 'torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "llama-4-scout", *ISSUE],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, torch = done.stderr.split()
    assert float(seconds) < 2
    assert torch == "False"
    assert time.monotonic() - began < 30
    rows = [line.split() for line in done.stdout.splitlines() if "h100-sxm  " in line]
    assert {row[0] for row in rows} == {"original", "int8", "int4-gptq"}
    assert "40 attention heads are not divisible by 3" in done.stdout


def test_every_option_of_the_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "llama-4-scout", *ISSUE, "--price", "h100-80gb=2")
    options = found["options"]
    by_weights = {o["scheme"]: o["devices_for_weights"] for o in options}
    assert by_weights == {"original": 3, "int8": 2, "int4-gptq": 1}
    assert {o["scheme"]: o["smallest"] for o in options} == {
        "original": 4,
        "int8": 2,
        "int4-gptq": 1,
    }
    assert [o["price_per_hour"] for o in options] == sorted(o["price_per_hour"] for o in options)
    for option in options:
        assert option["meets"]
        assert option["devices"] == option["replicas"] * option["devices_per_replica"]
        assert option["price_per_hour"] == 2 * option["devices"]
        tokens = option["tokens_per_second"] * 3600
        assert option["price_per_million"] == pytest.approx(2e6 * option["devices"] / tokens)
        assert option["capacity"] >= option["tokens_per_second"] == 20 * 200
        memory = option["memory"]
        assert memory["weights"] + memory["overhead"] + memory["kv_cache"] <= memory["usable"]
        assert option["latency"]["ttft"]["p95"] < 0.5
        assert option["latency"]["tpot"]["p95"] < 0.05


def test_a_higher_rate_takes_no_fewer_devices(capsys: pytest.CaptureFixture[str]) -> None:
    devices = []
    for rate in ("1/s", "10/s", "60/s"):
        found = plan(capsys, "llama-3.1-8b", "--hardware", "l4", "--rate", rate)
        devices.append(next(o["devices"] for o in found["options"] if o["scheme"] == "int4-gptq"))
    assert devices == sorted(devices)
    assert devices[0] < devices[-1]


def test_an_fp8_cache_is_half_as_large(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["llama-3.1-8b", "--hardware", "l4", "--rate", "1/s"]
    auto, fp8 = (plan(capsys, *common, "--kv-cache", kind) for kind in ("auto", "fp8"))
    assert auto["kv_bytes_per_token"] == 2 * fp8["kv_bytes_per_token"] == 131072


@pytest.mark.parametrize(
    ("use", "recipes"),
    [("chat", {"int4-gptq", "int8"}), ("batch", {"int8-dynamic", "int8"})],
)
def test_advice_names_schemes_and_says_why(
    use: str, recipes: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan(capsys, "llama-3.1-8b", "--hardware", "h100", "--rate", "1/s", "--use", use)
    assert {o["scheme"] for o in found["options"]} == {"original", *recipes}
    for recipe in recipes:
        assert any(note.startswith(f"advice for {use}: {recipe}:") for note in found["notes"])


def test_a_directory_is_planned_from_its_headers(
    novels_8m: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan(capsys, str(novels_8m), "--hardware", "t4", "--rate", "1/s")
    assert found["options"][0]["meets"]
    weights = {o["scheme"]: o["weight_bytes"] for o in found["options"]}
    header = int.from_bytes((novels_8m / "model.safetensors").read_bytes()[:8], "little")
    size = (novels_8m / "model.safetensors").stat().st_size - header - 8
    assert weights["original"] == size
    assert weights["int4-gptq"] < 0.5 * size


def test_what_nothing_meets_is_one_line_with_the_closest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["llama-3.1-8b", "--hardware", "l4", "--rate", "1/s", "--tpot", "p99<1ms"]
    assert main(["plan", *arguments]) == 2
    out, error = capsys.readouterr()
    assert "none" in out
    assert error.count("\n") == 1
    assert "no option meets" in error
    assert "tpot p99 < 1 ms" in error
    assert "the closest is int4-gptq on l4" in error
    assert main(["plan", *arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["options"][0]["meets"] is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lama-3.1-8b"], ["did you mean 'llama-3.1-8b'"]),
        (["llama-3.1-8b", "--hardware", "h100-90gb"], ["unknown 'h100-90gb'", "h100-80gb"]),
        (["llama-3.1-8b", "--rate", "fast"], ["--rate", "20/s"]),
        (["llama-3.1-8b", "--rate", "0/s"], ["--rate"]),
        (["llama-3.1-8b", "--ttft", "500ms"], ["--ttft", "p95<500ms"]),
        (["llama-3.1-8b", "--tpot", "p101<1s"], ["--tpot"]),
        (["llama-3.1-8b", "--input", "many"], ["--input", "'many'"]),
        (["llama-3.1-8b", "--context", "1000"], ["1,200 tokens together", "1,000"]),
        (["llama-3.1-8b", "--context", "999999"], ["131,072"]),
        (["llama-3.1-8b", "--recipe", "int4-gtpq"], ["did you mean 'int4-gptq'"]),
        (["llama-3.1-8b", "--price", "h100"], ["NAME=PRICE"]),
        (["llama-3.1-8b", "--calibrate", "none.json"], ["none.json", "no such file"]),
        (
            ["llama-3.1-8b", "--calibrate", "http://127.0.0.1:9"],
            ["http://127.0.0.1:9", "no answer"],
        ),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    usual = {"--hardware": "h100", "--rate": "1/s"}
    for flag, value in usual.items():
        arguments = arguments if flag in arguments else [*arguments, flag, value]
    try:
        code = main(["plan", *arguments])
    except SystemExit as left:
        code = int(left.code or 0)
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
