"""budget: how much a packing may take, where its rules leave the format open.

    modules: [{match: blocks, format: [w2, w3, w4, w8], algorithm: gptq}]
    budget: {bits: 3.5}       # or {size: 4.2GB}, {size: 60%}, {kl: 0.01}

`bits`: mean bits a weight of all compressed matrices, scales and zero points among them. `size`:
bytes of all tensors of the result, in decimal (`GB`) or binary (`GiB`) units, or a share of those
that go in. `kl`: the smallest result whose KL to what goes in, on held-out text, is no more nats a
token; `search/prune_to.py` looks for it. How formats are then chosen: `passes/allocation.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from compress_methods.errors import RecipeError
from compress_methods.registry import build_dataclass

UNITS = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(\S+)")
KEYS = ("bits", "size", "kl")


@dataclass(frozen=True)
class Budget:
    """One of the three; see the module."""

    bits: float | None = None
    size: str | int | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        given = [key for key in KEYS if getattr(self, key) is not None]
        if len(given) != 1:
            raise RecipeError(f"expected one of {', '.join(KEYS)}, found {given or 'none'}")
        for key in ("bits", "kl"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise RecipeError(f"{key} is {value}, expected more than 0")
        if self.size is not None:
            self._size(1)

    def packed(self, *, weights: int, besides: int, original: int) -> int | None:
        """Bytes that all compressed matrices may take together; None where KL decides.

        `weights` are theirs, `besides` the bytes of all other tensors, `original` what goes in.
        """
        if self.bits is not None:
            return int(self.bits * weights / 8)
        return None if self.size is None else self._size(original) - besides

    def _size(self, original: int) -> int:
        if isinstance(self.size, int):
            if self.size > 0:
                return self.size
        elif self.size is not None and (found := SIZE.fullmatch(self.size.strip())):
            if found[2] == "%" and 0 < float(found[1]) <= 100:
                return int(float(found[1]) / 100 * original)
            if found[2] in UNITS:
                return int(float(found[1]) * UNITS[found[2]])
        raise RecipeError(
            f"size is {self.size!r}, expected bytes such as 4.2GB or 350MiB, or a share such as 60%"
        )

    def to_dict(self) -> dict[str, Any]:
        """As a recipe has it."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def parse_budget(block: Mapping[str, Any], where: str) -> Budget | None:
    """The `budget:` of a recipe's mapping; raises `RecipeError`."""
    if "budget" not in block:
        return None
    found = build_dataclass(Budget, block["budget"], f"{where}: budget", RecipeError)
    return cast(Budget, found)
