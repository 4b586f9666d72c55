"""A checkpoint with other values: the same files, names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compress_methods.checkpoint.companions import copy_companions
from compress_methods.checkpoint.compressed import INDEX, read_entries
from compress_methods.checkpoint.safetensors import Writer, read_header
from compress_methods.formats import TensorSpec
from compress_methods.system.files import copy_file

if TYPE_CHECKING:
    from torch import Tensor


def write_changed(directory: Path, place: Path, changed: Mapping[str, Tensor]) -> None:
    """The checkpoint of `directory` in `place`, with other values for the tensors `changed`."""
    entries = read_entries(directory)
    for path in sorted({entry.path for entry in entries.values()}):
        held = read_header(path)
        specs = {name: TensorSpec(entry.shape, entry.dtype) for name, entry in held.items()}
        with Writer(place / path.name, specs) as writer:
            for name, entry in held.items():
                if name in changed:
                    writer.put(name, changed[name])
                    continue
                for _, slab in entry.slabs():
                    writer.put(name, slab)
    copy_companions(directory, place)
    for path in (directory / "config.json", directory / INDEX):
        if path.exists():
            copy_file(path, place / path.name)
