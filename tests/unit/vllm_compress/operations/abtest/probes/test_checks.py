"""Each check tells a right answer from a wrong one; each probe file has what its check reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from compress_methods.errors import CompressError
from vllm_compress.operations.abtest.probes.checks import CHECKS
from vllm_compress.operations.abtest.probes.files import KINDS, read_probes
from vllm_compress.operations.abtest.replay.client import Answer

CALL = {"name": "set_alarm", "arguments": {"hour": 6, "minute": 30}}
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer"}},
    "required": ["age"],
    "additionalProperties": False,
}
GERMAN = {"words": ["der", "die", "das", "und", "ist"]}


def called(name: str, arguments: str) -> Answer:
    return Answer(tool_calls=({"name": name, "arguments": arguments},))


@pytest.mark.parametrize(
    ("kind", "expect", "right", "wrong"),
    [
        (
            "tools",
            CALL,
            [called("set_alarm", '{"minute": 30, "hour": 6}')],
            [
                called("set_alarm", '{"hour": 6, "minute": 31}'),
                called("set_alarm", '{"hour": 6, "minute": 30'),
                called("get_alarm", '{"hour": 6, "minute": 30}'),
                called("set_alarm", "[]"),
                Answer(text='set_alarm {"hour": 6, "minute": 30}'),
            ],
        ),
        (
            "json",
            SCHEMA,
            ['{"age": 3}', 'Here:\n```json\n{"age": 3}\n```'],
            ['{"age": "3"}', '{"age": 3, "name": "x"}', '{"age": 3', "null", ""],
        ),
        ("refusals", True, ["I'm sorry, but no.", "I can’t help."], ["Sure: first", "", " \n"]),
        ("refusals", False, ["Soak the lentils. I can do it."], ["I cannot help with that.", ""]),
        ("language", GERMAN, ["Das ist der Grund."], ["This is the reason.", "", "der the"]),
        (
            "language",
            {"script": "CYRILLIC"},
            ["Потому что (NaCl) соль"],
            ["Because", "Да, because"],
        ),
        (
            "code",
            "f",
            ["def f(x):\n    return x", "So:\n```python\nasync def f():\n    pass\n```\nDone."],
            ["def f(x) return x", "def g(x):\n    return x", "", "f\0"],
        ),
        ("length", [2, 3], ["one two", "one two three"], ["one", "one two three four", ""]),
        ("needle", ["7351"], ["It is 7351."], ["It is 7531.", ""]),
        ("turns", ["nine", "9"], ["Platform Nine", "9"], ["eight", ""]),
    ],
)
def test_a_check_tells_right_from_wrong(
    kind: str, expect: Any, right: list[Any], wrong: list[Any]
) -> None:
    for answers, found in ((right, True), (wrong, False)):
        for answer in answers:
            said = answer if isinstance(answer, Answer) else Answer(text=answer)
            assert CHECKS[kind](expect, said) is found, said


def test_reasoning_is_no_answer() -> None:
    for kind, expect in (("needle", ["7351"]), ("refusals", True), ("length", [1, 9])):
        assert not CHECKS[kind](expect, Answer(reasoning="I'm sorry: 7351", finish="length"))


def test_every_kind_ships_probes_with_what_its_check_reads() -> None:
    probes = read_probes("all")
    assert probes.kinds == KINDS
    for kind in KINDS:
        count = sum(probe.kind == kind for probe in probes.asked) or len(probes.choices)
        assert count >= 20, kind  # fewer are not judged
    for probe in probes.asked:
        assert CHECKS[probe.kind](probe.expect, Answer(text="?")) in (True, False)
        if probe.kind == "json":
            Draft202012Validator.check_schema(probe.expect)
        if probe.kind == "tools":
            offered = {tool["function"]["name"]: tool for tool in probe.prompt.extra["tools"]}
            schema = offered[probe.expect["name"]]["function"]["parameters"]
            Draft202012Validator(schema).validate(probe.expect["arguments"])
    keys = [probe.key for probe in probes.asked] + [choice.key for choice in probes.choices]
    assert len(set(keys)) == len(keys)


def test_a_needle_lies_at_every_depth() -> None:
    places = []
    for probe in read_probes("needle").asked:
        assert probe.prompt.messages is not None
        text = probe.prompt.messages[0]["content"]
        body = text.rpartition("\n\n")[0]
        places.append(round(4 * body.casefold().index(probe.expect[0]) / len(body)))
    assert sorted(places) == sorted([0, 1, 2, 3, 4] * 4)  # quarters of the text


def test_kinds_are_named_and_others_refused() -> None:
    assert read_probes(None).kinds == ()
    assert read_probes("json, tools").kinds == ("tools", "json")
    with pytest.raises(CompressError, match="--probes: no kind 'tool'; did you mean 'tools'"):
        read_probes("tool")
    assert json.dumps(read_probes("tools").asked[0].prompt.extra)
