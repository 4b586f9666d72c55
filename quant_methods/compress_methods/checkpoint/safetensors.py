"""Reading and writing safetensors files without mapping them: headers, single tensors, slabs of
rows, and a writer whose shapes are known before its values.

`pread` instead of mmap keeps the resident memory of a conversion to what is being worked on. The
layout is the one of the safetensors project: 8 bytes little-endian header length, JSON header,
then raw little-endian data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from compress_methods.errors import CheckpointError
from compress_methods.formats.base import ITEMSIZE, TensorSpec, dtype_name, torch_dtype
from compress_methods.lazy import torch
from compress_methods.system.files import fsync_directory

if TYPE_CHECKING:
    from torch import Tensor

CODES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""What safetensors calls each dtype."""
NAMES = {name: code for code, name in CODES.items()}
MAX_HEADER = 100_000_000
SLAB_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: where its bytes are. `dtype` is a name, as torch gives it."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str
    start: int
    nbytes: int

    def read(self, first: int = 0, count: int | None = None) -> Tensor:
        """The tensor, or `count` entries of its first axis from `first`, as an owned copy."""
        shape = self.shape if count is None else (count, *self.shape[1:])
        return self.read_into(torch.empty(shape, dtype=torch_dtype(self.dtype)), first)

    def read_into(self, out: Tensor, first: int = 0) -> Tensor:
        """Fill contiguous `out` with the values from entry `first` of the first axis on."""
        if out.numel():
            _pread(self.path, out, self.start + first * (self.nbytes // max(1, self.rows)))
        return out

    @property
    def rows(self) -> int:
        """Entries of the first axis; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    def slabs(self, multiple: int = 1, limit: int = SLAB_BYTES) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) pieces of at most `limit` bytes, cut at multiples of `multiple`."""
        if not self.shape:
            yield 0, self.read()
            return
        step = self._slab_rows(multiple, limit)
        for first in range(0, self.rows, step):
            yield first, self.read(first, min(step, self.rows - first))

    def _slab_rows(self, multiple: int, limit: int) -> int:
        row = max(1, self.nbytes // max(1, self.rows))
        return max(multiple, limit // row // multiple * multiple)

    def copy_to(self, target: Tensor, check: Callable[[Tensor], Tensor] | None = None) -> None:
        """Copy the values to a tensor of this shape and any dtype, through one slab of memory.

        `check` is called with every slab, for what it raises.
        """
        step = min(self._slab_rows(1, SLAB_BYTES), self.rows)
        memory = torch.empty((step, *self.shape[1:]), dtype=torch_dtype(self.dtype))
        flat = target.view(self.rows, *self.shape[1:])
        for first in range(0, self.rows, step):
            slab = self.read_into(memory[: self.rows - first], first)
            flat[first : first + step] = slab if check is None else check(slab)


def _pread(path: Path, out: Tensor, offset: int) -> None:
    view = out.view(-1).view(torch.uint8).numpy().data
    done = 0
    try:
        with path.open("rb", buffering=0) as file:
            while done < len(view):
                got = os.preadv(file.fileno(), [view[done : done + 2**30]], offset + done)
                if got == 0:
                    raise CheckpointError(f"{path}: file ended at byte {offset + done}")
                done += got
    except OSError as problem:  # of a descriptor, which knows no name
        reason = problem.strerror or problem
        raise CheckpointError(f"{path}: not readable at byte {offset + done} ({reason})") from None


def read_header(path: Path) -> dict[str, Entry]:
    """Entries of one file by tensor name, after checking that header and file size agree."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                raise CheckpointError(f"{path}: not a safetensors file (or cut off: {size} bytes)")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {name: _entry(path, name, e, 8 + length) for name, e in header.items()}
    except FileNotFoundError as problem:
        raise CheckpointError(f"{path}: no such file") from problem
    except OSError as problem:
        raise CheckpointError(f"{path}: not readable ({problem.strerror or problem})") from problem
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise CheckpointError(f"{path}: damaged safetensors header ({problem})") from problem
    end = max((e.start + e.nbytes for e in entries.values()), default=8 + length)
    if size != end:
        raise CheckpointError(f"{path}: {size} bytes, but its header describes {end}")
    return entries


def _entry(path: Path, name: str, spec: Mapping[str, Any], base: int) -> Entry:
    if spec["dtype"] not in CODES:
        raise CheckpointError(f"{path}: {name} has dtype {spec['dtype']}, which is not supported")
    dtype = CODES[spec["dtype"]]
    start, end = spec["data_offsets"]
    shape = tuple(int(n) for n in spec["shape"])
    if math.prod(shape) * ITEMSIZE[dtype] != end - start:
        raise CheckpointError(
            f"{path}: {name} is {list(shape)} {spec['dtype']}, but has {end - start} bytes"
        )
    return Entry(name, path, shape, dtype, base + start, end - start)


class Writer:
    """Writes one file to `<path>.tmp`, tensor after tensor in the order of `specs`, then renames.

    `put` takes a tensor whole or in consecutive pieces. Leaving the `with` block normally fsyncs
    and renames; an error removes the temporary file.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.path = path
        self.temporary = path.with_name(path.name + ".tmp")
        self._left = {name: spec.nbytes for name, spec in specs.items()}
        self._order = list(specs)
        self._header = _encode_header(specs)

    def __enter__(self) -> Writer:
        self._file = self.temporary.open("wb")
        self._file.write(self._header)
        return self

    def put(self, name: str, tensor: Tensor) -> None:
        """Append `tensor` to `name`, which must be the first tensor that is not complete."""
        while self._order and self._left[self._order[0]] == 0 and self._order[0] != name:
            self._order.pop(0)
        size = tensor.numel() * tensor.element_size()
        if not self._order or self._order[0] != name or size > self._left[name]:
            raise ValueError(f"{name}: written out of order, or more than its header says")
        self._left[name] -= size
        if size:
            self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                missing = [name for name, left in self._left.items() if left]
                if missing:
                    raise ValueError(f"{self.path}: {missing[0]} was not written whole")
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if error is None:
                self.temporary.replace(self.path)
                fsync_directory(self.path.parent)
        finally:
            self.temporary.unlink(missing_ok=True)


def _encode_header(specs: Mapping[str, TensorSpec]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        header[name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Atomically write a file of tensors that are all in memory."""
    specs = {name: TensorSpec(tuple(t.shape), dtype_name(t.dtype)) for name, t in tensors.items()}
    with Writer(path, specs) as writer:
        for name, tensor in tensors.items():
            writer.put(name, tensor)


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """All tensors of a file (or the named ones), as owned copies."""
    entries = read_header(path)
    return {name: entries[name].read() for name in (names or entries)}
