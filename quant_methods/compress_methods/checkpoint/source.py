"""The checkpoint that is being compressed: found, opened, its tensors named and shaped as the model
expects, read one slab at a time.

Single-file and sharded safetensors are read without mapping. `pytorch_model.bin` is a pickle, which
can run code: refused unless allowed, and then read with torch's restricted unpickler.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_methods.checkpoint.companions import SUFFIXES, companion_files, companion_name
from compress_methods.checkpoint.compressed import INDEX, SINGLE, read_entries, read_json
from compress_methods.checkpoint.integrity import sha256
from compress_methods.checkpoint.interchange import DecodedEntry, decoded_entries
from compress_methods.checkpoint.interchange.divided import divided
from compress_methods.checkpoint.interchange.gguf import gguf_entries
from compress_methods.checkpoint.interchange.gguf.container import SUFFIX
from compress_methods.checkpoint.interchange.gguf.entries import METHOD
from compress_methods.checkpoint.interchange.gguf.unfold import find_gguf, unfold
from compress_methods.checkpoint.refusals import why_missing
from compress_methods.checkpoint.safetensors import Entry
from compress_methods.errors import CheckpointError
from compress_methods.formats import count_not_finite, dtype_name, torch_dtype
from compress_methods.model.relayout import Relayout, relayout_of
from compress_methods.model.skeleton import Skeleton, checkpoint_names
from compress_methods.model.slot import Slot
from compress_methods.system.user_file import require_path

PICKLES = ("pytorch_model.bin.index.json", "pytorch_model.bin")
HASHED_TOGETHER = 4
CLOCK_TICK = 10**9
_SUMS: dict[tuple[int, ...], str] = {}
HUB_FILES = (
    *("*.safetensors", "LICENSE*", "*.model.v*"),
    *(f"*{suffix}" for suffix in sorted(SUFFIXES)),
)
PICKLED_FILES = ("*.bin",)


@dataclass(frozen=True)
class PickledTensor(Entry):
    """A tensor of a pickle, with the reading interface of a safetensors entry."""

    tensor: Tensor = None  # type: ignore[assignment]

    def read_into(self, out: Tensor, first: int = 0) -> Tensor:
        piece = self.tensor if out.shape == self.shape else self.tensor[first : first + len(out)]
        return out.copy_(piece)


@dataclass(frozen=True)
class ZeroTensor(Entry):
    """A tensor of zeros that no file holds."""

    def read_into(self, out: Tensor, first: int = 0) -> Tensor:
        return out.zero_()


@dataclass(frozen=True)
class Parts:
    """A parameter of that shape whose matrices the checkpoint holds one by one."""

    shape: tuple[int, ...]
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Source:
    """An opened checkpoint. `names` maps the model's parameter names to tensor names; a parameter
    that the checkpoint holds matrix by matrix (experts) is in `parts` instead. `views` are tensors
    that the checkpoint holds once, under another name that is here too, or not at all (zeros)."""

    directory: Path
    name: str
    entries: Mapping[str, Entry]
    names: Mapping[str, str]
    parts: Mapping[str, Parts] = field(default_factory=dict)
    views: frozenset[str] = frozenset()

    @property
    def held(self) -> list[Entry]:
        """Every tensor of the checkpoint once."""
        return [entry for name, entry in self.entries.items() if name not in self.views]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.held)

    def kept_in(self, dtype: str) -> Source:
        """The same, the matrices that another tool quantized being of that dtype where they are
        stored unpacked."""
        entries = {
            name: entry.of(dtype) if isinstance(entry, DecodedEntry) else entry
            for name, entry in self.entries.items()
        }
        return replace(self, entries=entries)

    def entry(self, parameter: str) -> Entry:
        return self.entries[self.names[parameter]]

    def tensor_of(self, slot: Slot) -> str:
        """The tensor that holds a matrix, alone or among others."""
        if slot.parameter in self.parts:
            return f"{slot.module}.weight"
        return self.names[slot.parameter]

    def nbytes_of(self, slot: Slot) -> int:
        """Bytes the checkpoint spends on a matrix."""
        entry = self.entries[self.tensor_of(slot)]
        return slot.rows * slot.cols * torch_dtype(entry.dtype).itemsize

    def read_slot(self, slot: Slot) -> Tensor:
        """A matrix [rows, cols]; `CheckpointError` if a value is not finite."""
        if slot.parameter in self.parts:
            entry = self.entries[self.tensor_of(slot)]
            return require_finite(entry, entry.read())
        if slot.index and isinstance(slot.index[0], int):
            entry = self.entry(slot.parameter)
            return slot.alone.of(require_finite(entry, entry.read(slot.index[0], 1)))
        return slot.of(self.read(slot.parameter))

    def slot_slabs(self, slot: Slot, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) pieces of a matrix, finite or `CheckpointError`; one piece where the
        checkpoint does not hold it row by row."""
        if slot.is_plain:
            yield from self.slabs(slot.parameter, multiple)
        else:
            yield 0, self.read_slot(slot)

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> Tensor:
        """A parameter's tensor; `CheckpointError` if a value is not finite. What the checkpoint
        holds matrix by matrix is put together in `dtype`, else as stored."""
        if parameter in self.parts:
            return self._assembled(self.parts[parameter], dtype)
        return require_finite(self.entry(parameter), self.entry(parameter).read())

    def _assembled(self, parts: Parts, dtype: torch.dtype | None) -> Tensor:
        first = self.entries[self.tensor_of(parts.slots[0])]
        out = torch.empty(parts.shape, dtype=dtype or torch_dtype(first.dtype))
        for slot in parts.slots:
            slot.of(out).copy_(self.read_slot(slot))
        return out

    def read_float(
        self, parameter: str, out: Tensor | None = None, *, known: bool = False
    ) -> Tensor:
        """The same in float32 (what is no float stays as it is), a slab at a time into `out`;
        `known`: values were found finite before."""
        if parameter in self.parts:
            parts = self.parts[parameter]
            out = torch.empty(parts.shape) if out is None else out
            for slot in parts.slots:
                _copy(self.entries[self.tensor_of(slot)], slot.of(out), known)
            return out
        entry = self.entry(parameter)
        if out is None:
            dtype = torch_dtype(entry.dtype)
            out = torch.empty(
                entry.shape, dtype=torch.float32 if dtype.is_floating_point else dtype
            )
        return _copy(entry, out, known)

    def slabs(self, parameter: str, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) pieces of a parameter, finite or `CheckpointError`."""
        entry = self.entry(parameter)
        for first, slab in entry.slabs(multiple):
            yield first, require_finite(entry, slab)


def _copy(entry: Entry, out: Tensor, known: bool) -> Tensor:
    entry.copy_to(out, None if known else lambda slab: require_finite(entry, slab))
    return out


def require_finite(entry: Entry, values: Tensor) -> Tensor:
    """The tensor itself, or `CheckpointError` naming file and tensor."""
    bad = count_not_finite(values)
    if bad:
        raise CheckpointError(
            f"{entry.path}: {entry.name} has {bad} values that are not finite (NaN or infinity)"
        )
    return values


def at_revision(model: str | Path, revision: str | None) -> str | Path:
    """A hub id as `resolve_model` takes it, with the branch, tag or commit behind an `@`."""
    if revision is None:
        return model
    if Path(model).exists():
        raise CheckpointError(f"{model}: a directory has no --revision {revision}")
    return f"{model}@{revision}"


def name_of(model: str | Path) -> str:
    """What reports call a model: its directory, or a hub id without owner and revision."""
    return Path(str(model) if Path(model).exists() else str(model).partition("@")[0]).name


def resolve_model(model: str | Path, allow_pickle: bool = False) -> Path:
    """A local directory, or the cached or downloaded snapshot of a hub id (`owner/name@revision`);
    of a GGUF file, or a directory whose weights are one, a directory that opens as it.

    Pickles are downloaded only if allowed and where there is nothing else.
    """
    path = Path(model)
    require_path(path, CheckpointError)
    if path.suffix == SUFFIX and path.is_file():
        return unfold(path)
    if path.is_dir():
        found = None if _holds_weights(path) else find_gguf(path)
        if found is not None:
            return unfold(found, path if (path / "config.json").exists() else None)
        if not (path / "config.json").exists():
            raise CheckpointError(
                f"{path / 'config.json'}: no such file; is this a model directory?"
            )
        return path
    name, _, revision = str(model).partition("@")
    if path.exists() or len(Path(name).parts) != 2 or str(model).startswith((".", "/")):
        raise CheckpointError(f"{model}: no such directory")
    from huggingface_hub import snapshot_download

    def download(patterns: tuple[str, ...]) -> Path:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=[*patterns]))

    try:
        found = download(HUB_FILES)
        if allow_pickle and not any(found.glob("*.safetensors")):
            found = download((*HUB_FILES, *PICKLED_FILES))
        return found
    except Exception as problem:
        reason = (
            str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        )
        raise CheckpointError(
            f"{model}: no such directory, and not to be had as a hub id ({reason})"
        ) from problem


def _holds_weights(directory: Path) -> bool:
    return any((directory / name).exists() for name in (INDEX, SINGLE, *PICKLES))


def open_source(directory: Path, skeleton: Skeleton, name: str, allow_pickle: bool) -> Source:
    """Open a checkpoint and hold every tensor's shape against the model; `CheckpointError`.

    What another tool quantized is dequantized exactly while it is read, or refused.
    """
    entries, added = read_any(directory, allow_pickle), frozenset[str]()
    config, held = read_json(directory / "config.json"), list(entries)
    layout = relayout_of(config)
    if layout is not None:
        entries, added = _relaid(entries, layout, config, directory)
    block = config.get("quantization_config")
    if block:
        try:
            entries = decoded_entries(block, entries)
        except CheckpointError as problem:
            raise CheckpointError(f"{directory}: {problem}") from None
    entries = divided(skeleton, entries)
    names = checkpoint_names(skeleton, entries)
    parts = find_parts(skeleton, entries, names)
    for parameter, shape in skeleton.parameter_names().items():
        if parameter in parts:
            continue
        if parameter not in names:
            why = why_missing(parameter, config, held)
            raise CheckpointError(f"{directory}: {parameter} is missing ({why})")
        entry = entries[names[parameter]]
        if entry.shape != tuple(shape):
            raise CheckpointError(
                f"{entry.path}: {entry.name} is {list(entry.shape)}, "
                f"expected {list(shape)} from config.json"
            )
    return Source(directory, name, entries, names, parts, added)


def _relaid(
    entries: Mapping[str, Entry], layout: Relayout, config: Mapping[str, Any], directory: Path
) -> tuple[dict[str, Entry], frozenset[str]]:
    """The tensors under another model's names, and the names of those that no file holds."""
    found = {layout.name(name): replace(e, name=layout.name(name)) for name, e in entries.items()}
    base = next((name.partition("embeddings.")[0] for name in found if "embeddings." in name), "")
    dtype = next((entry.dtype for entry in entries.values()), "float32")
    path = directory / "config.json"
    added = {
        name: ZeroTensor(name, path, shape, dtype, 0, 0)
        for name, shape in ((base + n, shape) for n, shape in layout.zeros(config).items())
        if name not in found
    }
    return {**found, **added}, frozenset(added)


