"""Of several chains of thought the ones that most agree with, and are right, are kept."""

from __future__ import annotations

from tests.unit.vllm_compress.operations.teaching.conftest import COUNT, Teach, add
from tests.unit.vllm_compress.operations.teaching.openai_server import Server


def test_the_majority_wins_and_a_right_minority_does_not(teach: Teach, server: Server) -> None:
    def answer(question: str, number: int) -> str:
        wrong = {"Add 1 and": 1, "Add 2 and": 2, "Add 3 and": 3}
        errors = next((n for text, n in wrong.items() if text in question), 0)
        return "Answer: 999" if number < errors else f"Way {number}. {add(question, 0)}"

    server.answer = answer
    result = teach(server, "cot", "--samples", 4, "--keep", 3, "--parallel", 1)
    assert result["dropped"] == {
        "answers outvoted": 1,
        "questions answered wrongly": 1,
        "questions without a majority": 1,
    }
    by_seed = [line["seed"][0] for line in teach.lines]
    assert by_seed.count(1) == by_seed.count(2) == 3
    assert by_seed.count(3) == by_seed.count(4) == 0
    assert len({line["messages"][-1]["content"] for line in teach.lines}) == len(teach.lines)
    assert all("999" not in line["messages"][-1]["content"] for line in teach.lines)


def test_the_request_for_steps_is_the_users_or_none(teach: Teach, server: Server) -> None:
    server.answer = lambda question, number: add(question, 0).replace("Answer", "So")
    options = ("--samples", 1, "--mark", "So:")
    teach(server, "cot", *options, "--ask", "End with {mark}")
    assert server.questions()[0].endswith("\n\nEnd with So:")
    teach.out = teach.out.with_name("other.jsonl")
    teach(server, "cot", *options, "--ask", "")
    assert server.questions()[-1].endswith(".")
    assert teach.lines[0]["answer"] == "0"


def test_texts_without_a_final_answer_are_counted(teach: Teach, server: Server) -> None:
    server.answer = lambda question, number: "hm" if number == 0 else add(question, 0)
    result = teach(server, "cot", "--samples", 2, "--parallel", 1)
    assert result["lines"] == COUNT
    assert result["dropped"] == {"answers without a final one": COUNT}


def test_nothing_left_is_an_error_and_keeps_the_answers(teach: Teach, server: Server) -> None:
    server.answer = lambda question, number: "Answer: 999"
    said = teach.fails(server, "cot", "--samples", 1)
    assert f"no line is left of it ({COUNT} questions answered wrongly)" in said
    assert not teach.out.exists()
    assert teach(server, "cot", "--samples", 1, "--check", "none")["lines"] == COUNT
    assert len(server.seen) == COUNT
