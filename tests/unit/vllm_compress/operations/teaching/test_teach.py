"""`vllm-compress teach` as a user types it, against a small server of OpenAI's protocol."""

from __future__ import annotations

import functools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.unit.vllm_compress.operations.teaching.conftest import COUNT, Teach, add
from tests.unit.vllm_compress.operations.teaching.openai_server import Server, running


def test_data_is_what_chat_tools_read(teach: Teach, server: Server) -> None:
    result = teach(server, "cot", "--samples", 1)
    assert result["lines"] == COUNT
    first = teach.lines[1]
    text = "I add 1 and 7.\nAnswer: 8"
    assert first["messages"] == [
        {"role": "user", "content": "Add 1 and 7."},
        {"role": "assistant", "content": text},
    ]
    assert (first["style"], first["seed"], first["answer"]) == ("cot", [2], "8")
    kept = first["logprobs"]
    assert kept["ids"] is True
    assert len(kept["tokens"]) == len(kept["logprobs"]) == len(text.split())
    assert all(len(top) == 20 for top in kept["top_tokens"])
    assert kept["top_logprobs"][0][:2] == [-1.0, -2.0]
    assert all("step by step" in question for question in server.questions())


def test_a_finished_file_is_written_again_without_asking(teach: Teach, server: Server) -> None:
    teach(server, "cot", "--samples", 2)
    whole = teach.out.read_bytes()
    teach.out.unlink()
    asked, server.dies_after = len(server.asked), 0
    again = teach(server, "cot", "--samples", 2, "--price-in", 2, "--price-out", 10)
    assert len(server.asked) == asked
    assert teach.out.read_bytes() == whole
    expected = (again["tokens_in"] * 2 + again["tokens_out"] * 10) / 1e6
    assert again["cost"] == pytest.approx(expected)
    assert again["tokens_in"] > again["tokens_out"] > 0


def test_more_samples_ask_only_the_new_ones(teach: Teach, server: Server) -> None:
    teach(server, "cot", "--samples", 2)
    teach(server, "cot", "--samples", 3)
    assert len(server.seen) == 3 * COUNT


def test_other_settings_are_refused_and_named(teach: Teach, server: Server) -> None:
    teach(server, "cot", "--samples", 1)
    whole = teach.out.read_bytes()
    said = teach.fails(server, "cot", "--samples", 1, "--temperature", 1, "--mark", "So:")
    assert "holds answers of other --temperature and --mark; choose another file" in said
    teach.seeds.write_text(teach.seeds.read_text() + '{"prompt": "Add 1 and 1.", "answer": 2}\n')
    assert "holds answers of other --seeds;" in teach.fails(server, "cot", "--samples", 1)
    assert teach.out.read_bytes() == whole


@pytest.mark.parametrize("style", ["cot", "icl"])
def test_cut_anywhere_a_run_goes_on_and_writes_the_same_bytes(
    teach: Teach, server: Server, style: str
) -> None:
    teach(server, style)
    whole, journal = teach.out.read_bytes(), teach.journal.read_bytes()
    every = Counter(server.questions())
    chance = random.Random(style)
    for _ in range(4):
        cut = journal[: chance.randrange(len(journal))]
        teach.journal.write_bytes(cut)
        teach.out.unlink(missing_ok=True)
        answered = cut.count(b'"phase": "asked"') - (not cut.endswith(b"\n"))
        server.seen.clear()
        teach(server, style)
        assert teach.out.read_bytes() == whole
        assert len(server.seen) in (every.total() - answered, every.total() - answered - 1)


@pytest.mark.slow
def test_killed_at_any_moment_nothing_is_asked_twice(teach: Teach, server: Server) -> None:
    command = [sys.executable, "-m", "vllm_compress.cli"]
    command += teach.arguments(server, "icl", "--parallel", 2, "--logprobs", 0)
    chance = random.Random(0)
    for number in range(2):
        server.delay, server.holds_after = 0.03, len(server.seen) + chance.randrange(2, 5)
        # Of a job in the background the shell has said that it ignores interrupts.
        heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(
            command, env=os.environ, stdout=subprocess.DEVNULL, preexec_fn=heeding
        )
        while len(server.seen) < server.holds_after:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.03))
        if number == 1:
            process.send_signal(signal.SIGINT)
            assert process.wait() == 130
        else:
            process.kill()
            process.wait()
        server.going.set()
        while server.running:
            time.sleep(0.005)
        server.going.clear()
        assert not teach.out.exists()
        answered = answers(teach.journal)
        asked = len(server.seen)
        assert asked - len(answered) <= 2 * (number + 1), "those under way alone are lost"
        server.counts.clear()
    server.delay, server.holds_after = 0.0, math.inf
    teach(server, "icl", "--parallel", 2, "--logprobs", 0)
    assert len(server.seen) == asked + COUNT - len(answered)
    assert len({tuple(line["seed"]) for line in teach.lines}) == len(teach.lines) == COUNT


