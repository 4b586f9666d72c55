"""`vllm-compress compare` as a user types it, against small servers that speak vLLM's protocol."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress_methods.errors import CompressError
from tests.unit.streaming_server import Server, running
from vllm_compress.abtest import comparison, replay
from vllm_compress.abtest.client import open_server
from vllm_compress.abtest.journal import Journal
from vllm_compress.abtest.metrics import METRICS, limits
from vllm_compress.abtest.prompts import read_prompts
from vllm_compress.abtest.scores import load_scorer
from vllm_compress.cli import main

COUNT = 40
WARM_UP = 2


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "RETRY_WAITS", (0.01, 0.01))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Prompts of 21 to 60 tokens."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{i:03d} " + "the quick brown fox " * 3} for i in range(COUNT)]
    rows = [{"prompt": row["prompt"][: 21 + i]} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    """The same model twice."""
    with ExitStack() as stack:
        yield tuple(stack.enter_context(running(Server())) for _ in "ab")  # type: ignore[misc]


class Compare:
    """The command with its usual arguments; `error` is what it printed on stderr."""

    def __init__(self, out: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.out, self.prompts, self.capsys = out, prompts, capsys
        self.error = ""

    def __call__(self, a: Server | str, b: Server | str, *more: object) -> int:
        urls = [server.url if isinstance(server, Server) else server for server in (a, b)]
        usual = ["--prompts", str(self.prompts), "-o", str(self.out), "--quiet", "--json"]
        code = main(["compare", *urls, *usual, "--max-tokens", "8", *map(str, more)])
        self.printed, self.error = self.capsys.readouterr()
        return code

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "report.json").read_text())
        return found

    def metric(self, name: str) -> dict[str, Any]:
        return next(row for row in self.report["metrics"] if row["metric"] == name)

    def fails(self, *arguments: Any) -> str:
        """Run, expecting one line and exit code 2; the line."""
        assert self(*arguments) == 2
        assert self.error.count("\n") == 1
        return self.error


@pytest.fixture
def compare(tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> Compare:
    return Compare(tmp_path / "out", prompts, capsys)


def test_a_model_is_as_good_as_itself(servers: tuple[Server, Server], compare: Compare) -> None:
    assert compare(*servers) == 1  # forty prompts cannot exclude 5% errors
    assert compare.report["verdict"] == "undecided"
    assert 10 < compare.report["more_prompts"] < 60
    assert compare(*servers, "--margin", "errors=0.1") == 0
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


def test_one_request_at_a_time_in_an_order_drawn_for_every_prompt(
    servers: tuple[Server, Server], compare: Compare
) -> None:
    compare(*servers, "--logprobs", 0)
    lines = [json.loads(line) for line in (compare.out / "journal.jsonl").open()][2:]
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
    b.breaks = 2
    compare(a, b, "--logprobs", 0)
    assert compare.metric("errors")["b"] == 0
    assert compare.metric("exact")["value"] == 1
    b.breaks = 1000
    compare.out = compare.out.with_name("other")
    assert "answers no prompt; the last time the stream ended early" in compare.fails(a, b)
    assert not compare.out.exists()


def test_a_finished_comparison_is_judged_again_without_its_servers(
    compare: Compare, prompts: Path
) -> None:
    with running(Server()) as a, running(Server(noise=0.05)) as b:
        compare(a, b)
    first = compare.report
    assert compare(a, b, "--margin", "kl=1e-9", "--price-a", 2, "--price-b", 1) == 1
    assert compare.report["verdict"] == "inferior"
    assert compare.metric("cost")["n"] == COUNT
    assert compare.metric("perplexity")["value"] == first["metrics"][0]["value"]
    assert "holds a comparison of other prompts" in compare.fails(a, b, "--seed", 1)
    prompts.write_text('{"prompt": "another one"}\n')
    assert "holds a comparison of other prompts" in compare.fails(a, b)


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
    (reason,) = compare.report["refusals"]["b"]
    assert reason.startswith("HTTP 400: This model's maximum context length")
    prompts.write_text(json.dumps({"prompt": "x" * 501}) + "\n")
    compare.out = compare.out.with_name("other")
    assert "answers no prompt; the last time HTTP 400: This model's" in compare.fails(*servers)
    assert not compare.out.exists()


def test_what_cannot_be_compared_is_one_line(
    compare: Compare, servers: tuple[Server, Server]
) -> None:
    a, b = servers
    assert "http://127.0.0.1:9/v1/models: no answer" in compare.fails(a, "http://127.0.0.1:9")
    assert "x/v1/models: no answer" in compare.fails("x", b)
    said = compare.fails(a, b, "--model-b", "gpt")
    assert f"{b.url}: gpt is not served; it serves m; name one with --model-b" in said
    b.vocabulary_offset = 1
    assert "expected the same tokenizer and chat template" in compare.fails(a, b)
    assert not compare.out.exists()
    assert a.streamed() == [] or len(a.streamed()) == WARM_UP + 1
    compare.out.mkdir()
    (compare.out / "mine.txt").touch()
    assert "not empty, and not an earlier comparison" in compare.fails(a, b)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--rate", "0", "--rate is 0.0, expected a number above 0"),
        ("--confidence", "1", "--confidence is 1.0, expected 0.5 to below 1"),
        ("--margin", "tttf=1", "unknown metric; did you mean 'ttft'?"),
        ("--margin", "ttft", "expected NAME=VALUE"),
        ("--margin", "ttft=fast", "expected a number or 'none'"),
        ("--margin", "length=0.9", "expected a number above 1"),
        ("--scorer", "nowhere.py:f", "nowhere.py: no such file"),
        ("--scorer", "f", "expected file.py:function"),
    ],
)
def test_options_are_checked_before_any_server_is_asked(
    compare: Compare, option: str, value: str, said: str
) -> None:
    assert said in compare.fails("http://127.0.0.1:9", "http://127.0.0.1:9", option, value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', "p.jsonl:3: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "p.jsonl:2: expected one of prompt and"),
        ("p.jsonl", '{"prompt": 7}\n', "p.jsonl:1: prompt is 7, expected text"),
        ("p.jsonl", '{"messages": ["hello"]}\n', "p.jsonl:1: messages is not a list of objects"),
        ("p.jsonl", '{"prompt": "a", "max_tokens": 0}\n', "p.jsonl:1: max_tokens is 0"),
        ("p.jsonl", "[1]\n", "p.jsonl:1: expected an object, found list"),
        ("p.jsonl", "\n", "p.jsonl: holds no prompt"),
        ("p.txt", "good\n\n\xff\n", "p.txt:3: not UTF-8"),
        ("p.csv", "a\n", "expected .txt or .jsonl"),
    ],
)
def test_a_broken_line_of_prompts_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(CompressError, match=said):
        read_prompts(tmp_path / name, 8)


def test_every_line_of_a_text_file_is_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("one\r\n\n  two, “quoted”\n")
    assert [p.text for p in read_prompts(path, 8)] == ["one", "  two, “quoted”"]


def test_chats_answers_and_scorers(
    compare: Compare, servers: tuple[Server, Server], prompts: Path, tmp_path: Path
) -> None:
    a, b = servers
    rows = [{"messages": [{"role": "user", "content": f"question {i}"}]} for i in range(30)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    compare(a, b, "--logprobs", 0)
    lines = [json.loads(line) for line in (compare.out / "journal.jsonl").open()][2:]
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


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_the_missing_harness_is_named_before_any_server_is_asked(compare: Compare) -> None:
    said = compare.fails("http://127.0.0.1:9", "http://127.0.0.1:9", "--lm-eval", "gsm8k")
    assert "pip install 'vllm-compress[lm-eval]'" in said
    said = compare.fails("http://127.0.0.1:9", "http://127.0.0.1:9", "--lm-eval", "gsm8k:x")
    assert "'gsm8k:x', expected TASK or TASK:QUESTIONS" in said


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


def test_two_comparisons_do_not_write_into_one_directory(tmp_path: Path) -> None:
    with Journal(tmp_path / "out", "x") as journal:
        with pytest.raises(CompressError, match="another process is comparing into it"):
            Journal(tmp_path / "out", "x")
        journal.record("answers", 0, first="a")
    with Journal(tmp_path / "out", "x") as journal:
        assert journal.done("answers", 0)


def test_margins_lie_on_the_side_that_is_worse() -> None:
    found = limits(["ttft=1.1", "throughput=0.9", "score=0.05", "length=1.2", "kl=none"])
    assert found["ttft"].bounds() == (-math.inf, 1.1)
    assert found["throughput"].bounds() == (0.9, math.inf)
    assert found["score"].bounds() == (-0.05, math.inf)
    assert found["length"].bounds() == pytest.approx((1 / 1.2, 1.2))
    assert "kl" not in found
    assert found.keys() <= METRICS.keys()
    assert limits([]).keys() == {"perplexity", "kl", "score", "errors"}


def test_the_fingerprint_knows_every_dial_that_changes_what_is_measured(prompts: Path) -> None:
    urls, out = ("a", "b"), Path("out")
    plain = comparison.Plan(urls, prompts, out)
    read = read_prompts(prompts, 8)
    same = [comparison.Plan(urls, prompts, out, prices=(1, 2), margins=["kl=1"], confidence=0.9)]
    other = [
        comparison.Plan(("b", "a"), prompts, out),
        comparison.Plan(urls, prompts, out, models=("m", None)),
        *(
            comparison.Plan(urls, prompts, out, options=options)
            for options in (replay.Options(rate=1), replay.Options(logprobs=5))
        ),
    ]
    expected = comparison.fingerprint(read, plain)
    assert all(comparison.fingerprint(read, plan) == expected for plan in same)
    assert all(comparison.fingerprint(read, plan) != expected for plan in other)
    assert comparison.fingerprint(read_prompts(prompts, 9), plain) != expected
    assert comparison.fingerprint(read[1:], plain) != expected
