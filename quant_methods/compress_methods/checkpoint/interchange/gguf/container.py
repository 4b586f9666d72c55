"""The container of GGUF: a header of key-value pairs, a table of tensors, their bytes.

    magic "GGUF", version u32, tensors u64, pairs u64
    pair:    key, type u32, value            text is its length u64 and UTF-8
    tensor:  name, dimensions u32, sizes u64 (columns first), kind u32, offset u64
    data:    from the next multiple of `general.alignment` (32) on

Little-endian, versions 2 and 3. Large models are several files `NAME-00001-of-00003.gguf`, each
with a header. (github.com/ggml-org/ggml, docs/gguf.md)
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from compress_methods.errors import CheckpointError

MAGIC, VERSIONS = b"GGUF", (2, 3)
SUFFIX = ".gguf"
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
TEXT, ARRAY = 8, 9
ALIGNMENT, SPLIT = "general.alignment", re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
MOST_TEXT, MOST_ITEMS, MOST_DIMENSIONS = 2**26, 2**24, 4


@dataclass(frozen=True)
class Described:
    """A tensor of a file: `shape` rows first, bytes from `start` on."""

    path: Path
    kind: int
    shape: tuple[int, ...]
    start: int


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Described]]:
    """Key-value pairs (of lists only the length) and tensors of one file; `CheckpointError`."""
    try:
        with path.open("rb") as file:
            return _Reader(file, path).read()
    except OSError as problem:
        raise CheckpointError(f"{path}: not readable ({problem.strerror or problem})") from problem
    except (struct.error, UnicodeDecodeError, OverflowError, MemoryError, RecursionError):
        raise CheckpointError(f"{path}: damaged or cut off GGUF header") from None


def parts_of(path: Path) -> list[Path]:
    """All files of a model of which `path` is one; `CheckpointError` where one is missing."""
    found = SPLIT.fullmatch(path.name)
    if found is None:
        return [path]
    name, _, count = found.groups()
    parts = [path.with_name(f"{name}-{i:05d}-of-{count}{SUFFIX}") for i in range(1, int(count) + 1)]
    missing = next((part for part in parts if not part.is_file()), None)
    if missing is not None:
        raise CheckpointError(f"{missing}: no such file, but {path.name} is one of {count}")
    return parts


class _Reader:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path

    def read(self) -> tuple[dict[str, Any], dict[str, Described]]:
        if self.file.read(4) != MAGIC:
            raise CheckpointError(f"{self.path}: not a GGUF file")
        version = self._number("I")
        if version not in VERSIONS:
            raise CheckpointError(f"{self.path}: GGUF version {version}, expected 2 or 3")
        tensors, pairs = self._number("Q"), self._number("Q")
        facts = {}
        for _ in range(self._bounded(pairs)):
            key = self._text()
            facts[key] = self._value(self._number("I"))
        listed = [self._tensor() for _ in range(self._bounded(tensors))]
        step = facts.get(ALIGNMENT, 32)
        if not isinstance(step, int) or step < 1:
            raise CheckpointError(f"{self.path}: {ALIGNMENT} is {step!r}, expected an integer")
        base = -(-self.file.tell() // step) * step
        return facts, {
            name: Described(self.path, kind, shape, base + offset)
            for name, kind, shape, offset in listed
        }

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name, count = self._text(), self._number("I")
        if count > MOST_DIMENSIONS:
            raise CheckpointError(f"{self.path}: {name} has {count} dimensions")
        sizes = tuple(self._number("Q") for _ in range(count))
        return name, self._number("I"), sizes[::-1], self._number("Q")

    def _value(self, kind: int) -> Any:
        if kind == TEXT:
            return self._text()
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind != ARRAY:
            raise CheckpointError(f"{self.path}: a value of unknown type {kind}")
        inner, count = self._number("I"), self._bounded(self._number("Q"))
        if inner in SCALARS:
            self.file.seek(count * struct.calcsize(SCALARS[inner]), 1)
        else:
            for _ in range(count):
                self._value(inner)
        return count

    def _text(self) -> str:
        length = self._number("Q")
        if length > MOST_TEXT:
            raise CheckpointError(f"{self.path}: damaged or cut off GGUF header")
        raw = self.file.read(length)
        if len(raw) < length:
            raise CheckpointError(f"{self.path}: damaged or cut off GGUF header")
        return raw.decode()

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.file.read(struct.calcsize(code)))[0]

    def _bounded(self, count: int) -> int:
        if count > MOST_ITEMS:
            raise CheckpointError(f"{self.path}: damaged or cut off GGUF header")
        return count
