"""Sparse models to compare: each algorithm by itself, two passes instead of one, no blocks at all.

`Unstructured` and `two_passes` are references that exist for comparison alone: what fixing the
count in every block costs, and what choosing and rounding together wins.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress_methods import convert
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.formats import FORMATS
from compress_methods.formats.sparse import Sparse

ALGORITHMS = ("magnitude", "wanda", "sparsegpt", "alps")
DENSE = {"format": "dense", "dtype": "bfloat16"}
INT4 = {"format": "integer", "bits": 4, "group_size": 128}
FIFTY, TWO_FOUR, SEVENTY = (64, 128), (2, 4), (38, 128)


@dataclass(frozen=True)
class Unstructured(Sparse):
    """The same share of each row kept, wherever in the row."""

    name: ClassVar[str] = "unstructured"

    def select(self, scores: Tensor) -> Tensor:
        order = scores.argsort(dim=-1, descending=True, stable=True)
        places = order[:, : self.kept(scores.shape[1])]
        return scores.new_zeros(scores.shape, dtype=bool).scatter_(1, places, True)

    def _check_mask(self, mask: Tensor) -> None:
        assert bool((mask.sum(1) == self.kept(mask.shape[1])).all())


def sparse(
    pattern: tuple[int, int],
    algorithm: Any,
    values: Any = DENSE,
    kind: str = "sparse",
    **rule: Any,
) -> dict[str, Any]:
    """A recipe of n of every m weights in all blocks; `rule` adds to the rule for them. A `kind` of
    `unstructured` is known after `with_unstructured`."""
    n, m = pattern
    return {
        "formats": {"s": {"format": kind, "n": n, "m": m, "values": dict(values)}},
        "modules": [{"match": "blocks", "format": "s", "algorithm": algorithm, **rule}],
    }


def with_unstructured() -> None:
    """Make the format known to recipes of this process."""
    if Unstructured.name not in FORMATS:
        FORMATS.register(Unstructured)


def cases() -> list[tuple[str, Any]]:
    """Name and recipe of the rows that need no second pass."""
    with_unstructured()
    found = [(f"50% sparse, {name}", sparse(FIFTY, name)) for name in ALGORITHMS]
    found += [(f"2:4, {name}", sparse(TWO_FOUR, name)) for name in ALGORITHMS]
    found += [(f"70% sparse, {name}", sparse(SEVENTY, name)) for name in ALGORITHMS]
    for name in ("wanda", "alps"):
        free = sparse(FIFTY, name, kind="unstructured")
        found.append((f"50% of each row, {name}", free))
        divided = sparse(FIFTY, name, allocate="output_error")
        found.append((f"50% sparse, {name}, split", divided))
    found.append(("50% sparse, 4 bits, sparsegpt", sparse(FIFTY, "sparsegpt", INT4)))
    return found


def two_passes(
    model: Path,
    folder: Path,
    text: Path | None = None,
    calibration: dict[str, int] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """SparseGPT into a dense checkpoint with zeros, and the recipe that rounds what it kept."""
    packed, pruned = folder / "packed", folder / "pruned"
    first = sparse(FIFTY, "sparsegpt") | ({"calibration": calibration} if calibration else {})
    convert(model, first, packed, calibration=text, quiet=True)
    result = load_model(packed, torch.bfloat16)
    result.save_pretrained(pruned)
    shutil.rmtree(packed)
    for path in model.glob("tokenizer*"):
        shutil.copy(path, pruned)
    return pruned, sparse(FIFTY, "gptq", INT4)
