"""Traces in three published forms, and what of them an engine gets."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from compress_methods.errors import CompressError
from vllm_compress.operations.capacity.throughput.load import Arrival
from vllm_compress.operations.capacity.throughput.trace import Trace, read_trace

COUNT = 24


def mooncake(path: Path, **first: Any) -> Path:
    rows = [
        {"timestamp": 500 * i, "input_length": 1000 + i, "output_length": i, "hash_ids": [0, i + 1]}
        for i in range(COUNT)
    ]
    rows[0] |= first
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def azure(path: Path, *rows: str) -> Path:
    lines = [f"2023-11-16 18:17:{i:02d}.9799600,{100 + i},{i + 1}" for i in range(COUNT)]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join([*lines, *rows]))
    return path


def guidellm(path: Path, *more: dict[str, Any], benchmarks: int = 1) -> Path:
    rows: list[dict[str, Any]] = [
        {
            "request_start_time": 1.7e9 + 2 * i,
            "prompt_tokens": 50,
            "output_tokens": 9,
            "output": "x",
        }
        for i in range(COUNT)
    ]
    requests = {"successful": [*reversed(rows), *more], "errored": [], "incomplete": []}
    path.write_text(json.dumps({"benchmarks": benchmarks * [{"requests": requests}]}))
    return path


def test_mooncake_has_milliseconds_and_blocks_that_prompts_share(tmp_path: Path) -> None:
    trace = read_trace(mooncake(tmp_path / "t.jsonl"))
    assert trace.arrivals[0] == Arrival(0.0, 1000, 1)  # an answer has a token at least
    assert trace.arrivals[2] == Arrival(1.0, 1002, 2)
    assert trace.rate == pytest.approx(2.0)
    assert trace.means == (1012, 12)
    assert trace.longest == 1023 + 23
    # All but the first begin with a block that was there.
    expected = sum(0.5 * (1000 + i) for i in range(1, COUNT)) / sum(1000 + i for i in range(COUNT))
    assert trace.shared == pytest.approx(expected)


def test_a_clock_that_ticks_slowly_makes_no_bursts(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    row = '{{"timestamp": {}, "input_length": 5, "output_length": 5}}\n'
    path.write_text("".join(row.format(3000 * (i // 6)) for i in range(COUNT)))
    sent = [a.sent for a in read_trace(path).arrivals]
    assert sent == pytest.approx([i / 2 for i in range(COUNT)])


def test_azure_has_moments_of_seven_digits(tmp_path: Path) -> None:
    trace = read_trace(azure(tmp_path / "t.csv", "2023-11-16 18:17:59.97996+00:00,7,7"))
    assert trace.arrivals[1] == Arrival(1.0, 101, 2)
    assert trace.arrivals[-1] == Arrival(59.0, 7, 7)
    assert trace.shared is None


def test_guidellm_has_requests_in_any_order(tmp_path: Path) -> None:
    trace = read_trace(guidellm(tmp_path / "t.json"))
    assert trace.rate == pytest.approx(0.5)
    assert trace.arrivals[1] == Arrival(2.0, 50, 9)


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("t.txt", "", "ends in '.txt', expected .jsonl, .csv, .json"),
        ("none.csv", None, "no such file"),
        ("t.csv", "TIMESTAMP,ContextTokens\n", "0 requests, expected 20"),
        (
            "t.csv",
            "TIMESTAMP,ContextTokens\n2023-11-16 18:17:03,5\n",
            ":2: GeneratedTokens is None",
        ),
        ("t.csv", "a,b\n1,2\n", ":2: TIMESTAMP is None, expected a date and time"),
        ("t.csv", b"\xff\xfe", "not readable as CSV"),
        ("t.jsonl", "[]\n", ":1: expected an object, found list"),
        ("t.jsonl", "{\n", ":1: not JSON"),
        ("t.jsonl", '{"timestamp": "x"}\n', ":1: timestamp is 'x', expected a time"),
        ("t.jsonl", '{"timestamp": NaN}\n', ":1: timestamp is nan, expected a time"),
        ("t.jsonl", '{"timestamp": 1, "input_length": 0}\n', "input_length is 0, expected tokens"),
        ("t.json", "[]", "no `benchmarks`, expected a guidellm report"),
        ("t.json", "{", "not readable as JSON"),
        ("t.json", '{"benchmarks": [{"requests": null}]}', "successful is not a list"),
    ],
)
def test_what_is_no_trace_is_named(
    tmp_path: Path, name: str, rows: str | bytes | None, words: str
) -> None:
    path = tmp_path / name
    if rows is not None:
        path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    with pytest.raises(CompressError) as found:
        read_trace(path)
    assert words in str(found.value)
    assert str(path) in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda p: mooncake(p / "t.jsonl", hash_ids=3), "hash_ids is 3, expected a list"),
        (lambda p: mooncake(p / "t.jsonl", hash_ids=[{}]), "hash_ids is not a list of numbers"),
        (lambda p: mooncake(p / "t.jsonl", output_length=1e3), "output_length is 1000.0"),
        (lambda p: azure(p / "t.csv", "2023-13-16 18:17:03,5,5"), ":26: TIMESTAMP is '2023-13-16"),
        (lambda p: azure(p / "t.csv", "2023-11-16 18:17:03,5,five"), "GeneratedTokens is 'five'"),
        (lambda p: guidellm(p / "t.json", {"prompt_tokens": 3}), "request_start_time is None"),
        (lambda p: guidellm(p / "t.json", benchmarks=3), "3 benchmarks, expected"),
    ],
)
def test_one_bad_row_is_named(tmp_path: Path, write: Any, words: str) -> None:
    path = write(tmp_path)
    with pytest.raises(CompressError) as found:
        read_trace(path)
    assert words in str(found.value)


@pytest.mark.parametrize("write", [mooncake, azure])
def test_a_mutated_trace_is_a_value_or_one_line(tmp_path: Path, write: Any) -> None:
    """JSON as a whole is mutated with the other files that users write."""
    path = write(tmp_path / {mooncake: "t.jsonl", azure: "t.csv"}[write])
    original, draw, said = path.read_bytes(), random.Random(0), []
    for _ in range(400):
        at = draw.randrange(len(original))
        change = draw.choice([b"", b"-", b"9" * 30, b"\xff", b"\0", b'"', b"\n", b",", b"1e400"])
        path.write_bytes(original[:at] + change + original[at + draw.randrange(3) :])
        try:
            read_trace(path)
        except CompressError as problem:
            said.append(str(problem))
    assert len(said) > 100
    for line in said:
        assert str(path) in line
        assert "\n" not in line
        assert len(line) < 400


def test_requests_of_one_moment_have_no_rate(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"timestamp": 7, "input_length": 5, "output_length": 5}\n' * COUNT)
    with pytest.raises(CompressError, match="all requests are of one moment"):
        read_trace(path)


def test_a_rate_stretches_time_and_nothing_else() -> None:
    trace = Trace("t", tuple(Arrival(2.0 * i, 10 + i, 3) for i in range(11)))
    faster = trace.at_rate(5.0)
    assert faster.rate == pytest.approx(5.0)
    assert [a[1:] for a in faster.arrivals] == [a[1:] for a in trace.arrivals]


def test_engines_take_turns_and_a_long_trace_is_its_busiest_stretch() -> None:
    times = [0, 10, 20, 30, 31, 32, 33, 50, 60]
    trace = Trace("t", tuple(Arrival(float(t), t + 1, 1) for t in times))
    halves = [trace.turns(2, first, 100) for first in (0, 1)]
    assert sorted(a.prompt for half in halves for a in half) == [t + 1 for t in times]
    assert [a.prompt for a in halves[0]] == [1, 21, 32, 34, 61]
    assert trace.turns(1, 0, 4) == tuple(Arrival(t - 30.0, t + 1, 1) for t in (30, 31, 32, 33))
    assert trace.prompt_at(0.5) == 32
    assert trace.prompt_at(0.99) == 61
