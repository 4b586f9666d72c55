"""`vllm-compress compare` as a user types it, against small servers that speak vLLM's protocol."""

from __future__ import annotations

import itertools
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress_methods.errors import CompressError
from tests.unit.vllm_compress.operations.abtest.conftest import COUNT, WARM_UP, Compare
from tests.unit.vllm_compress.operations.abtest.streaming_server import Server, running
from vllm_compress.operations.abtest.replay.client import open_server
from vllm_compress.operations.abtest.replay.prompts import read_prompts
from vllm_compress.operations.abtest.scoring.scores import load_scorer


def test_a_model_is_as_good_as_itself(servers: tuple[Server, Server], compare: Compare) -> None:
    assert compare(*servers) == 1  # forty prompts cannot exclude 5% errors
    assert compare.report["verdict"] == "undecided"
    assert 56 < compare.report["more_prompts"] < 600  # 96 that see no error exclude 5%
    assert compare(*servers, "--margin", "errors=0.12", "--margin", "empty=0.12") == 0
    assert compare.report["verdict"] == "non-inferior"
    assert json.loads(compare.printed) == compare.report
    assert compare.metric("perplexity")["value"] == 1
    assert compare.metric("kl")["value"] == pytest.approx(0, abs=1e-9)
    for name in ("top1", "agreement", "exact", "length"):
        assert compare.metric(name)["value"] == 1
    assert {row["n"] for row in compare.report["metrics"] if row["value"] is not None} == {COUNT}


def test_a_worse_model_is_found_out_and_its_numbers_are_the_models(
    servers: tuple[Server, Server], compare: Compare
) -> None:
    a, _ = servers
    with running(Server(noise=1.0)) as b:
        assert compare(a, b, "--logprobs", -1) == 1
    assert compare.report["verdict"] == "inferior"
    nll = {a: 0.0, b: 0.0}
    kl = tokens = 0.0
    for prompt in read_prompts(compare.prompts, 8):
        ids = a.tokenize(prompt.text or "")
        for last, target in itertools.pairwise(ids):
            p, q = a.log_probabilities[last], b.log_probabilities[last]
            kl += float((np.exp(p) * (p - q)).sum())
            nll[a], nll[b], tokens = nll[a] - p[target], nll[b] - q[target], tokens + 1
    assert compare.metric("kl")["value"] == pytest.approx(kl / tokens)
    row = compare.metric("perplexity")
    assert row["a"] == pytest.approx(math.exp(nll[a] / tokens))
    assert row["b"] == pytest.approx(math.exp(nll[b] / tokens))
    assert row["value"] == pytest.approx(row["b"] / row["a"])
    assert compare.report["worst"]


def test_a_lower_bound_of_kl_proves_nothing(
    servers: tuple[Server, Server], compare: Compare
) -> None:
    """The three likeliest tokens look alike, the other 61 do not."""
    a, _ = servers
    with running(Server(noise=0.5)) as b:
        compare(a, b, "--logprobs", -1)
        exact = compare.metric("kl")
        assert exact["verdict"] == "inferior"
        assert exact["note"] == "exact"
        assert exact["most"] is None
        compare.out = compare.out.with_name("bounds")
        margin = 0.9 * exact["value"]
        compare(a, b, "--logprobs", 3, "--margin", f"kl={margin}")
    some = compare.metric("kl")
    assert some["value"] < margin < exact["value"] < some["most"]
    assert some["low"] <= some["value"]
    assert some["high"] >= some["most"]
    assert some["verdict"] == "undecided"
    assert some["needed"] is None  # more prompts do not narrow bounds
    assert "exact with --logprobs -1" in some["note"]


def test_one_request_at_a_time_in_an_order_drawn_for_every_prompt(
    servers: tuple[Server, Server], compare: Compare
) -> None:
    compare(*servers, "--logprobs", 0)
    lines = [json.loads(line) for line in (compare.out / "journal.jsonl").open()][2:-1]
    first = [line["first"] for line in lines]
    assert 8 <= first.count("a") <= 32  # binomial, 99.99%
    assert len({tuple(first[i : i + 4]) for i in range(COUNT - 3)}) > 4
    spans = sorted(
        (line[side]["started"], line[side]["started"] + line[side]["seconds"])
        for line in lines
        for side in "ab"
    )
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    for server in servers:
        sent = [body["prompt"] for body in server.streamed()]
        assert len(sent) == COUNT + WARM_UP
        assert len(set(sent)) == COUNT
        assert len({body["cache_salt"] for body in server.streamed()}) == len(sent)


