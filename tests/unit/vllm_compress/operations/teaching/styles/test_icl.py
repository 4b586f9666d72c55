"""Demonstrations are those asked for, and never the question itself."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.unit.vllm_compress.operations.teaching.conftest import COUNT, Teach
from tests.unit.vllm_compress.operations.teaching.openai_server import Server
from vllm_compress.operations.teaching.seeds import Seed
from vllm_compress.operations.teaching.similarity import Similarity, words
from vllm_compress.operations.teaching.styles.icl import choose

TEXTS = ["the red cat", "the red dog", "a blue whale sings", "a blue whale sleeps", "", "the the"]


def seed(line: int, text: str, answer: str | None = "x") -> Seed:
    return Seed(line, f"s.jsonl:{line}", ({"role": "user", "content": text},), answer, {})


def test_similarity_is_the_cosine_of_tf_idf() -> None:
    vocabulary = sorted({word for text in TEXTS for word in words(text)})
    counts = np.array([[words(text).count(word) for word in vocabulary] for text in TEXTS])
    spread = (counts > 0).sum(0)
    weights = counts * (1 + np.log((1 + len(TEXTS)) / (1 + spread)))
    weights = weights / np.maximum(np.linalg.norm(weights, axis=1, keepdims=True), 1e-12)
    found = Similarity(TEXTS)
    for i in range(len(TEXTS)):
        np.testing.assert_allclose(found.to(i), weights @ weights[i], atol=1e-12)


def test_the_nearest_stands_last_and_none_without_an_answer_is_shown() -> None:
    seeds = [seed(i, text) for i, text in enumerate(TEXTS[:4])]
    shown = choose(seeds, 2, "similar", 0)
    assert [examples[-1].line for examples in shown] == [1, 0, 3, 2]
    seeds[1] = seed(1, TEXTS[1], None)
    assert all(1 not in [e.line for e in examples] for examples in choose(seeds, 2, "similar", 0))


@pytest.mark.parametrize("how", ["similar", "random"])
def test_no_question_shows_itself(how: str) -> None:
    seeds = [seed(i, f"question {i % 3}") for i in range(9)]
    shown = choose(seeds, 3, how, 0)
    assert shown == choose(seeds, 3, how, 0)
    for one, examples in zip(seeds, shown, strict=True):
        lines = [example.line for example in examples]
        assert len(set(lines)) == 3
        assert one.line not in lines
    if how == "random":
        assert shown != choose(seeds, 3, how, 1)
        assert len({tuple(e.line for e in examples) for examples in shown}) > 5


def test_demonstrations_are_turns_before_the_question(teach: Teach, server: Server) -> None:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": f"Add {i} and 1."},
                {"role": "assistant", "content": str(i + 1)},
            ]
        }
        for i in range(4)
    ]
    teach.seeds.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teach(server, "icl", "--demonstrations", 2, "--select", "random")
    for body in server.seen:
        roles = [message["role"] for message in body["messages"]]
        assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
        assert body["temperature"] == 0
    assert [m["role"] for m in teach.lines[0]["messages"]] == ["system", "user", "assistant"]
    assert len(teach.lines[0]["seed"]) == 3
    teach.out.unlink()
    teach(server, "icl", "--demonstrations", 2, "--select", "random", "--keep-demonstrations")
    assert len(server.seen) == 4
    assert len(teach.lines[0]["messages"]) == 7


def test_lines_are_in_the_order_of_the_seeds(teach: Teach, server: Server) -> None:
    teach(server, "icl", "--parallel", 7)
    assert [line["seed"][0] for line in teach.lines] == list(range(1, COUNT + 1))
