"""What kernels compute, in plain float64, and by which library of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from compress_methods import kernels
from compress_methods.formats import Format, Stored
from compress_methods.formats.integer import Integer
from compress_methods.formats.sparse import Sparse
from compress_methods.kernels import Want
from compress_methods.kernels.cpu import build
from compress_methods.kernels.cpu import gemm as cpu_gemm
from compress_methods.kernels.cpu import trellis as cpu_trellis
from compress_methods.kernels.cpu.library import LINE, Library, library

WIDTHS = ("plain", "avx2", build.instruction_set())
"""An instruction set for each file of `src/vector`."""


def compiled(isa: str) -> Library:
    """Our own library for an instruction set. What optimizing takes is for this machine's alone,
    which servers load too; others are compiled without, and may not be warned of."""
    with pytest.MonkeyPatch.context() as patch:
        if isa != build.instruction_set():
            hasty = tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS)
            patch.setattr(build, "FLAGS", (*hasty, "-Wall", "-Wextra", "-Werror"))
        loaded = library(isa)
    assert loaded is not None
    return loaded


@contextmanager
def using(loaded: Library) -> Iterator[Library]:
    """The products of a library of ours, whatever this machine's widest instruction set is."""
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


def check_sums(out: Tensor, expected: Tensor, size: Tensor, terms: int) -> None:
    """Assert that a product is what it should be, but for what float32 and the dtype of `out` round
    off sums of `terms` numbers whose magnitudes add up to `size`."""
    bound = (terms + 8) * 2**-24 * size + torch.finfo(out.dtype).eps * expected.abs() + 1e-30
    found = out.double()
    if out.dtype == torch.float16:
        expected, bound = expected.clamp(-65504, 65504), bound + 2**-24
        found = found.clamp(-65504, 65504)
    assert bool(((found - expected).abs() <= bound).all())


def check_rows(stored: Stored, kernel: str, data: st.DataObject) -> None:
    """Assert that drawn rows of a matrix are looked up as they are."""
    rows = stored.size[0]
    ids = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), max_size=9)), dtype=int)
    prepared = kernels.prepare(stored, Want(kernel=kernel, embed=True))
    assert torch.equal(kernels.embed(ids, prepared, torch.float32), stored.values()[ids])


def per_token(fmt: Format) -> bool:
    """Whether a format asks for int8 activations."""
    values = fmt.values if isinstance(fmt, Sparse) else fmt
    return isinstance(values, Integer) and values.activations == "int8"


def interpret(code: str) -> None:
    """Run a program in Triton's interpreter, without a GPU; it prints `the same` at its end."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "the same\n", done.stderr[-2000:]
