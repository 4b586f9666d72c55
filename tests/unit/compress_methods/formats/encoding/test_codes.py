"""Codes of a few bits in bytes: nothing is lost, nothing is spare."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from compress_methods.formats.encoding.codes import pack_codes, unpack_codes


@given(
    st.sampled_from((2, 3, 4, 5, 6, 8)),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from((8, 32, 128)),
)
def test_packing_is_exact_and_has_no_spare_bit(
    bits: int, rows: int, blocks: int, block: int
) -> None:
    codes = torch.randint(0, 2**bits, (rows, blocks * block), dtype=torch.uint8)
    packed = pack_codes(codes, bits, block)
    assert packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack_codes(packed, bits, block), codes)


def test_128_columns_of_4_bits_are_a_line_of_low_and_high_nibbles() -> None:
    codes = torch.randint(0, 16, (1, 128), dtype=torch.uint8)
    packed = pack_codes(codes, 4, 128)
    assert torch.equal(packed & 15, codes[:, :64])
    assert torch.equal(packed >> 4, codes[:, 64:])
