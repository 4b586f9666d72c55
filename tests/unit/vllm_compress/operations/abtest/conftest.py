"""Two servers, prompts, and the command that compares them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.unit.vllm_compress.operations.abtest.streaming_server import Server, running
from vllm_compress.cli import main
from vllm_compress.operations.abtest.replay import replay

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