def find_parts(
    skeleton: Skeleton, entries: Mapping[str, Entry], names: Mapping[str, str]
) -> dict[str, Parts]:
    """Parameters of which the checkpoint holds each matrix [rows, cols] under its own name."""
    slots: dict[str, list[Slot]] = defaultdict(list)
    for slot in skeleton.slots.values():
        decoded = isinstance(entries.get(f"{slot.module}.weight"), DecodedEntry)
        if not slot.is_plain and (decoded or slot.parameter not in names):
            slots[slot.parameter].append(slot)

    def held(slot: Slot) -> bool:
        entry = entries.get(f"{slot.module}.weight")
        return entry is not None and entry.shape == (slot.rows, slot.cols)

    shapes = skeleton.parameter_names()
    return {
        name: Parts(tuple(shapes[name]), tuple(found))
        for name, found in slots.items()
        if all(map(held, found))
    }


def read_any(directory: Path, allow_pickle: bool) -> Mapping[str, Entry]:
    """Every tensor of a checkpoint by name, as it is stored; `CheckpointError`."""
    block = read_json(directory / "config.json").get("quantization_config")
    if isinstance(block, Mapping) and block.get("quant_method") == METHOD and "files" in block:
        return gguf_entries(block)
    if (directory / INDEX).exists() or (directory / SINGLE).exists():
        return read_entries(directory)
    pickle = next((directory / name for name in PICKLES if (directory / name).exists()), None)
    if pickle is None:
        raise CheckpointError(f"{directory}: has neither {SINGLE} nor {INDEX}")
    if not allow_pickle:
        raise CheckpointError(
            f"{pickle}: a pickle can run code when opened; convert it to safetensors, "
            "or pass --allow-pickle if you trust it"
        )
    files = [pickle]
    if pickle.suffix == ".json":
        weight_map = read_json(pickle).get("weight_map", {})
        files = [directory / shard for shard in sorted(set(weight_map.values()))]
    entries: dict[str, Entry] = {}
    for file in files:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as problem:
            reason = str(problem).strip().splitlines()[0]
            raise CheckpointError(f"{file}: not readable as a torch pickle ({reason})") from problem
        for key, tensor in state.items():
            entries[key] = PickledTensor(
                key, file, tuple(tensor.shape), dtype_name(tensor.dtype), 0, tensor.nbytes, tensor
            )
    return entries


def fingerprint(source: Source) -> str:
    """sha256 over every byte the result can depend on: config, weights, tokenizer and whatever else
    is copied beside them."""
    weights = {entry.path for entry in source.entries.values()}
    config = source.directory / "config.json"
    beside = set(companion_files(source.directory))
    paths = sorted({config, *weights, *beside})
    # Hashing leaves the interpreter's lock, so a few files at a time are read as fast as they come.
    with ThreadPoolExecutor(HASHED_TOGETHER) as pool:
        sums = list(pool.map(_content_sum, paths))
    names = [
        companion_name(path, source.directory) if path in beside else path.name for path in paths
    ]
    lines = [f"{name} {digest}" for name, digest in zip(names, sums, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _content_sum(path: Path) -> str:
    """Of all bytes; read once in a process while the kernel's account of the file is the same."""
    try:
        facts = path.stat()
        # A change within one tick of the clock leaves its times as they were: too fresh to trust.
        fresh = time.time_ns() - facts.st_ctime_ns < CLOCK_TICK
        key = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
        if key not in _SUMS or fresh:
            _SUMS[key] = sha256(path)
        return _SUMS[key]
    except OSError as problem:
        raise CheckpointError(f"{path}: not readable ({problem.strerror or problem})") from problem
