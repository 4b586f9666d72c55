"""What checkpoints call the parameters of transformers' model.

transformers renames tensors while it loads them, and stacks those of single experts into one
parameter; or it divides a tensor by rows into several. Its own mapping says how; read backwards, it
says what lies on the disk. What it does besides (permuting) is left alone: such a tensor has no
other name here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

EXPERT = "*"
"""Stands for an expert's number in the names of a stacked parameter's matrices."""


class StoredNames:
    """Names by parameter, for one model."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter

        mapping = get_model_conversion_mapping(model, add_legacy=False)
        # What was loaded last is undone first. Whether a prefix was there no model can tell.
        dropped = [step.prefix_to_remove for step in mapping if isinstance(step, PrefixChange)]
        self.prefixes = tuple(f"{prefix}." for prefix in dropped if prefix)
        undone = [step for step in reversed(mapping) if not isinstance(step, PrefixChange)]
        self._renamings = [
            step.reverse_transform() for step in undone if not isinstance(step, WeightConverter)
        ]
        self._converters = [
            (step.reverse_transform(), _stacks(step.operations), _divides(step.operations))
            for step in undone
            if isinstance(step, WeightConverter)
        ]

    def of(self, parameter: str) -> str:
        """What the tensor of a parameter is called."""
        if any(step.rename_source_key(parameter)[1] for step, *_ in self._converters):
            return parameter
        return self._renamed(parameter)

    def matrices(self, parameter: str) -> tuple[str, ...]:
        """Modules with a `*` for the expert, whose weights make up a stacked parameter, in the
        order of its rows; none where it is stored as it is."""
        for step, stacks, _ in self._converters:
            found, pattern = step.rename_source_key(parameter)
            if pattern is None:
                continue
            first, *_ = step.target_patterns
            names = [found.replace(first, each, 1) for each in step.target_patterns]
            return tuple(self._renamed(n).removesuffix(".weight") for n in names) if stacks else ()
        return ()

    def whole(self, parameter: str) -> tuple[str, int, int] | None:
        """What the tensor is called of which a parameter is one of several equal ranges of rows,
        which of them, and of how many; None where it is stored as it is."""
        for step, _, divides in self._converters:
            found, pattern = step.rename_source_key(parameter)
            if pattern is not None and divides:
                name, parts = self._renamed(found), step.source_patterns
                return name, parts.index(pattern), len(parts)
        return None

    def _renamed(self, name: str) -> str:
        for step in self._renamings:
            name, _ = step.rename_source_key(name)
        return name


def _stacks(operations: Sequence[Any]) -> bool:
    """Whether experts are stacked, their matrices one below the other, and nothing else is done."""
    done = [(type(operation).__name__, operation.__dict__.get("dim")) for operation in operations]
    return done in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def _divides(operations: Sequence[Any]) -> bool:
    """Whether a tensor is cut by rows into as many equal parts as there are names."""
    done = [(type(operation).__name__, vars(operation)) for operation in operations]
    return done == [("Chunk", {"dim": 0, "num_shards_attribute": None})]
