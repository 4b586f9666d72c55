"""What a value of a matrix takes in a checkpoint that another tool packed, by config.json alone.

    fp8                  a byte, a float32 for each block of `weight_block_size`, or for all
    awq, gptq            `bits`, for each group of columns a float16 and a zero point of `bits`;
                         gptq an int32 of every column besides
    compressed-tensors   `num_bits` of the group of `config_groups` that a module is in, and scales
    mxfp4                experts alone: four bits, a byte for each 32 columns
    bitsandbytes         four bits and a float32 for each 64 values, or a byte and one for each row

Kept are what lies outside the blocks, routers, and what the config says is not packed. A kind that
is not listed is refused in a line: a guess would be off by as much as four times.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_methods.errors import CheckpointError

if TYPE_CHECKING:
    from compress_methods.model.slot import Slot

KEPT = ("modules_to_not_convert", "llm_int8_skip_modules", "ignored_layers", "ignore")
PATTERN = "re:"
BYTE, HALF, FLOAT = 1.0, 2.0, 4.0
NESTED_GROUP, MICRO_GROUP = 64, 32


def value_bytes(block: Mapping[str, Any], slot: Slot, path: Path) -> float | None:
    """Bytes of a value of a matrix; None where it is kept. `CheckpointError` for a kind of
    `quantization_config` that is not known."""
    method = block.get("quant_method")
    known = {
        "fp8": _fp8,
        "awq": _grouped,
        "gptq": _grouped,
        "compressed-tensors": _schemes,
        "mxfp4": _microscaled,
        "bitsandbytes": _bitsandbytes,
    }
    if method not in known:
        raise CheckpointError(
            f"{path / 'config.json'}: quantized by {method!r}; without its files the bytes are "
            f"known of {', '.join(known)} alone"
        )
    if slot.kind not in ("blocks", "experts") or _is_kept(block, slot.module):
        return None
    return known[method](block, slot)


def _is_kept(block: Mapping[str, Any], module: str) -> bool:
    named = (name for key in KEPT for name in block.get(key) or ())
    return any(_names(name, module) for name in named)


def _names(name: str, module: str) -> bool:
    """Whether a pattern, a module's name or a part of one means this module."""
    if name.startswith(PATTERN):
        return re.match(name.removeprefix(PATTERN), module) is not None
    return f".{name}." in f".{module}."


def _fp8(block: Mapping[str, Any], slot: Slot) -> float:
    tall, wide = block.get("weight_block_size") or (slot.rows, slot.cols)
    scales = -(-slot.rows // tall) * -(-slot.cols // wide)
    return BYTE + FLOAT * scales / (slot.rows * slot.cols)


def _grouped(block: Mapping[str, Any], slot: Slot) -> float:
    bits, size = int(block["bits"]), _group(block.get("group_size"), slot.cols)
    places = FLOAT / slot.rows if block["quant_method"] == "gptq" else 0.0
    return bits / 8 + (HALF + bits / 8) / size + places


def _schemes(block: Mapping[str, Any], slot: Slot) -> float | None:
    """The scheme of the first group that has the module among its targets."""
    for group in (block.get("config_groups") or {}).values():
        weights = group.get("weights")
        targets: Iterable[str] = group.get("targets") or ("Linear",)
        if weights and any(t == "Linear" or _names(t, slot.module) for t in targets):
            size = _group(weights.get("group_size"), slot.cols)
            scale = BYTE if weights["num_bits"] == 4 and weights.get("type") == "float" else HALF
            zero = 0.0 if weights.get("symmetric", True) else weights["num_bits"] / 8
            return float(weights["num_bits"]) / 8 + (scale + zero) / size
    return None


def _microscaled(block: Mapping[str, Any], slot: Slot) -> float | None:
    return BYTE / 2 + BYTE / MICRO_GROUP if slot.kind == "experts" else None


def _bitsandbytes(block: Mapping[str, Any], slot: Slot) -> float:
    if block.get("load_in_4bit") or block.get("_load_in_4bit"):
        return BYTE / 2 + FLOAT / NESTED_GROUP
    return BYTE + FLOAT / slot.cols


def _group(size: Any, cols: int) -> int:
    return size if isinstance(size, int) and size > 0 else cols
