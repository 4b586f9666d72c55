"""How our CPU product reads format `lookup`: codes as those of integers, and 16 bytes a table.

A table has its entries as signed bytes, again and again; with AVX-512 as those plus 128, as the
codes of 8 bits are there. A shuffle inside a register then makes such codes of codes of a few bits,
in either mode exactly. All 16 rows that AVX-512 takes together share a table, or each has its own,
which takes several shuffles instead of one. Tables of more rows are repeated for every 16, fixed
ones too. A table of floats, one for all rows, is as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress_methods.formats import MAIN_TENSOR, Stored
from compress_methods.formats.lookup import TABLE, Lookup

ENTRIES = 16
SHARED_ROWS = 16
UNSIGNED_SHIFT = 0x80


def tables(stored: Stored, together: int) -> Tensor:
    """uint8 [rows, 16], rows padded to a multiple of `together`, or [rows / 16, 16]; of floats
    float32 [16]."""
    fmt, rows = stored.format, stored.size[0]
    assert isinstance(fmt, Lookup)
    if fmt.of_floats:
        return fmt.fixed_table(stored.tensors[MAIN_TENSOR])[0]
    count = -(-rows // SHARED_ROWS)
    if not fmt.learns_values:
        found = fmt.fixed_table(stored.tensors[MAIN_TENSOR]).expand(count, -1)
    elif fmt.table_rows == 1:
        found = pad(stored.tensors[TABLE], (0, 0, 0, -rows % together))
    else:
        repeats = fmt.table_rows // SHARED_ROWS
        found = stored.tensors[TABLE].repeat_interleave(repeats, 0)[:count]
    full = found.repeat(1, ENTRIES // found.shape[1]).view(torch.uint8)
    return full ^ UNSIGNED_SHIFT if together > 1 else full
