"""What an engine that shuts down says to a request that comes."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_compress.names import DEPLOYMENT_VARIABLE
from vllm_compress.shutdown import REJECT, reject_by_error

core = pytest.importorskip("vllm.v1.engine.core")


class Engine(core.EngineCoreProc):
    """Its methods without an engine; keeps how outputs end."""

    def __init__(self, state: Any) -> None:
        self.shutdown_state = state
        self.ended: list[tuple[list[str], int, Any]] = []

    def _send_finish_outputs_to_client(self, ids: list[str], client: int, reason: Any) -> None:
        self.ended.append((ids, client, reason))


@pytest.fixture
def vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own method, whatever a plugin loaded earlier in this process made of it."""
    own = inspect.unwrap(getattr(core.EngineCoreProc, REJECT))
    monkeypatch.setattr(core.EngineCoreProc, REJECT, own)


REQUEST = SimpleNamespace(request_id="r", client_index=3)


@pytest.mark.parametrize(("deployment", "reason"), [("chat", "ERROR"), (None, "ABORT")])
def test_a_deployment_rejects_by_an_error(
    vllms: None, monkeypatch: pytest.MonkeyPatch, deployment: str | None, reason: str
) -> None:
    monkeypatch.delenv(DEPLOYMENT_VARIABLE, raising=False)
    if deployment:
        monkeypatch.setenv(DEPLOYMENT_VARIABLE, deployment)
    reject_by_error()
    running = Engine(core.EngineShutdownState.RUNNING)
    assert not running._reject_add_in_shutdown(REQUEST)
    assert not running.ended
    ending = Engine(core.EngineShutdownState.SHUTTING_DOWN)
    assert ending._reject_add_in_shutdown(REQUEST)
    assert ending.ended == [(["r"], 3, core.FinishReason[reason])]


def test_another_vllm_stays_as_it_is(vllms: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEPLOYMENT_VARIABLE, "chat")
    monkeypatch.delattr(core.EngineCoreProc, REJECT)
    reject_by_error()
    assert not hasattr(core.EngineCoreProc, REJECT)
