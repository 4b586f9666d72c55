"""`teach` asks a real vLLM server, and what it keeps is what the model says and how sure it is."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.support.server import FEWER_PROCESSES, VllmServer
from vllm_compress.cli import main
from vllm_compress.operations.teaching.teacher import (
    Answer,
    Endpoint,
    Request,
    Teacher,
    find_model,
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
OPENINGS = ["It was a dark night, and", "She looked at him and said", "The old man sat by the"]
TOLERANCE = 0.2
"""Of a log-probability: the server computes in bfloat16; other positions are units away."""


@pytest.fixture(scope="module")
def server(novels_8m: Path) -> Iterator[VllmServer]:
    pytest.importorskip("vllm")
    options = ["--served-model-name", "novels", "--chat-template", TEMPLATE]
    with VllmServer(novels_8m, *options, env=FEWER_PROCESSES) as running:
        yield running


@pytest.mark.parametrize("completions", [True, False])
def test_log_probabilities_are_those_of_the_model(
    server: VllmServer, novels_8m: Path, completions: bool
) -> None:
    model, is_vllm = find_model(server.url, None)
    assert (model, is_vllm) == ("novels", True)

    async def ask() -> Answer:
        async with httpx.AsyncClient(timeout=60) as client:
            endpoint = Endpoint(server.url, completions, max_tokens=12, top=20)
            teacher = Teacher(endpoint, client)
            teacher.model, teacher.is_vllm = model, is_vllm
            messages = ({"role": "user", "content": OPENINGS[0]},)
            return await teacher.ask(Request("1", messages, 0))

    answer = asyncio.run(ask())
    assert answer.logprobs is not None
    kept = json.loads(answer.logprobs)
    assert kept["ids"] is True
    assert len(kept["tokens"]) == answer.tokens_out == 12
    tokenizer = AutoTokenizer.from_pretrained(novels_8m)
    assert tokenizer.decode(kept["tokens"]) == answer.text
    assert kept["tokens"] == [top[0] for top in kept["top_tokens"]]
    _check_model(novels_8m, tokenizer, OPENINGS[0] + ("" if completions else " "), kept)


def _check_model(folder: Path, tokenizer: Any, prompt: str, kept: dict[str, Any]) -> None:
    """Transformers finds the same log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids + kept["tokens"]])).logits[0, len(ids) - 1 : -1]
    expected = logits.log_softmax(-1)
    for position, tokens, values in zip(
        expected, kept["top_tokens"], kept["top_logprobs"], strict=True
    ):
        assert len(tokens) == 20
        found = position[tokens].tolist()
        assert found == pytest.approx(values, abs=TOLERANCE)
        assert math.fsum(map(math.exp, values)) <= 1.01


def test_the_command_writes_lines(server: VllmServer, tmp_path: Path) -> None:
    seeds, out = tmp_path / "seeds.jsonl", tmp_path / "data.jsonl"
    rows = [{"prompt": text, "answer": "a voice came"} for text in OPENINGS]
    seeds.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["teach", server.url, "--seeds", str(seeds), "--style", "icl", "-o", str(out)]
    options = ["--completions", "--demonstrations", "1", "--max-tokens", "64", "--quiet"]
    assert main([*asked, *options, "--stop", "."]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines
    for line in lines:
        assert line["prompt"] in OPENINGS
        assert line["completion"].strip() == line["answer"]
        assert "." not in line["completion"]
        assert line["logprobs"]["ids"] is True
