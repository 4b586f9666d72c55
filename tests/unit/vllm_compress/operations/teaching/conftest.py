"""A teacher that adds numbers, seeds, and the command that asks it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.vllm_compress.operations.teaching.openai_server import Server, running
from vllm_compress.cli import main
from vllm_compress.operations.teaching import teacher

COUNT = 20


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(teacher, "LONGEST_WAIT", 0.1)
    monkeypatch.setattr(teacher, "TRIES", 4)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def add(question: str, number: int) -> str:
    """The sum that a question ends with."""
    a, b = re.findall(r"(\d+) and (\d+)", question)[-1]
    return f"I add {a} and {b}.\nAnswer: {int(a) + int(b)}"


@pytest.fixture
def server() -> Iterator[Server]:
    with running(Server(add)) as started:
        yield started


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    """Sums with their answers."""
    path = tmp_path / "seeds.jsonl"
    rows = [{"prompt": f"Add {i} and {i * 7}.", "answer": i * 8} for i in range(COUNT)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Teach:
    """The command with its usual arguments; `error` is what it printed on stderr."""

    def __init__(self, out: Path, seeds: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.out, self.seeds, self.capsys = out, seeds, capsys
        self.error = ""

    def arguments(self, server: Server | str, style: str, *more: object) -> list[str]:
        url = server.url if isinstance(server, Server) else server
        usual = ["--seeds", str(self.seeds), "-o", str(self.out), "--json", "--quiet"]
        return ["teach", url, *usual, "--style", style, *map(str, more)]

    def __call__(self, server: Server | str, style: str, *more: object) -> dict[str, Any]:
        """Run, expecting success; what it prints."""
        code = main(self.arguments(server, style, *more))
        printed, self.error = self.capsys.readouterr()
        assert code == 0, self.error
        found: dict[str, Any] = json.loads(printed)
        return found

    def fails(self, server: Server | str, style: str, *more: object) -> str:
        """Run, expecting one line and exit code 2; the line."""
        assert main(self.arguments(server, style, *more)) == 2
        printed, self.error = self.capsys.readouterr()
        assert printed == ""
        assert self.error.count("\n") == 1, self.error
        return self.error

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.read_text().splitlines()]

    @property
    def journal(self) -> Path:
        return self.out.with_name(self.out.name + ".journal") / "journal.jsonl"


@pytest.fixture
def teach(tmp_path: Path, seeds: Path, capsys: pytest.CaptureFixture[str]) -> Teach:
    return Teach(tmp_path / "data.jsonl", seeds, capsys)
