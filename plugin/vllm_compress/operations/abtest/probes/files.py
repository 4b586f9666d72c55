"""Probe files: one kind of question each, and what a right answer has.

configs/probes/tools.yaml, json.yaml, refusals.yaml, language.yaml, code.yaml, length.yaml,
needle.yaml, turns.yaml
    max_tokens   for each answer
    request      what each request has beside its messages, such as `tools`
    probes       a list of
        ask      what the user says, or
        messages a chat
        expect   what the kind's check of `checks` wants
needle.yaml has besides
    filler       sentences of which the long text is made
    words        how long it is, a list of lengths
    depths       where the needle is, 0 the beginning and 1 the end
    and each of its probes a `needle`, put at each depth of each length
choices.yaml: `probes` of `prompt`, `right` and `wrong`
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_methods.errors import CompressError, nearest
from compress_methods.system.resources import config_path
from compress_methods.system.user_file import read_yaml
from vllm_compress.operations.abtest.probes.checks import CHECKS
from vllm_compress.operations.abtest.replay.prompts import Prompt

ALL = "all"
CHOICES, NEEDLE = "choices", "needle"
KINDS = (*CHECKS, CHOICES)
FOLDER = "probes"
KEYS = ("ask", "messages", "expect")


class ProbeError(CompressError):
    """Probes that do not exist or cannot be read."""


@dataclass(frozen=True)
class Probe:
    """A question of a kind, and what its check expects. `key` names all that is sent."""

    kind: str
    prompt: Prompt
    expect: Any
    key: str


@dataclass(frozen=True)
class Choice:
    """Two ways to go on after a prompt, of which one is right."""

    prompt: str
    right: str
    wrong: str
    key: str


@dataclass(frozen=True)
class Probes:
    """All that was asked for; `kinds` in the order of the report."""

    kinds: tuple[str, ...] = ()
    asked: tuple[Probe, ...] = ()
    choices: tuple[Choice, ...] = ()


def read_probes(text: str | None) -> Probes:
    """`all`, or kinds such as `tools,json`; raises `ProbeError`."""
    names = [name.strip() for name in text.split(",")] if text else []
    for name in names:
        if name not in (ALL, *KINDS):
            raise ProbeError(f"--probes: no kind {name!r}; {nearest(name, [ALL, *KINDS])}")
    kinds = tuple(kind for kind in KINDS if kind in names or ALL in names)
    asked = [probe for kind in kinds if kind != CHOICES for probe in _read(kind)]
    choices = tuple(_choices()) if CHOICES in kinds else ()
    return Probes(kinds, tuple(asked), choices)


def _file(kind: str) -> tuple[Path, dict[str, Any]]:
    path = config_path(FOLDER, f"{kind}.yaml")
    found = read_yaml(path, ProbeError)
    if not isinstance(found, dict) or not isinstance(found.get("probes"), list):
        raise ProbeError(f"{path}: has no list `probes`")
    return path, found


def _read(kind: str) -> Iterator[Probe]:
    path, found = _file(kind)
    rows = _hidden(found) if kind == NEEDLE else found["probes"]
    extra = found.get("request", {})
    for number, row in enumerate(rows, 1):
        where = f"{path}: probe {number}"
        try:
            messages = row.get("messages") or [{"role": "user", "content": row["ask"]}]
            expect, limit = row["expect"], found["max_tokens"]
        except (KeyError, AttributeError) as problem:
            raise ProbeError(f"{where}: expected `ask` or `messages`, and `expect`") from problem
        # As a comma in a text without quotes makes of it.
        if unknown := [key for key in row if key not in KEYS]:
            raise ProbeError(f"{where}: unknown key {unknown[0]!r:.80}, expected {', '.join(KEYS)}")
        prompt = Prompt(where, None, messages, limit, row, extra)
        yield Probe(kind, prompt, expect, _key([kind, messages, limit, extra]))


def _hidden(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every needle at every depth of a text of every length."""
    for words, row, depth in itertools.product(found["words"], found["probes"], found["depths"]):
        sentences: list[str] = []
        supply = itertools.cycle(found["filler"])
        length = 0
        while length < words:
            sentences.append(next(supply))
            length += len(sentences[-1].split())
        sentences.insert(round(depth * len(sentences)), row["needle"])
        ask = f"{' '.join(sentences)}\n\n{row['ask']}"
        yield {"ask": ask, "expect": row["expect"]}


def _choices() -> Iterator[Choice]:
    path, found = _file(CHOICES)
    for number, row in enumerate(found["probes"], 1):
        try:
            prompt, right, wrong = (str(row[name]) for name in ("prompt", "right", "wrong"))
        except (KeyError, TypeError) as problem:
            raise ProbeError(
                f"{path}: probe {number}: expected `prompt`, `right` and `wrong`"
            ) from problem
        yield Choice(prompt, right, wrong, _key([CHOICES, prompt, right, wrong]))


def _key(sent: Any) -> str:
    return hashlib.sha256(json.dumps(sent, sort_keys=True).encode()).hexdigest()[:16]
