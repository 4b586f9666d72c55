"""What kernels compute, in plain float64, and by which library of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from compress_methods.formats import Format
from compress_methods.formats.integer import Integer
from compress_methods.formats.sparse import Sparse
from compress_methods.kernels.cpu import gemm as cpu_gemm
from compress_methods.kernels.cpu import trellis as cpu_trellis
from compress_methods.kernels.cpu.library import LINE, Library, library


@contextmanager
def using(isa: str) -> Iterator[Library]:
    """The products of our own library for an instruction set, whatever this machine's widest is."""
    loaded = library(isa)
    assert loaded is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_gemm, "library", lambda: loaded)
        patch.setattr(cpu_trellis, "library", lambda: loaded)
        yield loaded


def quantized(x: Tensor, per_token: bool) -> Tensor:
    """float64 values of int8 codes per line of columns (or token), as the kernel rounds them."""
    x = x.float()
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % LINE)).unflatten(1, (-1, LINE))
    most = padded.abs().amax((1, 2) if per_token else 2, keepdim=True)
    inverse = torch.tensor(127.0) / most  # `127 / most` would round twice
    codes = (padded * torch.where(most > 0, inverse, 0)).round()
    return (codes.double() * (most / 127).double()).flatten(1)[:, : x.shape[1]]


def per_token(fmt: Format) -> bool:
    """Whether a format asks for int8 activations."""
    values = fmt.values if isinstance(fmt, Sparse) else fmt
    return isinstance(values, Integer) and values.activations == "int8"
