"""A parameter as the planner sees it, and what its values take."""

from __future__ import annotations

import re
from dataclasses import dataclass

ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


@dataclass(frozen=True)
class Tensor:
    """One parameter of a checkpoint: name, shape, bytes per value, of which packed ones take
    parts."""

    name: str
    shape: tuple[int, ...]
    itemsize: float


def itemsize_of(dtype: str) -> int:
    """Bytes of a value by the name that safetensors gives its dtype."""
    return ITEM_BYTES.get(dtype, 1)


def prefix_of(name: str) -> str:
    """Return what stands before the first number: a tensor's list of blocks, or nothing."""
    match = re.match(r"(.*?)\.\d+\.", name)
    return match.group(1) if match else ""


def leaf_of(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
