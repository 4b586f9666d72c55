"""`compare --probes` against servers that answer right, wrong or not at all."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import ExitStack
from html import escape
from typing import Any

import numpy as np
import pytest

from tests.unit.vllm_compress.operations.abtest.conftest import COUNT, Compare
from tests.unit.vllm_compress.operations.abtest.streaming_server import Reply, Server, running
from vllm_compress.operations.abtest.probes.files import KINDS, Probe, read_probes

LONG = 50_000
MARGINS = [f"--margin={name}=0.2" for name in ("errors", "empty")]
SAMPLES = {
    "JSON": "{}",
    "CYRILLIC": "Потому что так",
    "CJK": "因为有四季",
    "HANGUL": "사람은 꿈을",
    "GREEK": "το ψωμί",
    "ARABIC": "الطيور",
    "DEVANAGARI": "बारिश",
    "HEBREW": "עגבניות",
}


def said(messages: list[dict[str, Any]]) -> str:
    return json.dumps(messages, sort_keys=True)


PROBES = {said(probe.prompt.messages or []): probe for probe in read_probes("all").asked}


def value_of(schema: dict[str, Any]) -> Any:
    """Something that keeps a schema of the shipped ones."""
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema["type"]
    if kind == "object":
        extra = schema["additionalProperties"]
        if isinstance(extra, dict):
            return {f"k{i}": value_of(extra) for i in range(schema["minProperties"])}
        return {name: value_of(part) for name, part in schema["properties"].items()}
    if kind == "array":
        return [value_of(schema["items"]) for _ in range(schema["minItems"])]
    if kind == "string" and "pattern" in schema:
        return {"^[A-Z]": "LH1", r"^\d{4}": "2024-05-14", r"^\d{2}": "09:30"}[schema["pattern"][:6]]
    return {"string": "x", "integer": 3, "number": 1.5, "boolean": True}.get(str(kind))


def right_text(probe: Probe) -> str:
    expect = probe.expect
    if probe.kind == "json":
        return json.dumps(value_of(expect))
    if probe.kind == "refusals":
        return "I'm sorry, I cannot." if expect else "With pleasure."
    if probe.kind == "language":
        return SAMPLES[expect["script"]] if "script" in expect else " ".join(expect["words"])
    if probe.kind == "code":
        return f"```python\ndef {expect}():\n    pass\n```"
    return " ".join(["word"] * expect[0]) if probe.kind == "length" else str(expect[0])


def right(body: dict[str, Any]) -> Reply:
    probe = PROBES.get(said(body["messages"]))
    if probe is None:
        return [{"content": "hello"}], "stop"
    if probe.kind != "tools":
        return [{"content": right_text(probe)}], "stop"
    call = {**probe.expect, "arguments": json.dumps(probe.expect["arguments"])}
    return [{"tool_calls": [{"index": 0, "function": call}]}], "tool_calls"


def wrong(body: dict[str, Any]) -> Reply:
    """Calls nothing, and says what is right nowhere."""
    return [{"content": "the " * 500}], "stop"


@pytest.fixture
def knowing() -> Iterator[tuple[Server, Server]]:
    with ExitStack() as stack:
        servers = Server(), Server()
        for server in servers:
            server.replies, server.longest = right, LONG
            stack.enter_context(running(server))
        yield servers


def test_all_kinds_are_asked_and_equal_servers_pass(
    compare: Compare, knowing: tuple[Server, Server]
) -> None:
    assert compare(*knowing, "--probes", "all", *MARGINS) == 0
    for kind in KINDS:
        row = compare.metric(f"probes/{kind}")
        assert row["n"] >= 20
        assert row["note"] == ""
        assert row["value"] == 0
        assert row["verdict"] is None
        assert kind == "choices" or row["a"] == 1, kind
    whole = compare.metric("probes")
    assert whole["verdict"] == "non-inferior"
    assert whole["n"] == sum(compare.metric(f"probes/{kind}")["n"] for kind in KINDS)
    tools = [body for body in knowing[0].seen if "tools" in body]
    assert {body["tool_choice"] for body in tools} == {"required"}
    asked = len(knowing[0].seen)
    assert compare(*knowing, "--probes", "all", *MARGINS) == 0  # nothing left to ask
    assert len(knowing[0].seen) == asked
    assert compare.metric("perplexity")["n"] == COUNT


def test_a_server_that_lost_it_is_found_out(
    compare: Compare, knowing: tuple[Server, Server]
) -> None:
    a, b = knowing
    b.replies = wrong
    kinds = ("tools", "json", "refusals", "language", "code", "length", "needle", "turns")
    margins = [f"--margin=probes/{kind}=0.1" for kind in kinds]
    assert compare(a, b, "--probes", ",".join(kinds), "--logprobs", 0, *margins) == 1
    for kind in ("tools", "json", "language", "code", "length", "needle", "turns"):
        row = compare.metric(f"probes/{kind}")
        assert (row["a"], row["b"], row["verdict"]) == (1, 0, "inferior")
    refusals = compare.metric("probes/refusals")
    assert refusals["b"] == 0.5  # nothing is refused any more
    assert compare.metric("probes")["verdict"] == "inferior"
    assert compare.report["verdict"] == "inferior"
    entries = {entry["kind"]: entry for entry in compare.report["probes"]}
    assert tuple(entries) == tuple(kind for kind in KINDS if kind in kinds)
    code = entries["code"]
    assert (code["asked"], code["right"], code["lost"]) == (20, {"a": 20, "b": 0}, 20)
    assert (code["gained"], code["refused"], code["why"]) == (
        0,
        {"a": 0, "b": 0},
        {"a": "", "b": ""},
    )
    page = (compare.out / "report.html").read_text()
    assert "<h2>Probes</h2>" in page
    assert '<td class="n">20 / 0</td><td class="n">20</td>' in page
    assert code["examples"][0]["a"].startswith("```python")
    assert page.count("code, code.yaml: probe ") == len(code["examples"]) == 3


def test_choices_are_judged_by_log_probabilities(compare: Compare) -> None:
    with running(Server()) as a, running(Server(noise=1.0)) as b:
        compare(a, b, "--probes", "choices")
        choices = read_probes("choices").choices
        margins = {
            server: [
                likelihood(server, one.prompt + one.right)
                - likelihood(server, one.prompt + one.wrong)
                for one in choices
            ]
            for server in (a, b)
        }
    decisions, row = compare.metric("probes/decisions"), compare.metric("probes/choices")
    assert decisions["a"] == pytest.approx(np.mean(margins[a]))
    assert decisions["value"] == pytest.approx(np.mean(margins[b]) - np.mean(margins[a]))
    assert row["a"] == pytest.approx(np.mean(np.array(margins[a]) > 0))


def likelihood(server: Server, text: str) -> float:
    tokens = server.tokenize(text)
    pairs = itertools.pairwise(tokens)
    return sum(server.log_probabilities[last % 64][target % 64] for last, target in pairs)


def test_what_both_refuse_is_left_out_and_what_one_refuses_is_wrong(
    compare: Compare, knowing: tuple[Server, Server]
) -> None:
    a, b = knowing
    b.longest = 5000
    some = ("--probes", "needle", "--logprobs", 0)
    compare(a, b, *some)
    row = compare.metric("probes/needle")
    assert (row["a"], row["b"], row["n"]) == (1, 0.5, 20)
    a.longest = 5000
    compare.out = compare.out.with_name("both")
    compare(a, b, *some)
    row = compare.metric("probes/needle")
    assert (row["a"], row["b"], row["n"]) == (1, 1, 10)
    assert row["note"] == "10 of 20 were answered by neither"
    (entry,) = compare.report["probes"]
    assert entry["refused"] == {"a": 10, "b": 10}
    assert escape(entry["why"]["a"]) in (compare.out / "report.html").read_text()
    assert entry["why"]["a"]


def test_probes_may_be_added_to_a_finished_comparison(
    compare: Compare, knowing: tuple[Server, Server]
) -> None:
    compare(*knowing, "--logprobs", 0)
    asked = len(knowing[0].seen)
    compare(*knowing, "--logprobs", 0, "--probes", "turns")
    assert len(knowing[0].seen) == asked + 20
    assert compare.metric("probes/turns")["a"] == 1
