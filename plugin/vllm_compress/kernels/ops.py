"""The two torch ops that take every matrix.

    vllm_compress::linear(x, tensors, bias, text)        [..., cols] -> [..., rows]
    vllm_compress::embedding(ids, tensors, dtype, text)  [...] -> [..., cols]

`tensors` are those of a prepared matrix and of its parts, one after another; `text` is all else of
it, parsed once. A layer whose kernel has an operator of its own calls that instead (`product_of`).
torch.compile sees neither inside, so it is told (through vLLM's table of environment variables,
which is part of its cache key) when another kernel could be behind the same call.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from compress_methods import __version__
from compress_methods.kernels import Prepared, dispatch, rebuild
from compress_methods.kernels.base import cols_of, rows_of
from compress_methods.kernels.cpu.build import instruction_set
from vllm_compress.names import KERNEL_VARIABLE

Product = Callable[[Tensor, list[Tensor], Tensor | None], Tensor]


def product_of(prepared: Prepared) -> Product:
    """What a layer calls with its input, its tensors and its bias."""
    operator = dispatch.kernel(prepared.kernel).operator(prepared)
    if operator is not None:
        function, settings = operator
        return lambda x, tensors, bias: function(x, bias, *settings, *tensors)
    text = prepared.text()
    return lambda x, tensors, bias: torch.ops.vllm_compress.linear(x, tensors, bias, text)


def linear(x: Tensor, tensors: list[Tensor], bias: Tensor | None, text: str) -> Tensor:
    """Product with a prepared matrix."""
    return dispatch.matmul(x, rebuild(text, tensors), bias)


def linear_shape(x: Tensor, tensors: list[Tensor], bias: Tensor | None, text: str) -> Tensor:
    """Shape and dtype of `linear`."""
    return x.new_empty(*x.shape[:-1], rows_of(text))


def embedding(ids: Tensor, tensors: list[Tensor], dtype: torch.dtype, text: str) -> Tensor:
    """Rows of a prepared matrix; ids outside it are the caller's to mask."""
    return dispatch.embed(ids, rebuild(text, tensors), dtype)


def embedding_shape(ids: Tensor, tensors: list[Tensor], dtype: torch.dtype, text: str) -> Tensor:
    """Shape and dtype of `embedding`."""
    return torch.empty(*ids.shape, cols_of(text), dtype=dtype, device=ids.device)


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


def cache_key() -> str:
    """Changes when the same checkpoint could be prepared for another kernel."""
    isa = instruction_set()
    return f"{__version__} torch {torch.__version__} {isa} {forced_kernel() or 'auto'}"


def enter_cache_key() -> None:
    """Make it part of vLLM's compile-cache key."""
    from vllm import envs

    envs.environment_variables.setdefault("VLLM_COMPRESS_FINGERPRINT", cache_key)


enter_cache_key()
