"""A file of seeds: every line of a .jsonl an object with the question in one of these forms

    prompt               text
    messages             a chat; where an assistant speaks last, that is the known answer
    instruction, input   Alpaca's; input may be left out

and the known answer, where there is one, in one of `answer`, `output` and `completion`: text, or a
number. Anything else is kept for a function of the user's to read. Empty lines are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_methods.calibration.text import jsonl_rows
from compress_methods.errors import CompressError
from compress_methods.system.user_file import require_path

QUESTIONS = ("prompt", "messages", "instruction")
ANSWERS = ("answer", "output", "completion")
ROLES = ("system", "user", "assistant")
Message = dict[str, str]


class SeedsError(CompressError):
    """A file of seeds that cannot be used."""


@dataclass(frozen=True)
class Seed:
    """One line of the file. `messages` end with the user; `row` is the line as it stands."""

    line: int
    where: str
    messages: tuple[Message, ...]
    answer: str | None
    row: Mapping[str, Any]

    @property
    def question(self) -> str:
        """What the user says last."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Seeds:
    """Those that differ in their questions, and how many lines repeat one."""

    seeds: list[Seed]
    repeated: int


def read_seeds(path: Path) -> Seeds:
    """All seeds of a file; raises a `CompressError` naming file and line."""
    require_path(path, SeedsError)
    if path.suffix != ".jsonl":
        raise SeedsError(f"{path}: ends in {path.suffix or 'nothing'!r}, expected .jsonl")
    if not path.is_file():
        raise SeedsError(f"{path}: no such file")
    found: dict[str, Seed] = {}
    lines = 0
    for where, row in jsonl_rows(path):
        seed = read_seed(row, where)
        lines += 1
        found.setdefault(json.dumps(seed.messages), seed)
    if not found:
        raise SeedsError(f"{path}: holds no seed")
    return Seeds(list(found.values()), lines - len(found))


def read_seed(row: Any, where: str) -> Seed:
    """The seed that a line's JSON value is; `where` is `path:line`."""
    if not isinstance(row, Mapping):
        raise SeedsError(f"{where}: expected an object, found {type(row).__name__}")
    _check_text(row, where)
    kind = _only(row, QUESTIONS, where, "a question")
    if kind is None:
        raise SeedsError(
            f"{where}: found the keys {_keys(row)}, expected one of {', '.join(QUESTIONS)}"
        )
    messages, answer = _question(row, kind, where)
    key = _only(row, ANSWERS, where, "an answer")
    if key is not None:
        if answer is not None:
            raise SeedsError(f"{where}: {key} is an answer, and messages end with another")
        answer = _answer(row[key], key, where)
    return Seed(int(where.rpartition(":")[2]), where, messages, answer, row)


def _question(
    row: Mapping[str, Any], kind: str, where: str
) -> tuple[tuple[Message, ...], str | None]:
    """The messages up to the user's last, and the answer behind them."""
    if kind != "messages":
        text = _text(row[kind], kind, where)
        if kind == "instruction" and row.get("input") not in (None, ""):
            text += "\n\n" + _text(row["input"], "input", where)
        return ({"role": "user", "content": text},), None
    messages = row[kind]
    if not isinstance(messages, list) or not messages:
        raise SeedsError(f"{where}: messages is {_short(messages)}, expected a list of messages")
    read = [_message(message, f"messages[{i}]", where) for i, message in enumerate(messages)]
    answer = read.pop()["content"] if read[-1]["role"] == "assistant" else None
    if not read or read[-1]["role"] != "user":
        raise SeedsError(f"{where}: messages has no question, expected one of the role user")
    return tuple(read), answer


def _message(message: Any, key: str, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise SeedsError(
            f"{where}: {key} is {_short(message)}, expected an object with role and content"
        )
    role = message.get("role")
    if role not in ROLES:
        raise SeedsError(
            f"{where}: {key}.role is {_short(role)}, expected one of {', '.join(ROLES)}"
        )
    content = _text(message.get("content"), f"{key}.content", where)
    return {"role": role, "content": content}


def _answer(value: Any, key: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise SeedsError(f"{where}: {key} is {_short(value)}, expected text or a number")
    return _text(str(value), key, where)


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise SeedsError(f"{where}: {key} is {_short(value)}, expected text")
    return value


def _only(row: Mapping[str, Any], keys: tuple[str, ...], where: str, what: str) -> str | None:
    """The one of some keys that a line has; None where it has none."""
    found = [key for key in keys if row.get(key) is not None]
    if len(found) > 1:
        raise SeedsError(f"{where}: {' and '.join(found)} are both {what}, expected one of them")
    return found[0] if found else None


def _check_text(row: Mapping[str, Any], where: str) -> None:
    """Refuse what could neither be sent nor written."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as problem:
        half = ascii(problem.object[problem.start])
        raise SeedsError(f"{where}: half a character ({half}), expected text") from None
    except RecursionError:
        raise SeedsError(f"{where}: nested too deep") from None


def _keys(row: Mapping[str, Any]) -> str:
    return _short(", ".join(row)) if row else "(none)"


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:60] + "…"
