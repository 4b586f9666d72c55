"""import: a checkpoint that another tool quantized, re-packed without loss.

The recipe writes itself: each matrix goes to the format that its layout says holds it exactly,
widened where vLLM runs several as one, with smaller groups where tensor parallelism would cut them.
What no format holds is named; whoever imports says what becomes of it: refused, unpacked in 16
bits, or rounded to 8 bits in groups of 32 columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_methods.checkpoint.compressed import read_json
from compress_methods.checkpoint.interchange import DecodedEntry
from compress_methods.checkpoint.interchange.parts.recast import common
from compress_methods.checkpoint.loading.tied import open_skeleton
from compress_methods.checkpoint.source import Source, name_of, open_source, resolve_model
from compress_methods.conversion.planning.fit import NUMBER, why_unfit
from compress_methods.errors import CheckpointError, RecipeError
from compress_methods.formats import Format
from compress_methods.formats.integer import Integer
from compress_methods.formats.wrappers.smaller_group import smaller_groups
from compress_methods.model.skeleton import Skeleton
from compress_methods.model.slot import Slot

REFUSE, UNPACK, ROUND = INEXACT = ("refuse", "bfloat16", "int8")
ROUNDED = Integer(8, 32)
MOST_NAMED = 3
NONE_EXACT = "no format holds its numbers exactly"


@dataclass(frozen=True)
class Imported:
    """What becomes of a checkpoint's matrices: the format of each that one holds exactly, and why
    no format holds the others."""

    exact: Mapping[str, Format]
    inexact: Mapping[str, str]


def import_recipe(
    model: str | Path, inexact: str = REFUSE, ways: int = 1, allow_pickle: bool = False
) -> dict[str, Any]:
    """The recipe that re-packs a checkpoint for `ways` ranks; `CheckpointError` where nothing in it
    is quantized by another tool, or something is not held exactly and `inexact` is `refuse`."""
    if inexact not in INEXACT:
        raise RecipeError(f"inexact is {inexact!r}, expected one of {', '.join(INEXACT)}")
    directory = resolve_model(model, allow_pickle)
    if not read_json(directory / "config.json").get("quantization_config"):
        raise CheckpointError(f"{model}: is not quantized; convert it with a recipe")
    skeleton = open_skeleton(directory, allow_pickle)
    source = open_source(directory, skeleton, name_of(model), allow_pickle)
    found = _survey(source, skeleton, ways)
    if found.inexact and inexact == REFUSE:
        raise CheckpointError(f"{model}: {_named(found.inexact)}; --inexact says what to do")
    if not found.exact and inexact != ROUND:
        raise CheckpointError(
            f"{model}: {NONE_EXACT}; --inexact int8, or `convert` with a recipe, rounds them"
        )
    return _recipe(found, skeleton, ways, inexact == ROUND)


def _survey(source: Source, skeleton: Skeleton, ways: int) -> Imported:
    exact: dict[str, Format] = {}
    inexact: dict[str, str] = {}
    groups: dict[str, list[Slot]] = defaultdict(list)
    for slot in skeleton.slots.values():
        if isinstance(_entry(source, slot), DecodedEntry):
            groups[skeleton.architecture.group_name(slot.module)].append(slot)
    for slots in groups.values():
        formats = {slot.module: _format(source, slot) for slot in slots}
        held = [fmt for fmt in formats.values() if fmt is not None]
        shared = common(held) if len(held) == len(formats) else None
        fitting, why = _fitting(shared, slots, ways, skeleton)
        for slot in slots:
            if fitting is not None:
                exact[slot.module] = fitting
            else:
                inexact[slot.module] = why
    return Imported(exact, inexact)


def _entry(source: Source, slot: Slot) -> Any:
    held = slot.parameter in source.parts or slot.parameter in source.names
    return source.entries.get(source.tensor_of(slot)) if held else None


def _format(source: Source, slot: Slot) -> Format | None:
    entry = _entry(source, slot)
    assert isinstance(entry, DecodedEntry)
    return entry.format()


def _fitting(
    fmt: Format | None, slots: Iterable[Slot], ways: int, skeleton: Skeleton
) -> tuple[Format | None, str]:
    """The format, or the one with the largest smaller group, that all can be served in."""
    if fmt is None:
        return None, NONE_EXACT
    why = ""
    for each in (fmt, *smaller_groups(fmt)):
        reasons = (why_unfit(slot, each, ways, skeleton) for slot in slots)
        found = next((reason for reason in reasons if reason is not None), None)
        if found is None:
            return each, ""
        why = why or found
    return None, why


def _named(inexact: Mapping[str, str]) -> str:
    """What is not held, by name with `*` for numbers, and why."""
    reasons: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for module, why in inexact.items():
        reasons[why][NUMBER.sub("*", module)] += 1
    said = []
    for why, names in reasons.items():
        listed = ", ".join(list(names)[:MOST_NAMED])
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        said.append(f"{sum(names.values())} matrices ({listed}{more}): {why}")
    return "; ".join(said)


def _recipe(found: Imported, skeleton: Skeleton, ways: int, rounds: bool) -> dict[str, Any]:
    formats: dict[str, Format] = {}
    modules: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module, fmt in found.exact.items():
        name = _name(fmt, formats)
        modules[name, "repack"].append(module)
    for module in found.inexact if rounds else ():
        if why_unfit(skeleton.slots[module], ROUNDED, ways, skeleton) is None:
            modules[_name(ROUNDED, formats), "rtn"].append(module)
    return {
        "formats": {name: fmt.to_dict() for name, fmt in formats.items()},
        "modules": [
            {"match": matched, "format": name, "algorithm": algorithm, "on_unfit": "refuse"}
            for (name, algorithm), matched in modules.items()
        ],
        "calibration": {"held_out": 0},
    }


def _name(fmt: Format, formats: dict[str, Format]) -> str:
    """Of a format of the recipe, entered if it is new."""
    for name, other in formats.items():
        if other == fmt:
            return name
    name = fmt.describe().replace(" ", "-")
    while name in formats:
        name += "-also"
    formats[name] = fmt
    return name
