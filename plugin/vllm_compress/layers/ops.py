"""The two torch ops that take every format.

    vllm_compress::linear(x, tensors, bias, plan)        [..., cols] -> [..., rows]
    vllm_compress::embedding(ids, tensors, dtype, plan)  [...] -> [..., cols]

`tensors` are those of one or more prepared matrices with the same columns, one after another, whose
outputs lie side by side. `plan` is the text of a `Plan`: format, kernel and sizes, parsed once. A
layer of one matrix whose kernel has an operator of its own calls that instead (`product_of`).
torch.compile sees neither inside, so it is told (through vLLM's table of environment variables,
which is part of its cache key) when another kernel could be behind the same call.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from compress_methods import __version__
from compress_methods.formats import Format, Prepared, format_from_dict
from compress_methods.kernels import KERNELS
from compress_methods.kernels.cpu.build import instruction_set

KERNEL_VARIABLE = "VLLM_COMPRESS_KERNEL"


@dataclass(frozen=True)
class Plan:
    """`parts` are (rows, number of tensors); `pad` zero columns follow the outputs of all parts."""

    format: Format
    kernel: str
    cols: int
    parts: tuple[tuple[int, int], ...]
    pad: int = 0

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.parts) + self.pad

    def text(self) -> str:
        """What the ops take."""
        return json.dumps(
            {
                "format": self.format.to_dict(),
                "kernel": self.kernel,
                "cols": self.cols,
                "parts": self.parts,
                "pad": self.pad,
            },
            separators=(",", ":"),
        )

    def matrices(self, tensors: Sequence[Tensor]) -> list[Prepared]:
        first, out = 0, []
        for rows, count in self.parts:
            part = list(tensors[first : first + count])
            out.append(Prepared(self.kernel, part, rows, self.cols))
            first += count
        return out


@cache
def read_plan(text: str) -> Plan:
    """Inverse of `Plan.text`."""
    values = json.loads(text)
    return Plan(
        format=format_from_dict(values["format"]),
        kernel=values["kernel"],
        cols=values["cols"],
        parts=tuple((rows, count) for rows, count in values["parts"]),
        pad=values["pad"],
    )


Product = Callable[[Tensor, list[Tensor], Tensor | None], Tensor]


def product_of(plan: Plan, tensors: Sequence[Tensor]) -> Product:
    """What a layer calls with its input, its tensors and its bias."""
    text = plan.text()
    if len(plan.parts) == 1 and not plan.pad:
        (matrix,) = plan.matrices(tensors)
        operator = KERNELS[plan.kernel].operator(plan.format, matrix)
        if operator is not None:
            function, settings = operator
            return lambda x, tensors, bias: function(x, bias, *settings, *tensors)
    return lambda x, tensors, bias: torch.ops.vllm_compress.linear(x, tensors, bias, text)


def linear(x: Tensor, tensors: list[Tensor], bias: Tensor | None, text: str) -> Tensor:
    """Product with every part."""
    plan = read_plan(text)
    outputs, first = [], 0
    for matrix in plan.matrices(tensors):
        part = None if bias is None else bias[first : first + matrix.rows]
        outputs.append(plan.format.matmul(x, matrix, part))
        first += matrix.rows
    if plan.pad:
        outputs.append(x.new_zeros(*x.shape[:-1], plan.pad))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def linear_shape(x: Tensor, tensors: list[Tensor], bias: Tensor | None, text: str) -> Tensor:
    """Shape and dtype of `linear`."""
    return x.new_empty(*x.shape[:-1], read_plan(text).rows)


def embedding(ids: Tensor, tensors: list[Tensor], dtype: torch.dtype, text: str) -> Tensor:
    """Rows of the one matrix there is; ids outside it are the caller's to mask."""
    plan = read_plan(text)
    if not plan.parts:
        return torch.zeros(*ids.shape, plan.cols, dtype=dtype, device=ids.device)
    return plan.format.embed(ids, plan.matrices(tensors)[0], dtype)


def embedding_shape(ids: Tensor, tensors: list[Tensor], dtype: torch.dtype, text: str) -> Tensor:
    """Shape and dtype of `embedding`."""
    return torch.empty(*ids.shape, read_plan(text).cols, dtype=dtype, device=ids.device)


LIBRARY = torch.library.Library("vllm_compress", "FRAGMENT")
LIBRARY.define("linear(Tensor x, Tensor[] tensors, Tensor? bias, str plan) -> Tensor")
LIBRARY.define("embedding(Tensor ids, Tensor[] tensors, ScalarType dtype, str plan) -> Tensor")
for _name, _op, _shape in (
    ("linear", linear, linear_shape),
    ("embedding", embedding, embedding_shape),
):
    LIBRARY.impl(_name, _op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vllm_compress::{_name}", _shape, lib=LIBRARY)


def forced_kernel() -> str | None:
    """Kernel that the environment insists on: `vllm`, or a name of `compress_methods.kernels`."""
    return os.environ.get(KERNEL_VARIABLE) or None


def fingerprint() -> str:
    """Changes when the same checkpoint could be prepared for another kernel."""
    isa = instruction_set()
    return f"{__version__} torch {torch.__version__} {isa} {forced_kernel() or 'auto'}"


def enter_cache_key() -> None:
    """Make the fingerprint part of vLLM's compile-cache key."""
    from vllm import envs

    envs.environment_variables.setdefault("VLLM_COMPRESS_FINGERPRINT", fingerprint)


enter_cache_key()
