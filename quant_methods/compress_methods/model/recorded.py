"""How a model calls its blocks: recorded once, and whether one recording serves all sequences."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress_methods.errors import CalibrationError


@dataclass
class Call:
    """How the model calls one block, apart from the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def narrowed(self, recorded: int, count: int) -> Call:
        """The call for `count` sequences, where it was made for `recorded`: which ones does not
        matter, they are all called alike."""

        def first(value: Any) -> Any:
            if isinstance(value, Tensor):
                many = value.dim() > 1 and len(value) == recorded > 1
                return value[:count] if many else value
            if isinstance(value, Mapping):
                return {key: first(item) for key, item in value.items()}
            if isinstance(value, (tuple, list)):
                return type(value)(map(first, value))
            return value

        if count >= recorded:
            return self
        return Call(first(self.args), first(self.kwargs))


def require_same_calls(first: Sequence[Call], second: Sequence[Call]) -> None:
    """Raise `CalibrationError` where blocks were called with other values for other tokens.

    Blocks that see the tokens once more (per-layer embeddings, the embedded input again) can't be
    run from recorded arguments.
    """
    seen: set[tuple[int, int]] = set()
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        before, after = dict(_tensors(a)), dict(_tensors(b))
        for name, old in before.items():
            new = after.get(name)
            if new is not None and (id(old), id(new)) in seen:
                continue
            if new is None or not _same(old, new):
                raise CalibrationError(
                    f"block {index} is given {name!r}, which depends on the tokens; such models "
                    "cannot be calibrated block by block: use rtn or magnitude and held_out: 0"
                )
            seen.add((id(old), id(new)))


def _tensors(call: Call) -> Iterator[tuple[str, Tensor]]:
    """Every tensor among the arguments, with a name."""

    def walk(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                yield from walk(f"{name}.{key}", item)
        elif isinstance(value, (tuple, list)):
            for i, item in enumerate(value):
                yield from walk(f"{name}[{i}]", item)

    for i, value in enumerate(call.args, 1):
        yield from walk(f"argument {i}", value)
    for name, value in call.kwargs.items():
        yield from walk(name, value)


def _same(old: Tensor, new: Tensor) -> bool:
    """Equal values; a last, smaller batch is held against as many sequences of the first."""
    if old.is_meta or new.is_meta:
        return False
    if old.shape != new.shape and old.dim() and old.shape[1:] == new.shape[1:]:
        count = min(len(old), len(new))
        old, new = old[:count], new[:count]
    return old.shape == new.shape and torch.equal(old, new)


def answers_besides(block: nn.Module, call: Call, states: Tensor) -> tuple[Any, ...] | None:
    """What a block answers after the hidden states, which are then the first of a tuple; None where
    it answers them alone. Found by running a copy of it on the meta device, where values cost
    nothing; a block that cannot run there is taken to answer a tensor."""
    empty = copy.deepcopy(block).to("meta")

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to("meta")
        if isinstance(value, (tuple, list)):
            return type(value)(map(moved, value))
        if isinstance(value, dict):
            return {key: moved(item) for key, item in value.items()}
        return value

    try:
        with torch.no_grad():
            out = empty(moved(states), *moved(call.args), **moved(call.kwargs))
    except Exception:
        return None
    return tuple(out[1:]) if isinstance(out, tuple) else None
