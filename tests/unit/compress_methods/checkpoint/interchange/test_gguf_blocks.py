"""Every kind of block is decoded to the bits that the gguf package gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compress_methods.checkpoint.interchange.gguf.blocks import KINDS

gguf = pytest.importorskip("gguf")
ROWS, BLOCKS = 4, 3


@pytest.mark.parametrize("number", list(KINDS))
def test_values_have_the_bits_of_the_reference(number: int) -> None:
    kind, theirs = KINDS[number], gguf.GGMLQuantizationType(number)
    assert gguf.GGML_QUANT_SIZES[theirs] == (kind.size, kind.nbytes)
    assert theirs.name == kind.name
    generator = np.random.default_rng(number)
    raw = generator.integers(0, 256, (ROWS * BLOCKS, kind.nbytes), dtype=np.uint8)
    wanted = gguf.dequantize(raw.reshape(ROWS, -1), theirs)
    # Random bytes make some scales infinite; such blocks say nothing.
    known = np.isfinite(wanted)
    assert known.any()
    blocks = torch.from_numpy(raw)
    if kind.values is not None:
        values = kind.values(blocks).reshape(ROWS, -1)
    else:
        assert kind.format is not None
        values = kind.format.matrix(kind.solution(blocks, ROWS))
    assert np.array_equal(values.numpy()[known], wanted[known])
