"""What the report says of probes beside its metrics: by kind, how many each server got right, how
many answers were none, why a server refused, and what A knew and B did not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from vllm_compress.operations.abtest.probes.files import CHOICES, Probe, Probes
from vllm_compress.operations.abtest.probes.run import PROBES, Records, right
from vllm_compress.operations.abtest.replay.client import Answer

EXAMPLES = 3
SHOWN = 600


def summarize(probes: Probes, records: Records) -> list[dict[str, Any]]:
    """One entry a kind. `refused` is how many each refused, `why` its words for most of them;
    `lost` A has right and B not, `gained` the other way round."""
    return [
        _choices(probes, records) if kind == CHOICES else _kind(kind, probes, records)
        for kind in probes.kinds
    ]


def _kind(kind: str, probes: Probes, records: Records) -> dict[str, Any]:
    asked = [probe for probe in probes.asked if probe.kind == kind]
    pairs = []
    for probe in asked:
        line = records[PROBES][probe.key]
        pairs.append((probe, Answer.from_dict(line["a"]), Answer.from_dict(line["b"])))
    found = [(right(probe, a), right(probe, b)) for probe, a, b in pairs]
    sides = {"a": [a for _, a, _ in pairs], "b": [b for _, _, b in pairs]}

    def count(what: str) -> dict[str, int]:
        return {side: sum(bool(getattr(x, what)) for x in sides[side]) for side in "ab"}

    reasons = {side: Counter(x.error for x in sides[side] if x.error) for side in "ab"}
    lost = [pair for pair, (a, b) in zip(pairs, found, strict=True) if a > b]
    return {
        "kind": kind,
        "asked": len(asked),
        "right": {side: round(sum(scores)) for side, scores in _sides(found).items()},
        "lost": len(lost),
        "gained": sum(a < b for a, b in found),
        "empty": count("empty"),
        "cut": count("cut"),
        "refused": count("error"),
        "why": {s: reasons[s].most_common(1)[0][0] if reasons[s] else "" for s in "ab"},
        "examples": [_example(*pair) for pair in lost[:EXAMPLES]],
    }


def _choices(probes: Probes, records: Records) -> dict[str, Any]:
    lines = [records[CHOICES][choice.key] for choice in probes.choices]
    known = {side: [line[side] is not None for line in lines] for side in "ab"}
    found = [
        tuple(float(line[side] is not None and line[side] > 0) for side in "ab") for line in lines
    ]
    lost = [choice for choice, (a, b) in zip(probes.choices, found, strict=True) if a > b]
    none = {"a": 0, "b": 0}
    refused = {side: known[side].count(False) for side in "ab"}
    return {
        "kind": CHOICES,
        "asked": len(lines),
        "right": {side: round(sum(scores)) for side, scores in _sides(found).items()},
        "lost": len(lost),
        "gained": sum(a < b for a, b in found),
        "empty": none,
        "cut": none,
        "refused": refused,
        "why": {s: "gives no log-probabilities of a prompt" if refused[s] else "" for s in "ab"},
        "examples": [
            {"ask": c.prompt, "where": c.key, "a": c.right, "b": c.wrong} for c in lost[:EXAMPLES]
        ],
    }


def _sides(found: list[Any]) -> Mapping[str, list[float]]:
    return {"a": [a for a, _ in found], "b": [b for _, b in found]}


def _example(probe: Probe, a: Answer, b: Answer) -> dict[str, Any]:
    asked = probe.prompt.messages or []
    ask = str(asked[-1].get("content", "")) if asked else ""
    return {
        "ask": ask[-SHOWN:],
        "where": probe.prompt.where.rpartition("/")[2],
        "a": (a.shown or a.error)[:SHOWN],
        "b": (b.shown or b.error)[:SHOWN],
    }


def told(entry: Mapping[str, Any]) -> list[str]:
    """What of a kind is no matter of right and wrong, a sentence each."""
    said = []
    for side in "ab":
        parts = [
            f"{entry[what][side]} {text}"
            for what, text in (("refused", "refused"), ("empty", "empty"), ("cut", "cut"))
            if entry[what][side]
        ]
        if parts:
            why = f" ({entry['why'][side]})" if entry["why"][side] else ""
            said.append(
                f"probes/{entry['kind']}: of {entry['asked']} answers of {side.upper()} "
                f"{', '.join(parts)}{why}"
            )
    return said
