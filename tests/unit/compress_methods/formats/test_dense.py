"""Values in 16 or 32 bits: as they are, or refused."""

from __future__ import annotations

import pytest
import torch

from compress_methods.errors import FormatError
from compress_methods.formats.dense import Dense
from compress_methods.formats.sparse import Sparse


def test_values_are_rounded_to_the_dtype_and_no_further() -> None:
    weight = torch.randn(3, 8)
    for name in ("bfloat16", "float16", "float32"):
        fmt = Dense(name)
        stored = fmt.pack(fmt.nearest(weight))
        assert torch.equal(fmt.unpack(stored), weight.to(getattr(torch, name)).float())
    with pytest.raises(FormatError, match="dtype is 'int8', expected one of bfloat16, float16"):
        Dense("int8")


def test_a_value_that_the_dtype_does_not_hold_is_refused() -> None:
    weight = torch.full((1, 8), 1e5)
    for fmt in (Dense("float16"), Sparse(2, 4, Dense("float16"))):
        with pytest.raises(FormatError, match="a value does not fit float16; use dtype: bfloat16"):
            fmt.pack(fmt.nearest(weight))
    assert bool(Dense().pack(weight)["weight_packed"].isfinite().all())