@pytest.mark.alone
def test_at_a_rate_both_get_every_prompt_and_no_more_are_open_than_allowed(
    servers: tuple[Server, Server], compare: Compare
) -> None:
    for server in servers:
        server.delay = 0.2
    compare(*servers, "--rate", 200, "--concurrency", 5, "--logprobs", 0)
    for server in servers:
        assert len({body["prompt"] for body in server.streamed()}) == COUNT
        assert 2 <= server.most <= 5
    assert compare.report["late"] > COUNT / 4
    assert compare.metric("ttft")["a"] > 0.2


@pytest.mark.parametrize("rate", [[], ["--rate", 500]])
def test_a_server_that_dies_stops_the_run_and_the_same_command_continues_it(
    compare: Compare, servers: tuple[Server, Server], rate: list[Any]
) -> None:
    a, b = servers
    b.dies_after = 20
    said = compare.fails(a, b, *rate)
    assert f"{b.url}: stopped answering" in said
    assert "the same command continues" in said
    before = (compare.out / "journal.jsonl").read_text()
    kept = before.count('"answers"')
    assert 0 < kept < COUNT
    assert not (compare.out / "report.json").exists()
    # A kill may also leave half a line.
    (compare.out / "journal.jsonl").write_text(before + '{"phase": "answ')

    b.dies_after, asked = -1, len(a.streamed())
    compare(a, b, *rate)
    assert compare.report["n"] == COUNT
    assert len(a.streamed()) - asked == COUNT - kept + WARM_UP
    assert (compare.out / "journal.jsonl").read_text().startswith(before)
    assert compare.metric("exact")["n"] == COUNT
    # The prompts at which it died had no answer, whatever came of them later.
    assert compare.metric("errors")["a"] == 0
    assert compare.metric("errors")["b"] >= 1 / COUNT
    assert "stopped answering" in compare.report["refusals"]["b"]


def test_a_server_that_dies_while_scoring_is_continued_too(
    compare: Compare, servers: tuple[Server, Server]
) -> None:
    a, b = servers
    b.dies_after = COUNT + WARM_UP + 15
    assert f"{b.url}/v1/completions: no answer" in compare.fails(a, b)
    b.dies_after = -1
    compare(a, b)
    assert compare.metric("kl")["n"] == COUNT
    assert len(a.streamed()) == COUNT + WARM_UP


def test_answers_that_break_off_are_asked_for_again(
    compare: Compare, servers: tuple[Server, Server]
) -> None:
    a, b = servers
    b.breaks = 2  # those of the warm-up
    compare(a, b, "--logprobs", 0)
    assert compare.metric("errors")["b"] == 0
    assert compare.metric("exact")["value"] == 1
    b.breaks_once = {prompt.text or "" for prompt in read_prompts(compare.prompts, 8)[10:13]}
    compare.out = compare.out.with_name("broken")
    compare(a, b, "--logprobs", 0)
    # The second try is an output to compare; the first one is what a user had.
    assert compare.metric("exact")["n"] == COUNT
    assert compare.metric("errors")["b"] == 3 / COUNT
    assert compare.metric("ttft")["n"] == compare.metric("throughput")["n"] == COUNT - 3
    assert compare.report["refusals"]["b"] == {"the stream ended early": 3}
    b.breaks = 1000
    compare.out = compare.out.with_name("other")
    assert "answers no prompt; the last time the stream ended early" in compare.fails(a, b)
    assert not compare.out.exists()


def test_a_server_that_serves_something_else_meanwhile_is_noticed(compare: Compare) -> None:
    with running(Server()) as a, running(Server()) as b:
        b.dies_after = 10
        compare.fails(a, b)
    with (
        running(Server(a.server_port)) as again,
        running(Server(b.server_port, model="n")) as other,
    ):
        said = compare.fails(again, other)
    assert "no longer serves what this comparison began with (/models/m, now /models/n)" in said


def test_prompts_that_a_server_refuses_are_its_errors(
    compare: Compare, servers: tuple[Server, Server], prompts: Path
) -> None:
    rows = prompts.read_text() + json.dumps({"prompt": "x" * 501}) + "\n"
    prompts.write_text(rows)
    compare(*servers)
    errors = compare.metric("errors")
    assert (errors["a"], errors["b"], errors["n"]) == (1 / 41, 1 / 41, 41)
    assert compare.metric("ttft")["n"] == compare.metric("kl")["n"] == COUNT
    for server in servers:
        assert sum(body["prompt"] == "x" * 501 for body in server.streamed()) == 1
    (reason,) = compare.report["refusals"]["b"]
    assert reason.startswith("HTTP 400: This model's maximum context length")
    prompts.write_text(json.dumps({"prompt": "x" * 501}) + "\n")
    compare.out = compare.out.with_name("other")
    assert "answers no prompt; the last time HTTP 400: This model's" in compare.fails(*servers)
    assert not compare.out.exists()


