"""Rows of text files in the forms that data sets have: plain text, chats, instructions.

    {"text": "..."}
    {"messages": [{"role": "user", "content": "..."}]}        OpenAI's; content may be parts,
                                                              "tools" beside it are rendered, too
    {"conversations": [{"from": "human", "value": "..."}]}    ShareGPT's
    {"instruction": "...", "input": "...", "output": "..."}   Alpaca's, as one text
    {"prompt": "...", "completion": "..."}                    as one text

The first of them that a row has counts. Content that is no text, such as pictures, is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress_methods.errors import CalibrationError

KINDS = (
    ("messages",),
    ("conversations",),
    ("text",),
    ("instruction", "output"),
    ("prompt", "completion"),
)
COLUMNS = (*(key for kind in KINDS for key in kind), "input", "tools")
OTHERS = "conversations, instruction and output, prompt and completion"
EXPECTED = f"text, messages, {OTHERS}"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""ShareGPT's senders as roles of a chat template."""
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


@dataclass(frozen=True)
class Chat:
    """Messages whose contents are texts, and descriptions of the tools they may call."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


def read_row(row: Any, where: str) -> str | Chat:
    """A row's text, or its chat; `CalibrationError`."""
    if not isinstance(row, Mapping):
        raise CalibrationError(f"{where}: expected an object, found {type(row).__name__}")
    kind = next((k for k in KINDS if all(row.get(key) is not None for key in k)), None)
    if kind is None:
        kind = next((k for k in KINDS if set(k) <= row.keys()), None)
        if kind is None:
            raise CalibrationError(f"{where}: has neither text nor messages (nor {OTHERS})")
        return ""
    if kind == ("messages",):
        return Chat(_messages(row["messages"], where), _tools(row.get("tools"), where))
    if kind == ("conversations",):
        return Chat(_conversation(row["conversations"], where), _tools(row.get("tools"), where))
    if kind == ("instruction", "output"):
        parts = [_text(row.get(key), key, where) for key in ("instruction", "input", "output")]
        return "\n\n".join(part for part in parts if part.strip())
    return "".join(_text(row[key], key, where) for key in kind)


def _text(value: Any, key: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: {key} is {type(value).__name__}, expected a string")
    return value


def _messages(messages: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not all(
        isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages
    ):
        raise CalibrationError(f"{where}: messages is not a list of objects with role and content")
    return [_message(m, where) for m in messages]


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message as templates take it: tables give every message the keys of all, with None, and
    APIs give arguments of calls as JSON where templates expect the mapping."""
    found = {key: value for key, value in message.items() if value is not None}
    found["content"] = _content(message["content"], where)
    if isinstance(found.get("tool_calls"), list):
        found["tool_calls"] = [_call(call) for call in found["tool_calls"]]
    return found


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = _json(function.get("arguments"))
    return {**call, "function": {**function, "arguments": arguments}}


def _json(value: Any) -> Any:
    """What a text says as JSON; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _tools(value: Any, where: str) -> list[Any] | None:
    """Descriptions of tools, which data sets also hold as JSON."""
    found = _json(value)
    if found is not None and found != "" and not isinstance(found, list):
        raise CalibrationError(f"{where}: tools is {type(found).__name__}, expected a list")
    return found or None


def _content(content: Any, where: str) -> str:
    """What a message says: templates would print a list of parts, or None, as Python does."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        raise CalibrationError(
            f"{where}: content is {type(content).__name__}, expected a string or a list of parts"
        )
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif not isinstance(part, Mapping):
            raise CalibrationError(f"{where}: a part of content is {type(part).__name__}")
        elif part.get("type", "text") in TEXT_PARTS:
            said = part.get("text", part.get("refusal"))
            texts.append(_text(said, "text of a part", where))
    return "".join(texts)


def _conversation(turns: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(turns, list) or not all(
        isinstance(t, Mapping) and {"from", "value"} <= t.keys() for t in turns
    ):
        raise CalibrationError(
            f"{where}: conversations is not a list of objects with from and value"
        )
    found = []
    for turn in turns:
        if not isinstance(turn["from"], str) or turn["from"] not in ROLES:
            known = ", ".join(ROLES)
            raise CalibrationError(
                f"{where}: from is {turn['from']!r:.80}, expected one of {known}"
            )
        found.append({"role": ROLES[turn["from"]], "content": _content(turn["value"], where)})
    return found
