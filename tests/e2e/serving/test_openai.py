"""The whole way a user goes: a compressed directory behind the OpenAI API of the real server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support.server import VllmServer

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def server(novels_int4: Path) -> Iterator[VllmServer]:
    """The int4 model under the name `novels`."""
    pytest.importorskip("vllm")
    with VllmServer(novels_int4, "--served-model-name", "novels") as running:
        yield running


@pytest.fixture
def client(server: VllmServer) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_completion_with_logprobs(client: Any) -> None:
    answer = client.completions.create(
        model="novels", prompt="It was a", max_tokens=12, temperature=0, logprobs=3
    )
    choice = answer.choices[0]
    assert answer.usage.completion_tokens == 12
    assert choice.finish_reason == "length"
    assert len(choice.logprobs.token_logprobs) == 12
    assert all(value <= 0 for value in choice.logprobs.token_logprobs)
    assert all(len(top) >= 3 for top in choice.logprobs.top_logprobs)


def test_chat_streams_what_it_answers_at_once(client: Any) -> None:
    request = {
        "model": "novels",
        "messages": [{"role": "user", "content": "She said"}],
        "max_tokens": 16,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**request).choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**request, stream=True)
        if chunk.choices
    ]
    assert whole
    assert len(pieces) > 4
    assert "".join(pieces) == whole


def test_sixteen_requests_at_once(client: Any, server: VllmServer) -> None:
    def ask(number: int) -> Any:
        return client.completions.create(
            model="novels",
            prompt=f"Chapter {number}. ",
            max_tokens=24,
            temperature=0.8,
            seed=number,
        )

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    assert all(a.choices[0].finish_reason in ("length", "stop") for a in answers)
    assert sum(a.usage.completion_tokens for a in answers) > 16 * 12
    assert len({a.choices[0].text for a in answers}) > 8


def test_a_bad_request_is_the_callers_error(client: Any) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="novels", prompt="a", max_tokens=100_000)
