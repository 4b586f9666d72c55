"""What counts as an answer: words and tool calls, not the reasoning before them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.vllm_compress.operations.abtest.conftest import Compare
from tests.unit.vllm_compress.operations.abtest.streaming_server import Reply, Server

COUNT = 30
NO_LOGPROBS = ("--logprobs", 0)


@pytest.fixture
def quiz(prompts: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"question {i}"}], "answer": "yes"}
        for i in range(COUNT)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prompts


def thinking(_: dict[str, Any]) -> Reply:
    return [{"reasoning": "let me"}, {"reasoning_content": " think"}], "length"


def answering(_: dict[str, Any]) -> Reply:
    return [{"reasoning": "sure"}, {"content": "ye"}, {"content": "s"}], "stop"


def calling(_: dict[str, Any]) -> Reply:
    parts = [{"name": "find", "arguments": ""}, {"arguments": '{"q": '}, {"arguments": "1}"}]
    return [{"tool_calls": [{"index": 0, "function": part}]} for part in parts], "tool_calls"


def test_answers_cut_inside_their_reasoning_do_not_pass(
    compare: Compare, servers: tuple[Server, Server], quiz: Path
) -> None:
    """Neither said anything: 0 = 0 is no proof that they are alike."""
    for server in servers:
        server.replies = thinking
    margins = [f"--margin={name}=0.2" for name in ("score", "errors", "empty")]
    assert compare(*servers, *NO_LOGPROBS, *margins) == 1
    score = compare.metric("score")
    assert (score["value"], score["n"], score["verdict"]) == (None, 0, "undecided")
    assert score["note"] == f"{COUNT} left out, cut before anything was said"
    assert compare.metric("empty")["a"] == compare.metric("cut")["b"] == 1
    empty = f"{COUNT} of {COUNT} answers of A are empty, {COUNT} of them cut by max_tokens"
    assert empty in compare.report["warnings"]
    assert empty in (compare.out / "report.html").read_text()


def test_one_that_thinks_for_too_long_has_failed(
    compare: Compare, servers: tuple[Server, Server], quiz: Path
) -> None:
    servers[0].replies, servers[1].replies = answering, thinking
    assert compare(*servers, *NO_LOGPROBS) == 1
    score = compare.metric("score")
    assert (score["a"], score["b"], score["n"]) == (1, 0, COUNT)
    assert score["verdict"] == compare.metric("empty")["verdict"] == "inferior"
    assert [text for text in compare.report["warnings"] if "of A" in text] == []


def test_a_tool_call_is_an_answer_and_is_read_whole(
    compare: Compare, servers: tuple[Server, Server], quiz: Path, tmp_path: Path
) -> None:
    for server in servers:
        server.replies = calling
    scorer = tmp_path / "calls.py"
    scorer.write_text(
        "import json\n"
        "def same(row, output):\n"
        "    (call,) = json.loads(output)\n"
        "    return call['name'] == 'find' and json.loads(call['arguments']) == {'q': 1}\n"
    )
    compare(*servers, *NO_LOGPROBS, "--scorer", f"{scorer}:same")
    assert compare.metric("score")["a"] == compare.metric("score")["b"] == 1
    assert compare.metric("empty")["a"] == 0
    assert compare.report["warnings"] == []
