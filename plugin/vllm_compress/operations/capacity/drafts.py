"""Drafts to plan with: which version of the model writes ahead, and how often it is right.

`DRAFT[=ACCEPTANCE]`: a recipe, whose result is not there yet, or the directory of a result; then a
share, or a file that has measured it: what `eval --json` printed, or the report.json of another
conversion. A directory's own report says it where something was held out. Measured is 1 - total
variation, that of sampling at temperature 1; greedy answers accept more. It is of the draft against
the original, and taken for compressed targets too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress_methods.errors import CompressError
from vllm_compress.operations.capacity.footprint.shapes import ModelShape, load_shape
from vllm_compress.operations.capacity.footprint.storage import Scheme, apply_recipe, as_it_is
from vllm_compress.operations.capacity.throughput.demand import DemandError, parse_share

OPTION, REPORT = "--draft", "report.json"


class DraftError(CompressError):
    """A draft that is none of this model, or nobody knows how good it is."""


def with_drafts(targets: Sequence[Scheme], asked: Sequence[str], shape: ModelShape) -> list[Scheme]:
    """Every target with every draft that is smaller; raises `DraftError`."""
    found = []
    for text in asked:
        draft, acceptance = _read(text, shape)
        smaller = [t for t in targets if draft.weight_bytes < t.weight_bytes]
        if not smaller:
            raise DraftError(f"{OPTION} {text}: no scheme that is planned is larger")
        for target in smaller:
            name, label = f"{target.name} + {draft.name}", f"{target.label} + {draft.label}"
            found.append(
                replace(target, name=name, label=label, draft=draft, acceptance=acceptance)
            )
    return found


def measured_acceptance(path: Path) -> float | None:
    """What a file or the report of a directory has measured; None where it has nothing."""
    try:
        text = (path / REPORT if path.is_dir() else path).read_text(encoding="utf-8")
        block: Any = json.loads(text)
        share = float(block.get("held_out", block)["acceptance"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return share if 0 <= share <= 1 else None


def _read(text: str, shape: ModelShape) -> tuple[Scheme, float]:
    name, _, said = text.partition("=")
    path = Path(name).expanduser()
    if path.is_dir():
        found = load_shape(name)
        if found.vocabulary != shape.vocabulary:
            raise DraftError(
                f"{OPTION} {name}: a vocabulary of {found.vocabulary:,}, {shape.name} has one of "
                f"{shape.vocabulary:,}"
            )
        draft = replace(as_it_is(found), name=path.resolve().name)
    else:
        draft = apply_recipe(shape, name)
    acceptance = measured_acceptance(path) if not said else _acceptance(said)
    if acceptance is None:
        what = said if said else f"{name} without =ACCEPTANCE"
        raise DraftError(
            f"{OPTION} {what}: no acceptance, expected {name}= a share such as 80%, or a file that "
            "`eval --json` or a conversion with held-out text wrote"
        )
    return draft, acceptance


def _acceptance(said: str) -> float | None:
    if Path(said).is_file():
        return measured_acceptance(Path(said))
    try:
        return parse_share(said, OPTION)
    except DemandError:
        return None
