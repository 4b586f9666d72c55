"""`vllm-compress plan` as a user types it."""

from __future__ import annotations

import json
import random
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


def test_a_draft_is_a_scheme_beside_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["llama-3.1-8b", "--recipe", "int8", "--hardware", "h100-80gb", "--rate", "12/min"]
    measured = tmp_path / "eval.json"
    measured.write_text(json.dumps({"acceptance": 0.85}))
    options = {}
    for share in ("30%", "85%", str(measured)):
        found = plan(capsys, *common, "--draft", f"int4-gptq={share}")
        options[share] = {o["scheme"]: o for o in found["options"]}
    good, bad = options["85%"], options["30%"]
    assert set(good) == {"original", "int8", "original + int4-gptq", "int8 + int4-gptq"}
    assert options[str(measured)] == good
    drafted, alone = good["original + int4-gptq"], good["original"]
    assert alone["draft"] is None
    assert drafted["weight_bytes"] > alone["weight_bytes"]
    assert drafted["memory"]["requests"] < 0.6 * alone["memory"]["requests"]
    assert drafted["latency"]["tpot"]["p50"] < alone["latency"]["tpot"]["p50"]
    assert bad["original + int4-gptq"]["latency"]["tpot"]["p50"] > drafted["latency"]["tpot"]["p50"]
    ahead = drafted["draft"]["draft_tokens"]
    assert drafted["draft"]["tokens_per_step"] > 2
    assert main(["plan", *common, "--draft", "int4-gptq=85%"]) == 0
    assert f"serve --draft-tokens {ahead}" in capsys.readouterr().out
    assert main(["plan", *common, "--draft", "int4-gptq"]) == 2
    assert "--draft int4-gptq without =ACCEPTANCE: no acceptance" in capsys.readouterr().err
    assert main(["plan", *common, "--draft", "fp32=9"]) == 2
    for wrong in ("int4-gptq=120%", "int4-gptq=nowhere.json"):
        assert main(["plan", *common, "--draft", wrong]) == 2
        assert f"--draft {wrong.partition('=')[2]}: no acceptance" in capsys.readouterr().err


def trace(path: Path, rate: float = 2.0, count: int = 600) -> Path:
    """Poisson arrivals, one prompt in ten long."""
    draw, now, rows = random.Random(0), 0.0, []
    for i in range(count):
        now += draw.expovariate(rate)
        length = 6000 if i % 10 == 0 else 500
        row = {"timestamp": 1e3 * now, "input_length": length, "output_length": 100 + i % 50}
        rows.append(json.dumps({**row, "hash_ids": [0, i + 1]}))
    path.write_text("\n".join(rows))
    return path


def test_a_trace_has_its_own_rate_and_lengths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trace(tmp_path / "t.jsonl")
    common = ["llama-3.1-8b", "--recipe", "int4-gptq", "--hardware", "l4"]
    found = plan(capsys, *common, "--trace", str(path))
    demand = found["demand"]
    assert demand["rate"] == pytest.approx(2.0, rel=0.1)
    assert (demand["prompt"], demand["context"]) == (1050, 8192)
    assert demand["trace"]["requests"] == 600
    assert any("at most 50% of prompts could be cached" in note for note in found["notes"])
    # Lengths that vary are slower at the 95th percentile than requests all of the mean.
    alike = plan(capsys, *common, "--input", "1050", "--output", "124", "--rate", "2/s")
    long = next(o for o in found["options"] if o["scheme"] == "int4-gptq")
    mean = next(o for o in alike["options"] if o["scheme"] == "int4-gptq")
    assert long["devices"] >= mean["devices"]
    assert long["latency"]["ttft"]["p95"] > 1.5 * mean["latency"]["ttft"]["p95"]
    faster = plan(capsys, *common, "--trace", str(path), "--rate", "20/s")
    assert faster["demand"]["rate"] == pytest.approx(20)
    assert faster["options"][0]["devices"] > found["options"][0]["devices"]