def test_chats_answers_and_scorers(
    compare: Compare, servers: tuple[Server, Server], prompts: Path, tmp_path: Path
) -> None:
    a, b = servers
    rows = [{"messages": [{"role": "user", "content": f"question {i}"}]} for i in range(30)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    compare(a, b, "--logprobs", 0)
    lines = [json.loads(line) for line in (compare.out / "journal.jsonl").open()][2:-1]
    outputs = {int(line["key"]): line["a"]["text"] for line in lines}
    assert all(output.count(" ") >= 1 for output in outputs.values())
    # Answers may be added later: what was sent stays the same.
    for i, row in enumerate(rows):
        row["answer"] = outputs[i] if i % 3 else "something else"  # type: ignore[assignment]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    compare(a, b, "--logprobs", 0)
    assert compare.metric("score")["a"] == compare.metric("score")["b"] == pytest.approx(2 / 3)
    scorer = tmp_path / "grade.py"
    scorer.write_text("def half(row, output):\n    return 0.5 if 'answer' in row else 0\n")
    compare(a, b, "--logprobs", 0, "--scorer", f"{scorer}:half")
    assert compare.metric("score")["a"] == 0.5
    scorer.write_text("def half(row, output):\n    return len(output)\n")
    said = compare.fails(a, b, "--logprobs", 0, "--scorer", f"{scorer}:half")
    assert "prompts.jsonl:1: the scorer returned" in said
    with pytest.raises(CompressError, match="has no function 'hafl'; did you mean 'half'"):
        load_scorer(f"{scorer}:hafl")


def test_prices_come_from_the_servers_metrics(compare: Compare) -> None:
    with running(Server()) as a, running(Server()) as b:
        for server, price in ((a, 3.0), (b, 1.5)):
            server.metrics = (
                f'vllm_compress_device_price_per_hour{{deployment="d"}} {price}\n'
                'vllm_compress_devices{deployment="d"} 2.0\n'
                'vllm_compress_deployment_info{deployment="d",formats="int8 row"} 1.0\n'
            )
        assert open_server("a", f"{a.url}/v1/", None).price_per_hour == 6
        compare(a, b, "--logprobs", 0)
    cost, speed = compare.metric("cost"), compare.metric("throughput")
    assert cost["value"] == pytest.approx(0.5 / speed["value"])
    assert cost["a"] == pytest.approx(6 / 3600 / speed["a"] * 1e6)
    assert compare.report["a"]["info"]["formats"] == "int8 row"


@pytest.mark.slow
def test_tasks_of_the_harness_are_paired_by_question(
    compare: Compare, tmp_path: Path, novels_8m: Path
) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"question": f"{i} is", "answer": str(i % 2)} for i in range(30)]
    (tmp_path / "q.json").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "parity",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "q.json")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    }
    path = tmp_path / "parity.yaml"
    path.write_text(json.dumps(task))
    with running(Server()) as a, running(Server(noise=1.0)) as b:
        a.root = b.root = str(novels_8m)
        compare(a, b, "--logprobs", 0, "--lm-eval", f"{path}:25")
    row = compare.metric("parity/exact_match")
    assert row["n"] == 25
    assert row["value"] == pytest.approx(row["b"] - row["a"])
    assert row["limit"] == -0.02
    before = compare.report
    assert compare(a, b, "--logprobs", 0, "--lm-eval", f"{path}:25") == 1  # nothing left to ask
    assert compare.report == before


class Links(HTMLParser):
    """Everything a page would load, and whether its tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "data") and v]
        self.loads += ["script"] if tag == "script" else []
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "data") and v]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_escapes_what_models_say(
    compare: Compare, servers: tuple[Server, Server], prompts: Path
) -> None:
    a, _ = servers
    prompts.write_text(json.dumps({"prompt": "<script>alert(1)</script> & more"}) + "\n")
    with running(Server(noise=3.0)) as b:
        compare(a, b)
    text = (compare.out / "report.html").read_text()
    links = Links()
    links.feed(text)
    assert not links.open
    assert [one for one in links.loads if not one.startswith("#")] == []
    assert "&lt;script&gt;alert(1)" in text
    assert "nan" not in text
    for row in compare.report["metrics"]:
        assert f"<td>{row['metric']}<" in text


@pytest.mark.parametrize(("status", "asked"), [(400, 1), (404, 1), (429, 1), (500, 3), (503, 3)])
def test_a_refusal_of_log_probabilities_is_not_repeated(
    compare: Compare, servers: tuple[Server, Server], status: int, asked: int
) -> None:
    """4xx says that this request is wrong, and would be again; 5xx may pass. Three tries here."""
    a, b = servers
    b.score_status = status
    compare.fails(a, b)
    assert sum("prompt_logprobs" in body for body in b.seen) == asked
