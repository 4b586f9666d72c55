"""Instructions grow until there are enough, none like another, whatever interrupts."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from tests.unit.vllm_compress.operations.teaching.conftest import Teach
from tests.unit.vllm_compress.operations.teaching.openai_server import Server
from vllm_compress.commands.teach import render
from vllm_compress.operations.teaching.novelty import THRESHOLD, jaccard, runs

THINGS = ["rivers", "cats", "bridges", "poems", "stars", "clocks"]
THINGS += ["gardens", "maps", "songs", "recipes", "engines", "dreams"]
VERBS = ["Describe", "Compare", "Summarise", "Translate", "Rank", "Invent", "Explain", "Criticise"]
SEEDS = ["Name three large animals of Africa.", "Write a poem about rain in Paris.", "What is 2+2?"]


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    path = tmp_path / "seeds.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in SEEDS))
    return path


def grow(question: str, number: int) -> str:
    """New instructions that depend on what is shown; an answer to any other question."""
    if "new ones" not in question:
        return f"An answer to {question}"
    chance = random.Random(question)
    pairs = chance.sample(list(itertools.product(VERBS, THINGS)), 3)
    lines = [f"{verb} {thing} for readers of {chance.choice(THINGS)}." for verb, thing in pairs]
    lines += ["Name 3 large animals of africa", "No."]
    return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))


def test_instructions_grow_differ_and_are_answered(teach: Teach, server: Server) -> None:
    server.answer = grow
    result = teach(server, "instruct", "--count", 30)
    assert result["lines"] == result["grown"] == 30
    texts = [line["messages"][0]["content"] for line in teach.lines]
    for one, other in itertools.combinations([*SEEDS, *texts], 2):
        assert jaccard(runs(one), runs(other)) < THRESHOLD
    assert result["dropped"]["instructions too short or too long"] > 0
    assert result["dropped"]["instructions that repeat"] > 0
    assert all(line["answer"].startswith("An answer to") for line in teach.lines)
    assert all(set(line["seed"]) <= {1, 2, 3} for line in teach.lines)
    growing = [body for body in server.seen if "new ones" in body["messages"][-1]["content"]]
    assert {body["temperature"] for body in growing} == {1}
    assert any(text in body["messages"][-1]["content"] for text in texts for body in growing)


def test_how_many_are_asked_at_once_and_where_it_stops_changes_nothing(
    teach: Teach, server: Server
) -> None:
    server.answer = grow
    teach(server, "instruct", "--count", 30, "--parallel", 1)
    whole, journal = teach.out.read_bytes(), teach.journal.read_bytes()
    asked = len(server.seen)
    chance = random.Random(0)
    for parallel in (2, 5, 16):
        cut = journal[: chance.randrange(len(journal))]
        teach.journal.write_bytes(cut)
        teach.out.unlink()
        server.seen.clear()
        teach(server, "instruct", "--count", 30, "--parallel", parallel)
        assert teach.out.read_bytes() == whole
        kept = cut.count(b'"phase": "asked"') - (not cut.endswith(b"\n"))
        assert len(server.seen) in (asked - kept, asked - kept - 1)


def test_a_greater_count_uses_what_there_is(teach: Teach, server: Server) -> None:
    server.answer = grow
    teach(server, "instruct", "--count", 10)
    first = [line["messages"][0]["content"] for line in teach.lines]
    server.seen.clear()
    teach(server, "instruct", "--count", 20)
    answered = [text for text in server.questions() if text in first]
    assert answered == []
    assert len(teach.lines) == 20
    grown = teach.out.read_bytes()
    teach.out = teach.out.with_name("at-once.jsonl")
    teach(server, "instruct", "--count", 20)
    assert teach.out.read_bytes() == grown


def test_a_teacher_that_repeats_itself_stops_early(teach: Teach, server: Server) -> None:
    server.answer = lambda question, number: (
        "1. Describe the rivers of Peru.\n2. Describe the rivers of Peru!"
        if "new ones" in question
        else "Long."
    )
    result = teach(server, "instruct", "--count", 50)
    assert result["grown"] == result["lines"] == 1
    assert "grew 1 of 50 instructions" in render(result)
    server.answer = lambda question, number: "I will not."
    teach.out = teach.out.with_name("other.jsonl")
    assert "no line is left of it" in teach.fails(server, "instruct", "--count", 5)


def test_what_is_held_out_does_not_grow(teach: Teach, server: Server, tmp_path: Path) -> None:
    server.answer = lambda question, number: (
        "1. Describe the rivers of Peru.\n2. Count the stars of Orion."
        if "new ones" in question
        else "An answer."
    )
    held = tmp_path / "held.txt"
    held.write_text("describe the rivers of peru")
    result = teach(server, "instruct", "--count", 2, "--held-out", held)
    texts = [line["messages"][0]["content"] for line in teach.lines]
    assert texts == ["Count the stars of Orion."]
    assert result["dropped"]["instructions held out"] >= 1