def test_a_prefix_cache_takes_no_more_devices_and_answers_sooner(
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ["llama-3.1-8b", "--recipe", "int4-gptq", "--hardware", "l4", "--rate", "9/s"]
    common += ["--input", "3000"]
    none, most = (plan(capsys, *common, *more) for more in ([], ["--prefix-cached", "80%"]))
    assert most["demand"]["cached"] == 0.8
    assert most["options"][0]["devices"] < none["options"][0]["devices"]


def test_a_day_costs_what_its_hours_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "day.yaml"
    path.write_text(json.dumps([1] * 12 + [8] * 12))
    common = ["llama-3.1-8b", "--hardware", "l4", "--profile", str(path), "--price", "l4=0.5"]
    found = plan(capsys, *common)
    day, best = found["schedule"], found["options"][0]
    assert (day["scheme"], day["hardware"]) == (best["scheme"], best["hardware"])
    assert found["demand"]["rate"] == 8
    assert day["device_hours_at_peak"] == 24 * best["devices"]
    assert day["device_hours"] == sum(hour["devices"] for hour in day["hours"])
    assert day["price_per_day"] == 0.5 * day["device_hours"] < day["price_per_day_at_peak"]
    assert main(["plan", *common, "--rate", "16/s"]) == 0
    printed = capsys.readouterr().out
    assert "16/s" in printed
    assert "12-24" in printed


def test_energy_and_co2_follow_from_what_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["llama-3.1-8b", "--hardware", "l4", "--rate", "3/s"]
    plain = plan(capsys, *common)
    for option in plain["options"]:
        assert 0.12 * 72 <= option["watts"] / option["devices"] <= 0.75 * 72
        joules = option["watts"] / option["tokens_per_second"]
        assert option["kwh_per_million"] == pytest.approx(joules / 3.6)
        assert option["co2_kg_per_million"] is None
    grid = tmp_path / "grid.yaml"
    grid.write_text("overhead: 2.0\ngrams_per_kwh: 500\n")
    found = plan(capsys, *common, "--grid", str(grid))
    assert any("x 2 for the host and cooling; CO2: 500 g" in note for note in found["notes"])
    for before, option in zip(plain["options"], found["options"], strict=True):
        assert option["watts"] == pytest.approx(2 * before["watts"])
        assert option["co2_kg_per_million"] == pytest.approx(0.5 * option["kwh_per_million"])


def test_tables_keep_to_a_hundred_columns_and_a_picture_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = tmp_path / "cost.png"
    arguments = ["llama-3.1-8b", "--hardware", "h100,l4", "--rate", "5/s", "--grid", "56"]
    arguments += ["--price", "h100=2.5", "--price", "l4=0.7", "--plot", str(drawn)]
    assert main(["plan", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if str(drawn) not in line) <= 100
    assert drawn.read_bytes()[:4] == b"\x89PNG"
    found = plan(capsys, *arguments)
    assert {p["hardware"] for p in found["points"]} == {"h100-sxm", "l4"}


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
        (["llama-3.1-8b", "--rate", ""], ["--rate is missing", "--trace or --profile"]),
        (["llama-3.1-8b", "--trace", "none.csv"], ["none.csv", "no such file"]),
        (["llama-3.1-8b", "--profile", "none.csv"], ["none.csv", "no such file"]),
        (["llama-3.1-8b", "--prices", "none.yaml"], ["none.yaml", "no such file"]),
        (["llama-3.1-8b", "--grid", "none.yaml"], ["none.yaml", "no such file"]),
        (["llama-3.1-8b", "--grid", "-5"], ["--grid", "'-5'"]),
        (["llama-3.1-8b", "--prefix-cached", "100%"], ["--prefix-cached", "40% or 0.4"]),
        (["llama-3.1-8b", "--plot", "cost.svg"], ["--plot", "cost.svg", ".png"]),
        (["llama-3.1-8b", "--plot", "none/cost.png"], ["none/cost.png"]),
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


def test_a_trace_does_not_go_with_lengths_or_a_shorter_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["llama-3.1-8b", "--hardware", "l4", "--trace", str(trace(tmp_path / "t.jsonl"))]
    for more, words in (
        (["--input", "5"], "do not go with --trace"),
        (["--context", "4096"], "t.jsonl is 6,140 tokens together, more than the context of 4,096"),
    ):
        assert main(["plan", *arguments, *more]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words in error
