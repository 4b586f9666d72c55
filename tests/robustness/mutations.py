"""Inputs that are nearly what a reader expects."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator
from typing import Any

import yaml

SIGNS = b"{}[]:,-&*!|>'\"%@#? \t\n0"
NASTY: list[Any] = [
    None, True, "", "x" * 300, 0, -1, 10**60, 1e300, math.inf, math.nan, 0.5, [], {}, [[]], [None],
    {"a": {}}, {"": 1}, "re:", "re:(a+)+b", "re:(.*)*x", "re:(", "25%", "%", "search", "nan%",
    "\u0000", "ü\u2028", "../../x", "/", "~", "blocks", "1e400", "*", "!", "\ud800",
    {"format": []}, {"format": {"a": 1}}, {"algorithm": {}}, [{}], [[[[[[[1]]]]]]],
]  # fmt: skip
TEXTS = [
    b"", b"\x00", b"\xff\xfe", b"[" * 5000, b"{" * 5000, b"a: " + b"9" * 5000, b"a: 2020-01-01",
    b"a: !!binary aGk=", b"a: &a [*a]", b"&a {*a : 1}", b"- !!omap 3", b"a: !!int ''", b"a: *b",
    b"a: !!timestamp x", b"a: !!python/object:os.system x", b"a: !!bool zz", b"<<: 3",
    b"a: 1\na: 2",
    b"a: &a [x]\nb: &b [" + b"*a," * 9 + b"]\n", b'"\\ud800"', b'{"a": "\\ud800"}',
    b"? [1]\n: 2",
    b"[1,2" * 2000, b'{"a":' * 3000, b"9" * 5000, b"-" + b"9" * 4301, b"1e999",
    b"NaN", b"--- 1\n--- 2",
    b"\n".join(b"a%d: &a%d [%s]" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9) if i else b"x")
               for i in range(12)),
]  # fmt: skip


def mutations(
    originals: list[bytes], is_yaml: bool, chance: random.Random, count: int
) -> Iterator[bytes]:
    """`count` files: whole texts, changed bytes, changed values."""
    yield from TEXTS
    for number in range(count - len(TEXTS)):
        original = chance.choice(originals)
        if number % 2:
            yield changed_bytes(bytearray(original), chance)
            continue
        block = yaml.safe_load(original) if is_yaml else json.loads(original)
        for _ in range(chance.choice([1, 1, 2, 4])):
            block = changed_value(block, chance)
        text = yaml.safe_dump(block) if is_yaml and number % 4 else json.dumps(block)
        yield text.encode("utf-8", "surrogatepass")


def changed_bytes(data: bytearray, chance: random.Random) -> bytes:
    for _ in range(chance.choice([1, 1, 1, 3, 9])):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice([1, 1, 2, 9, 80]))
        kind = chance.randrange(5)
        if kind == 0:
            del data[at:end]
        elif kind == 1:
            data[at:at] = data[chance.randrange(len(data) + 1) :][: end - at]
        elif kind == 2 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 3:
            data[at:end] = bytes(
                chance.choice(b"{}[]:,-&*!|>'\"%@#? \t\n0") for _ in range(end - at)
            )
        else:
            del data[at:]
            data += b" "
    return bytes(data)


def changed_value(block: Any, chance: random.Random) -> Any:
    """One value, key or item of it replaced, added or taken out."""
    parent: Any = [copy.deepcopy(block)]
    box, at = parent, 0
    while isinstance(parent[at], (dict, list)) and parent[at] and chance.random() < 0.8:
        parent = parent[at]
        at = chance.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    kind = chance.randrange(6)
    if kind == 0 and parent is not box:
        del parent[at]
    elif kind == 1 and isinstance(parent, dict):
        parent[chance.choice(["", "x", "format", "transform", "match"])] = chance.choice(NASTY)
    else:
        parent[at] = copy.deepcopy(chance.choice(NASTY))
    return box[0]