def answers(journal: Path) -> list[str]:
    """The names of what was answered, half a line aside."""
    lines = journal.read_text().splitlines(keepends=True)
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    names = [line["key"] for line in found if line.get("phase") == "asked"]
    assert len(names) == len(set(names))
    return names


def test_a_server_that_dies_stops_the_run_and_the_same_command_continues_it(
    teach: Teach, server: Server
) -> None:
    server.dies_after = 30
    said = teach.fails(server, "cot", "--samples", 2)
    assert f"{server.url}: stopped answering" in said
    kept = len(answers(teach.journal))
    assert 30 <= kept < 30 + 8
    assert f"{kept} answers are kept in {teach.journal.parent}, the same command" in said
    assert not teach.out.exists()
    server.dies_after = -1
    assert teach(server, "cot", "--samples", 2)["lines"] == COUNT
    assert len(server.seen) == 2 * COUNT


def test_a_server_gone_before_the_first_answer_leaves_nothing(teach: Teach, server: Server) -> None:
    assert "no answer" in teach.fails("http://127.0.0.1:9", "cot")
    server.first.extend([(500, None)] * 40)
    assert "stopped answering (HTTP 500: Later.; 4 tries)" in teach.fails(server, "cot")
    assert sorted(path.name for path in teach.seeds.parent.iterdir()) == ["seeds.jsonl"]


def test_another_model_at_the_same_place_is_refused(teach: Teach, server: Server) -> None:
    teach(server, "icl", "--demonstrations", 1)
    lines = teach.journal.read_bytes().splitlines(keepends=True)
    teach.journal.write_bytes(b"".join(lines[:-1]))
    server.models = ["n"]
    said = teach.fails(server, "icl", "--demonstrations", 1)
    assert f"serves n, and the answers of {teach.journal.parent} are those of m" in said


