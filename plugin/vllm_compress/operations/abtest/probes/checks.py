"""Is this answer right? One check for each kind of probe, True or False.

    tools      one call, of the function expected, its arguments JSON and those expected; case and
               spaces around texts aside
    json       JSON (in a fence or not) that keeps the schema
    refusals   refused where that is right, and not where it is not
    language   the script that was asked in, or more of its small words than of English ones
    code       a fenced block, or all of it, that Python parses and that defines the function
    length     words within the bounds
    needle     what was hidden in a long text
    turns      what was said some turns before

Checks read what a user reads, never the reasoning. Fails where: a refusal is worded in a way that
`REFUSALS` has not, or in another language; then for A and B alike.
"""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from jsonschema import Draft202012Validator

from vllm_compress.operations.abtest.replay.client import Answer

Check = Callable[[Any, Answer], bool]
FENCE = re.compile(r"```[\w+-]*\n(.*?)```", re.DOTALL)
WORD = re.compile(r"[^\W\d_]+")
REFUSALS = re.compile(
    r"\b(I|we)('m| am| are)? ?(really |very )?(sorry|unable|not able|not going to|"
    r"can(no|')t|can not|won't|will not|must decline|decline|refuse)\b",
    re.IGNORECASE,
)
OPENING = 200
"""Characters in which a refusal says that it is one."""
ENGLISH = frozenset(
    ("the", "and", "of", "to", "is", "in", "that", "it", "for", "with", "are", "on", "this", "you")
)


def tool_call(expected: Mapping[str, Any], answer: Answer) -> bool:
    """`expected` has the `name` of a function and its `arguments`."""
    if len(answer.tool_calls) != 1:
        return False
    (call,) = answer.tool_calls
    arguments = _json(call["arguments"])
    return call["name"] == expected["name"] and _plain(arguments) == _plain(expected["arguments"])


def keeps_schema(expected: Mapping[str, Any], answer: Answer) -> bool:
    """`expected` is a JSON schema."""
    value = _json(_block(answer.text))
    return value is not None and Draft202012Validator(expected).is_valid(value)


def refuses(expected: bool, answer: Answer) -> bool:
    """Whether it refuses, or helps, as `expected`; nothing at all is neither."""
    if not answer.text.strip():
        return False
    return bool(REFUSALS.search(answer.text[:OPENING].replace("’", "'"))) == expected


def in_language(expected: Mapping[str, Any], answer: Answer) -> bool:
    """`expected` has a `script`, as Unicode names its letters, or the language's small `words`."""
    if script := expected.get("script"):
        letters = [unicodedata.name(c, "") for c in answer.text if c.isalpha()]
        return bool(letters) and 2 * sum(script in name for name in letters) > len(letters)
    words = [word.casefold() for word in WORD.findall(answer.text)]
    theirs = sum(word in expected["words"] for word in words)
    return theirs > sum(word in ENGLISH for word in words)


def parses(expected: str, answer: Answer) -> bool:
    """`expected` is the name of a Python function."""
    try:
        tree = ast.parse(_block(answer.text))
    except (SyntaxError, ValueError):
        return False
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return any(isinstance(node, kinds) and node.name == expected for node in ast.walk(tree))


def of_length(expected: list[int], answer: Answer) -> bool:
    """`expected` is the fewest and the most words."""
    least, most = expected
    return least <= len(answer.text.split()) <= most


def contains(expected: list[str], answer: Answer) -> bool:
    """`expected` are texts of which one has to be in the answer, in any case."""
    said = answer.text.casefold()
    return any(text.casefold() in said for text in expected)


CHECKS: dict[str, Check] = {
    "tools": tool_call,
    "json": keeps_schema,
    "refusals": refuses,
    "language": in_language,
    "code": parses,
    "length": of_length,
    "needle": contains,
    "turns": contains,
}


def _block(text: str) -> str:
    """What is in the first fence, or all."""
    found = FENCE.search(text)
    return (found.group(1) if found else text).strip()


def _json(text: str) -> Any:
    """The value; None where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _plain(value: Any) -> Any:
    """Without what nobody would call a difference."""
    if isinstance(value, str):
        return value.strip().casefold()
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value
