"""How our CPU product reads format `float`: codes of 4 bits as those of integers, floats of 8 bits
as they are.

E2M1 is a table of the library's own, of twice the values, so that they are whole numbers: products
with int8 activations are exact. E4M3 is widened to float32 in registers, as float16 is, which has
all its bits: those products are made with activations as they are. Scales stay in the 8 bits, or
the dtype, that they are stored in; blocks of 128 rows share theirs. With AVX-512 floats of 8 bits
lie by columns of 16 rows, so that a load is a column.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress_methods.formats import Stored
from compress_methods.formats.encoding.grouped import SCALES
from compress_methods.formats.floats import ROW_SCALES, Float
from compress_methods.kernels.cpu.library import side_by_side


def terms(stored: Stored, groups: int, together: int) -> list[Tensor]:
    """Scales of `groups` groups, by blocks of `together` rows unless more rows share them; then
    those of rows, where there are any."""
    fmt, scales = stored.format, stored.tensors[SCALES]
    assert isinstance(fmt, Float)
    missing = -stored.size[0] % together
    if fmt.group_rows > 1:
        out = [pad(scales, (0, groups - scales.shape[1]), value=1).contiguous()]
    else:
        by_bytes = scales.view(torch.uint8) if scales.dtype.itemsize == 1 else scales
        padded = pad(by_bytes, (0, groups - scales.shape[1], 0, missing), value=1)
        out = [side_by_side(padded, together).clone().view(scales.dtype)]
    if ROW_SCALES in stored.tensors:
        out.append(pad(stored.tensors[ROW_SCALES], (0, missing), value=1).contiguous())
    return out