def test_the_key_is_sent_and_never_said(
    teach: Teach, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "another"
    assert "VLLM_API_KEY, which is sent as the server's key, is not set" in teach.fails(
        server, "cot"
    )
    monkeypatch.setenv("VLLM_API_KEY", "secret-1")
    said = teach.fails(server, "cot")
    assert "HTTP 401: Bearer … is no key of ours" in said
    assert "holds another key" in said
    server.key = "secret-1"
    teach(server, "cot", "--samples", 1)
    assert "Bearer secret-1" in server.keys
    files = [teach.out, teach.journal]
    assert not any("secret" in path.read_text() for path in files)
    monkeypatch.setenv("VLLM_API_KEY", "secret\n2")
    teach.out = teach.out.with_name("other.jsonl")
    said = teach.fails(server, "cot")
    assert "holds characters that no HTTP header can carry" in said
    assert "secret" not in said


def test_what_is_held_out_is_neither_asked_nor_shown_nor_taught(
    teach: Teach, server: Server, tmp_path: Path
) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text('{"prompt": "ADD 3, and 21!", "answer": 24}\n{"text": "I add 5 and 35"}\n')
    result = teach(server, "icl", "--held-out", held, "--overlap", 5)
    assert result["seeds_held_out"] == 1
    assert result["dropped"] == {"lines held out": 1}
    assert result["lines"] == COUNT - 2
    sent = json.dumps(server.seen)
    assert "Add 3 and 21." not in sent
    assert "Add 5 and 35." in sent
    assert all(line["seed"][0] not in (4, 6) for line in teach.lines)
    assert "has every one of its seeds" in teach.fails(server, "icl", "--held-out", teach.seeds)


def test_wrong_answers_are_dropped_and_counted(teach: Teach, server: Server) -> None:
    server.answer = lambda question, number: (
        "Answer: 7" if "Add 2 and" in question else add(question, number)
    )
    result = teach(server, "cot", "--samples", 3)
    assert result["dropped"] == {"questions answered wrongly": 1}
    assert [3] not in [line["seed"] for line in teach.lines]
    assert teach(server, "cot", "--samples", 3, "--check", "none")["lines"] == COUNT


def test_a_function_of_the_users_checks(teach: Teach, server: Server, tmp_path: Path) -> None:
    check = tmp_path / "check.py"
    check.write_text("def even(row, answer):\n    return int(answer) % 16 == 0\n")
    result = teach(server, "cot", "--samples", 1, "--check", f"{check}:even")
    assert result["lines"] == COUNT / 2
    said = teach.fails(server, "cot", "--samples", 1, "--check", f"{check}:odd")
    assert "has no function 'odd'" in said
    assert "--check is 'odd', expected" in teach.fails(server, "cot", "--check", "odd")


def test_an_answer_that_was_cut_off_is_not_taught(teach: Teach, server: Server) -> None:
    server.cuts = "Add 4 and"
    result = teach(server, "icl")
    assert result["dropped"] == {"answers cut off": 1}
    assert result["lines"] == COUNT - 1


def test_a_request_that_is_refused_is_counted_and_all_of_them_are_an_error(
    teach: Teach, server: Server
) -> None:
    server.refuses = "Add 4 and"
    result = teach(server, "cot", "--samples", 1)
    assert result["dropped"] == {"requests refused": 1}
    assert result["refusal"] == "HTTP 400: Not this one."
    server.refuses, teach.out = "Add", teach.out.with_name("other.jsonl")
    said = teach.fails(server, "cot")
    assert f"{server.url}: answers no request; HTTP 400: Not this one." in said
    assert not teach.journal.parent.exists()


def test_a_model_that_knows_no_chats_gets_plain_text(teach: Teach, server: Server) -> None:
    server.answer = lambda question, number: " " + add(question, number).split()[-1]
    result = teach(server, "icl", "--completions", "--demonstrations", 2, "--check", "exact")
    assert result["lines"] == COUNT
    first, second, asked = server.seen[0]["prompt"].split("\n\n")
    assert {len(block.split()) for block in (first, second)} == {5}, "question and answer"
    assert len(asked.split()) == 4
    line = teach.lines[1]
    assert (line["prompt"], line["completion"], line["answer"]) == ("Add 1 and 7.", " 8", "8")
    assert len(line["logprobs"]["top_tokens"][0]) == 20
    assert {tuple(body["stop"]) for body in server.seen} == {("\n\n",)}
    teach.out = teach.out.with_name("other.jsonl")
    teach(server, "icl", "--stop", r"\n", "--stop", ".")
    assert server.seen[-1]["stop"] == ["\n", "."]


def test_progress_and_summary_are_for_people(
    teach: Teach, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    from vllm_compress.cli import main

    arguments = teach.arguments(server, "icl", "--price-in", 1, "--price-out", 1)
    assert main([a for a in arguments if a not in ("--json", "--quiet")]) == 0
    printed, error = capsys.readouterr()
    assert error.startswith("asking: done in")
    assert f"{COUNT} lines of m, icl on {COUNT} seeds; {COUNT} with log-probabilities" in printed
    assert "left out: nothing" in printed
    assert "tokens in" in printed
    assert ", cost 0.000" in printed


def test_two_runs_do_not_write_into_one_file(teach: Teach, server: Server) -> None:
    from vllm_compress.operations.journal import Journal

    with Journal(teach.journal.parent, "x"):
        assert "another process is writing into it" in teach.fails(server, "cot")


def test_a_file_of_the_users_is_not_overwritten(teach: Teach, server: Server) -> None:
    teach.out.write_text("mine")
    assert "is there, and no earlier run's" in teach.fails(server, "cot")
    assert teach.out.read_text() == "mine"
    assert not teach.journal.parent.exists()


def test_a_server_without_a_list_of_models_takes_a_name(teach: Teach) -> None:
    with running(Server(add)) as server:
        server.models = ["a", "b"]
        assert "name one with --model" in teach.fails(server, "icl")
        assert teach(server, "icl", "--model", "b")["teacher"] == "b"
        assert {body["model"] for body in server.seen} == {"b"}
