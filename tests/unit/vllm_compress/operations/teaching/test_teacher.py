"""A teacher is asked as often as it takes and never faster than it allows."""

from __future__ import annotations

import asyncio
import itertools
import time
from email.utils import formatdate
from typing import Any

import httpx
import pytest

from compress_methods.errors import CompressError
from tests.unit.vllm_compress.operations.teaching.conftest import COUNT, Teach, add
from tests.unit.vllm_compress.operations.teaching.openai_server import Server
from vllm_compress.operations.teaching import teacher
from vllm_compress.operations.teaching.teacher import Endpoint, Request, Teacher, retry_after


def ask(server: Server, count: int = 1, **options: Any) -> Teacher:
    """Ask so many requests at once."""
    found: list[Teacher] = []

    async def run() -> None:
        async with httpx.AsyncClient() as client:
            asked = Teacher(Endpoint(server.url, **options), client)
            asked.model = "m"
            found.append(asked)
            messages = ({"role": "user", "content": "Add 1 and 2."},)
            requests = (Request(str(i), messages, 0) for i in range(count))
            answers = await asyncio.gather(*map(asked.ask, requests))
            assert {answer.text for answer in answers} == {add("Add 1 and 2.", 0)}

    asyncio.run(run())
    return found[0]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_what_may_pass_is_tried_again(server: Server, status: int) -> None:
    server.first.extend([(status, None)] * 3)
    assert ask(server).retries == 3
    assert len(server.asked) == 4


def test_waits_double_and_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "TRIES", 8)
    for tries in range(1, 20):
        longest = min(0.1, 0.01 * 2 ** (tries - 1))
        assert longest / 2 <= teacher._wait(tries, None) <= longest
    server.first.extend([(503, None)] * 20)
    with pytest.raises(CompressError, match=r"stopped answering \(HTTP 503: Later.; 8 tries\)"):
        ask(server)
    assert len(server.asked) == 8


def test_no_request_is_sent_before_retry_after_says(server: Server) -> None:
    server.first.append((429, "1"))
    began = time.monotonic()
    ask(server, 1)
    assert server.asked[1] - server.asked[0] >= 1
    server.asked.clear()
    server.first.append((429, "1"))

    async def two() -> None:
        async with httpx.AsyncClient() as client:
            asked = Teacher(Endpoint(server.url), client)
            asked.model = "m"
            messages = ({"role": "user", "content": "Add 1 and 2."},)
            first = asyncio.create_task(asked.ask(Request("a", messages, 0)))
            await asyncio.sleep(0.2)
            await asked.ask(Request("b", messages, 0))
            await first

    asyncio.run(two())
    assert len(server.asked) == 3
    assert all(at - server.asked[0] >= 0.99 for at in server.asked[1:])
    assert time.monotonic() - began < 20


def test_a_limit_on_rates_is_no_server_that_died(server: Server) -> None:
    server.first.extend([(429, None)] * 12)
    assert ask(server).retries == 12


def test_a_limit_that_lets_nothing_through_ends(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "PATIENCE", 0.3)
    server.first.extend([(429, None)] * 100)
    with pytest.raises(CompressError, match=r"stopped answering \(HTTP 429: Later.; \d+ tries\)"):
        ask(server)


def test_a_server_that_wants_hours_is_asked_another_day(server: Server) -> None:
    server.first.append((429, "7200"))
    with pytest.raises(CompressError, match=r"asks to come back in 2 h 00 min \(HTTP 429: Later"):
        ask(server)


def test_retry_after_is_a_number_or_a_date() -> None:
    now = 1_000_000.0
    assert retry_after("30", now) == 30
    assert retry_after(formatdate(now + 90, usegmt=True), now) == 90
    assert retry_after(formatdate(now - 90, usegmt=True), now) == 0
    for nothing in (None, "soon", "", "-1", "nan", "9" * 400, "Fri, 99 Foo 2026"):
        assert retry_after(nothing, now) is None


def test_requests_go_at_a_rate(server: Server) -> None:
    ask(server, 6, rate=20)
    gaps = [b - a for a, b in itertools.pairwise(sorted(server.asked))]
    assert sum(gaps) >= 5 / 20 * 0.9


def test_no_more_requests_are_open_than_allowed(teach: Teach, server: Server) -> None:
    server.delay = 0.02
    teach(server, "icl", "--parallel", 3)
    assert 2 <= server.most <= 3
    assert len(server.seen) == COUNT


@pytest.mark.parametrize("status", [429, 500])
def test_a_busy_server_gets_everything_asked_once(
    teach: Teach, server: Server, status: int
) -> None:
    server.first.extend([(status, None)] * 3 * COUNT if status == 429 else [(status, None)] * 3)
    result = teach(server, "icl")
    assert result["lines"] == len(server.seen) == COUNT
    assert result["retries"] == len(server.asked) - COUNT > 0


def test_what_an_endpoint_does_not_know_is_left_out(teach: Teach, server: Server) -> None:
    server.owner, server.unknown = "openai", ("logprobs", "max_tokens")
    result = teach(server, "cot", "--samples", 1)
    assert result["lines"] == COUNT
    assert result["lines_with_logprobs"] == 0
    assert "logprobs" not in teach.lines[0]
    assert all(body["max_completion_tokens"] == 512 for body in server.seen)
    assert not any("return_tokens_as_token_ids" in body for body in server.seen)
    teach.out = teach.out.with_name("other.jsonl")
    said = teach.fails(server, "cot", "--logprobs", 5)
    assert "Unsupported parameter: logprobs.; give another --logprobs" in said


def test_log_probabilities_of_other_services_are_of_texts(teach: Teach, server: Server) -> None:
    server.owner = "openai"
    teach(server, "cot", "--samples", 1, "--logprobs", 3)
    kept = teach.lines[0]["logprobs"]
    assert kept["ids"] is False
    assert kept["top_tokens"][0] == ["I0", "I1", "I2"]


def test_a_server_without_counts_makes_the_bill_a_least_one(teach: Teach, server: Server) -> None:
    server.usage = False
    result = teach(server, "cot", "--samples", 1)
    assert result["answers_without_counts"] == COUNT


@pytest.mark.parametrize("odd", [{"content": [{"token": "a"}]}, {"tokens": ["a"]}, [1]])
def test_odd_log_probabilities_and_counts_cost_no_answer(odd: object) -> None:
    choice = {"message": {"content": "a"}, "finish_reason": "stop", "logprobs": odd}
    answer = teacher._read({"choices": [choice], "usage": {"prompt_tokens": "many"}})
    assert answer == teacher.Answer("a", True)


def test_no_money_left_stops_the_run(teach: Teach, server: Server) -> None:
    server.first.extend([(402, None)] * 40)
    assert "HTTP 402: Later." in teach.fails(server, "cot")
    assert len(server.asked) <= 8


def test_an_answer_that_is_none_is_tried_again_and_named(teach: Teach, server: Server) -> None:
    server.answer = lambda question, number: 7  # type: ignore[assignment,return-value]
    assert "an answer that is not OpenAI's" in teach.fails(server, "cot", "--logprobs", 0)
