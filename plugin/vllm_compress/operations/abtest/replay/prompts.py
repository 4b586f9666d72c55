"""A file of prompts: every line of a .txt, or every line of a .jsonl as an object with

    prompt       text to continue, or
    messages     a chat, which goes through the server's own chat template
    max_tokens   optional: tokens to generate for this one
    answer       optional: what the output is scored against

and anything else, which a scorer of the user's may want to read. Empty lines are skipped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress_methods.calibration.text import decode, jsonl_rows
from compress_methods.errors import CompressError


class PromptsError(CompressError):
    """A file of prompts that cannot be used."""


@dataclass(frozen=True)
class Prompt:
    """One line of the file; `text` or `messages` is None. `extra` is sent beside it."""

    where: str
    text: str | None
    messages: list[dict[str, Any]] | None
    max_tokens: int
    row: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """For people: the text, or the chat's last message."""
        if self.messages is None:
            return self.text or ""
        content = self.messages[-1]["content"]
        return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def read_prompts(path: Path, max_tokens: int) -> list[Prompt]:
    """All prompts of a file, `max_tokens` for those that do not say; raises `PromptsError`."""
    if path.suffix not in (".txt", ".jsonl"):
        raise PromptsError(f"{path}: ends in {path.suffix or 'nothing'!r}, expected .txt or .jsonl")
    if not path.is_file():
        raise PromptsError(f"{path}: no such file")
    if path.suffix == ".txt":
        lines = enumerate(path.read_bytes().splitlines(), 1)
        rows = [(f"{path}:{n}", {"prompt": decode(line, f"{path}:{n}")}) for n, line in lines]
        rows = [(where, row) for where, row in rows if row["prompt"].strip()]
    else:
        rows = list(jsonl_rows(path))
    if not rows:
        raise PromptsError(f"{path}: holds no prompt")
    return [_prompt(row, where, max_tokens) for where, row in rows]


def digest_prompts(prompts: list[Prompt]) -> str:
    """Hash what is sent for these prompts. Answers and notes beside them are left out: they
    may be corrected after a replay."""
    sent = [[p.text, p.messages, p.max_tokens] for p in prompts]
    return hashlib.sha256(json.dumps(sent).encode()).hexdigest()


def _prompt(row: Any, where: str, max_tokens: int) -> Prompt:
    if not isinstance(row, Mapping):
        raise PromptsError(f"{where}: expected an object, found {type(row).__name__}")
    if ("prompt" in row) == ("messages" in row):
        found = "both" if "prompt" in row else "neither"
        raise PromptsError(f"{where}: expected one of prompt and messages, found {found}")
    limit = row.get("max_tokens", max_tokens)
    if type(limit) is not int or limit < 1:
        raise PromptsError(f"{where}: max_tokens is {limit!r}, expected a number from 1")
    if "messages" in row:
        return Prompt(where, None, _messages(row["messages"], where), limit, row)
    text = row["prompt"]
    if not isinstance(text, str) or not text.strip():
        raise PromptsError(f"{where}: prompt is {text!r}, expected text")
    return Prompt(where, text, None, limit, row)


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in value)
    ):
        raise PromptsError(f"{where}: messages is not a list of objects with role and content")
    return [dict(message) for message in value]
