"""Whether a matrix can be stored in a format and served: what makes a recipe refused or, as its
`on_unfit` says, a module left as it is."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from compress_methods.checkpoint.interchange import Layout
from compress_methods.checkpoint.interchange.own import OWN
from compress_methods.checkpoint.row_order import check_order
from compress_methods.checkpoint.sharding import check_matrix
from compress_methods.errors import FormatError, RecipeError
from compress_methods.formats import Format
from compress_methods.model.skeleton import Skeleton
from compress_methods.model.slot import Slot
from compress_methods.model.vocabulary import why_not_served

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Unfit:
    """A matrix that cannot be packed; `keep`: its rule leaves it as it is then."""

    slot: Slot
    format_name: str
    why: str
    keep: bool


def why_unfit(
    slot: Slot, fmt: Format, ways: int, skeleton: Skeleton, layout: Layout = OWN
) -> str | None:
    """What stands against a matrix in a format over `ways` ranks, served by vLLM."""
    shape = (slot.rows, slot.cols)
    try:
        fmt.check_shape(*shape)
        check_matrix(slot.module, slot.kind, shape, fmt, ways, skeleton.architecture)
        if layout is OWN:
            check_order(slot.module, shape, fmt, skeleton.model.config)
    except FormatError as problem:
        return str(problem).removeprefix(f"{slot.module}: ")
    if layout is not OWN:
        return None if layout.holds(slot.kind) else f"{layout.name} holds no token table"
    if slot.module.rpartition(".")[2] in skeleton.architecture.unquantized:
        return "vLLM's class gives it no quantization method"
    beside = not slot.module.startswith(skeleton.tower) and slot.kind != "lm_head"
    if beside:
        return "what stands beside the language model is kept as it is"
    if skeleton.architecture.only_blocks and slot.kind != "blocks":
        return "vLLM's class keeps all that lies outside the blocks as it is"
    return why_not_served(slot.kind, skeleton.model, bool(skeleton.tied))


def fits(slot: Slot, fmt: Format, ways: int, skeleton: Skeleton, layout: Layout = OWN) -> bool:
    """Whether nothing stands against it."""
    return why_unfit(slot, fmt, ways, skeleton, layout) is None


def refuse(found: Iterable[Unfit]) -> None:
    """Raise one `RecipeError` that names every matrix that does not fit and must."""
    alike: dict[tuple[str, int, int, str, str], list[str]] = defaultdict(list)
    for each in found:
        if not each.keep:
            module = NUMBER.sub("*", each.slot.module)
            key = (module, each.slot.rows, each.slot.cols, each.why, each.format_name)
            alike[key].append(each.slot.module)
    if not alike:
        return
    said = []
    for (module, rows, cols, why, name), modules in alike.items():
        many = len(modules) > 1
        count = f", {len(modules)} modules" if many else ""
        said.append(
            f"{module if many else modules[0]} [{rows}, {cols}]: {why} (format {name!r}{count})"
        )
    raise RecipeError(
        f"{'; '.join(said)}; `on_unfit: keep` in the recipe leaves such as they are, `pad` adds "
        "columns of zeros where that helps"
    )


def kept(found: Iterable[Unfit], skeleton: Skeleton) -> dict[str, str]:
    """Modules to leave as they are, with the reason; neighbours that run as one go together."""
    reasons = {each.slot.module: each.why for each in found}
    out: dict[str, str] = {}
    for module, why in reasons.items():
        out[module] = why
        parent, _, leaf = module.rpartition(".")
        for other in skeleton.architecture.group(leaf):
            neighbour = f"{parent}.{other}" if parent else other
            if neighbour in skeleton.slots and neighbour not in {**reasons, **out}:
                out[neighbour] = f"runs as one with {leaf}, which stays: {why}"
    return out


def patterns(modules: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """(how many, bytes) by name with `*` for numbers."""
    found: dict[str, tuple[int, int]] = {}
    for module, size in modules.items():
        key = NUMBER.sub("*", module)
        count, total = found.get(key, (0, 0))
        found[key] = (count + 1, total + size)
    return found
