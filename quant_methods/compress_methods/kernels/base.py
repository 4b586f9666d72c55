"""What a kernel is: a runtime layout of a stored matrix, and a product with it.

A `Prepared` matrix nests: a wrapper format's kernel prepares its base through the table and keeps
it as a part, so the base keeps its own kernel. All that is not a tensor is plain data (`text`), so
one torch operator can carry any of them.

A new kernel is one class under `@register_kernel`, or the same in another distribution through the
entry-point group `vllm_compress.kernels`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from compress_methods.formats import Format, Stored, format_from_dict
from compress_methods.registry import Registry

ZEROS = "zeros"
"""The kernel of rows that pad."""


@dataclass(frozen=True)
class Want:
    """What the caller asks of a kernel besides the product.

    `embed`: rows are looked up. `kernel`: the name of one to take if it can. `dtype`: of the
    activations, where known. `capture`: a CUDA graph records the call. `host`: the module whose
    parameters the runtime tensors become; kernels that must own theirs (vLLM's) need one. `pad`:
    outputs of zero that follow, for a padded vocabulary.
    """

    embed: bool = False
    kernel: str | None = None
    dtype: torch.dtype | None = None
    capture: bool = False
    host: Any = None
    pad: int = 0


@dataclass(frozen=True)
class Prepared:
    """Runtime form of a matrix: the kernel that multiplies it, its tensors in order, and `facts`
    (plain JSON values) that the kernel wants back. `handle` is what cannot travel as text."""

    kernel: str
    rows: int
    cols: int
    tensors: Sequence[Tensor] = ()
    format: Format | None = None
    parts: tuple[Prepared, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    handle: Any = None

    def flat(self) -> list[Tensor]:
        """Its tensors, then those of its parts."""
        return [*self.tensors, *(tensor for part in self.parts for tensor in part.flat())]

    def text(self) -> str:
        """All but the tensors; `rebuild` reads it back."""
        return json.dumps(self._plain(), separators=(",", ":"))

    def _plain(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel,
            "rows": self.rows,
            "cols": self.cols,
            "tensors": len(self.tensors),
            "format": None if self.format is None else self.format.to_dict(),
            "parts": [part._plain() for part in self.parts],
            "facts": dict(self.facts),
        }

    def with_tensors(self, tensors: Sequence[Tensor]) -> Prepared:
        """The same of other tensors, in the order of `flat`."""
        own, rest = len(self.tensors), len(self.tensors)
        parts = []
        for part in self.parts:
            count = len(part.flat())
            parts.append(part.with_tensors(tensors[rest : rest + count]))
            rest += count
        return replace(self, tensors=tensors[:own], parts=tuple(parts))


@cache
def _outline(text: str) -> Prepared:
    """What `Prepared.text` says, with None for every tensor."""

    def build(plain: Mapping[str, Any]) -> Prepared:
        fmt = plain["format"]
        return Prepared(
            kernel=plain["kernel"],
            rows=plain["rows"],
            cols=plain["cols"],
            tensors=[None] * plain["tensors"],  # type: ignore[list-item]
            format=None if fmt is None else format_from_dict(fmt),
            parts=tuple(build(part) for part in plain["parts"]),
            facts=plain["facts"],
        )

    return build(json.loads(text))


def rebuild(text: str, tensors: Sequence[Tensor]) -> Prepared:
    """The prepared matrix of a text and its tensors, in the order of `Prepared.flat`."""
    return _outline(text).with_tensors(tensors)


def rows_of(text: str) -> int:
    """Outputs of the matrix that a text describes."""
    return _outline(text).rows


def cols_of(text: str) -> int:
    """Its inputs."""
    return _outline(text).cols


def tensors_of(text: str) -> int:
    """How many tensors it has, those of its parts among them."""

    def count(prepared: Prepared) -> int:
        return len(prepared.tensors) + sum(map(count, prepared.parts))

    return count(_outline(text))


def check_product(x: Tensor, prepared: Prepared, bias: Tensor | None) -> None:
    """Refuse what would broadcast, or read beyond the matrix; `IndexError` in one line. A bias may
    end where padding begins."""
    if x.shape[-1] != prepared.cols:
        raise IndexError(f"the input has {x.shape[-1]} columns, the matrix {prepared.cols}")
    if bias is None or tuple(bias.shape) == (prepared.rows,):
        return
    padded = bool(prepared.parts) and prepared.parts[-1].kernel == ZEROS
    if not padded or tuple(bias.shape) != (prepared.rows - prepared.parts[-1].rows,):
        raise IndexError(f"a bias of {list(bias.shape)} for {prepared.rows} rows")


def check_ids(ids: Tensor, rows: int) -> None:
    """Refuse ids that no row has: indexing counts negative ones from the end, clamps hide others.
    Callers mask what is not theirs, so one that comes is a bug. On a GPU the device says so, with
    less to say: to ask it would wait for it."""
    if not ids.numel():
        return
    if ids.device.type != "cpu":
        torch._assert_async(((ids >= 0) & (ids < rows)).all())
        return
    least, most = (int(end) for end in ids.aminmax())
    if least < 0 or most >= rows:
        raise IndexError(f"id {least if least < 0 else most} is none of the {rows} rows")


class Operator(NamedTuple):
    """Called as function(x, bias, *settings, *tensors of the prepared matrix)."""

    function: Callable[..., Tensor]
    settings: tuple[int, ...]


class Kernel(ABC):
    """Stateless; `name` travels in `Prepared`, the tensors beside it."""

    name: ClassVar[str]
    answers_to: ClassVar[tuple[str, ...]] = ()
    """Other names by which `Want.kernel` may ask for it."""
    pads: ClassVar[bool] = False
    """Whether `prepare` adds the outputs that `Want.pad` asks for."""

    @abstractmethod
    def rank(self, stored: Stored, want: Want) -> int | None:
        """How fast it is for this matrix on its device, against others: the highest is taken.

        None where it cannot do what is wanted, or must not unless `want.kernel` names it. Knows
        instruction sets, exactness, look-up. Reference: 0; torch's: 100; ours: 200; vLLM's: 300.
        """

    @abstractmethod
    def prepare(self, stored: Stored, want: Want) -> Prepared:
        """Stored tensors to runtime tensors (owned copies)."""

    @abstractmethod
    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        """[tokens, cols] -> [tokens, rows] in x.dtype."""

    def operator(self, prepared: Prepared) -> Operator | None:
        """The product as one torch operator, where there is one: it saves Python's part."""
        return None

    def rotated(self, prepared: Prepared) -> Operator | None:
        """The product with a matrix whose inputs and outputs are rotated, as one operator, where
        there is one: it takes their signs [2, block] before the tensors. See `rotated.py`."""
        return None

    def corrected(self, prepared: Prepared) -> Operator | None:
        """The product plus A (B x) for a few tokens, as one operator, where there is one: it takes
        A by columns [rank, rows] and B [rank, cols] before the tensors. See `lowrank.py`."""
        return None

    def embed(self, ids: Tensor, prepared: Prepared) -> Tensor:
        """Rows `ids` [n] -> [n, cols] float32; only of matrices prepared for `Want.embed`."""
        raise NotImplementedError(f"{self.name} cannot look rows up")

    def wanted(self, want: Want) -> bool:
        """Whether the caller asks for this kernel by name."""
        return want.kernel is not None and want.kernel in (self.name, *self.answers_to)


KERNELS: Registry[type[Kernel]] = Registry("kernel", "vllm_compress.kernels")
register_kernel = KERNELS.register
