"""The compiled Triton transform gives what plain torch does."""

from __future__ import annotations

import pytest
import torch

from compress_methods.kernels.wrappers.rotated import turn_in_torch, turn_in_triton

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("size", [96, 2048, 11008, 2880])
def test_triton_turns_as_torch_does(size: int, block: int, dtype: torch.dtype) -> None:
    in_triton = turn_in_triton()
    assert in_triton is not None
    signs = 1 - 2.0 * torch.randint(2, (block,), device="cuda")
    for tokens in (1, 33):
        x = torch.randn(tokens, size, device="cuda").to(dtype)
        for back in (False, True):
            found, expected = in_triton(x, signs, back), turn_in_torch(x, signs, back)
            limit = (1e-5 if dtype == torch.float32 else 2**-7) * float(expected.abs().max())
            assert float((found - expected).abs().max()) <= limit
