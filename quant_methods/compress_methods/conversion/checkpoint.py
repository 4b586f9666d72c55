"""The checkpoint that is being compressed: found, opened, its tensors named and shaped as the model
expects, read one slab at a time.

Single-file and sharded safetensors are read without mapping. `pytorch_model.bin` is a pickle, which
can run code: refused unless allowed, and then read with torch's restricted unpickler.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress_methods.compressed import INDEX, SINGLE, read_entries, read_json
from compress_methods.errors import CheckpointError
from compress_methods.safetensors_io import Entry
from compress_methods.skeleton import Skeleton, checkpoint_names

PICKLES = ("pytorch_model.bin.index.json", "pytorch_model.bin")
COPIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
NOT_COPIED = {"config.json", "report.json", INDEX, *PICKLES}
SAMPLE_BYTES = 65536
SAMPLES = 16


@dataclass(frozen=True)
class PickledTensor(Entry):
    """A tensor of a pickle, with the reading interface of a safetensors entry."""

    tensor: Tensor = None  # type: ignore[assignment]

    def read_into(self, out: Tensor, first: int = 0) -> Tensor:
        piece = self.tensor if out.shape == self.shape else self.tensor[first : first + len(out)]
        return out.copy_(piece)


@dataclass(frozen=True)
class Source:
    """An opened checkpoint. `names` maps the model's parameter names to tensor names."""

    directory: Path
    name: str
    entries: Mapping[str, Entry]
    names: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def entry(self, parameter: str) -> Entry:
        return self.entries[self.names[parameter]]

    def read(self, parameter: str) -> Tensor:
        """A parameter's tensor; `CheckpointError` if a value is not finite."""
        return require_finite(self.entry(parameter), self.entry(parameter).read())

    def read_float(self, parameter: str, out: Tensor | None = None) -> Tensor:
        """The same in float32 (what is no float stays as it is), a slab at a time into `out`."""
        entry = self.entry(parameter)
        if out is None:
            dtype = torch.float32 if entry.dtype.is_floating_point else entry.dtype
            out = torch.empty(entry.shape, dtype=dtype)
        entry.copy_to(out, lambda slab: require_finite(entry, slab))
        return out

    def slabs(self, parameter: str, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) pieces of a parameter, finite or `CheckpointError`."""
        entry = self.entry(parameter)
        for first, slab in entry.slabs(multiple):
            yield first, require_finite(entry, slab)


def require_finite(entry: Entry, values: Tensor) -> Tensor:
    """The tensor itself, or `CheckpointError` naming file and tensor."""
    if values.is_floating_point() and not bool(values.isfinite().all()):
        bad = int((~values.isfinite()).sum())
        raise CheckpointError(
            f"{entry.path}: {entry.name} has {bad} values that are not finite (NaN or infinity)"
        )
    return values


def resolve_model(model: str | Path) -> Path:
    """A local directory, or the cached or downloaded snapshot of a hub id."""
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise CheckpointError(
                f"{path / 'config.json'}: no such file; is this a model directory?"
            )
        return path
    if path.exists() or len(Path(model).parts) != 2 or str(model).startswith((".", "/")):
        raise CheckpointError(f"{model}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(model),
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
            )
        )
    except Exception as problem:
        reason = (
            str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        )
        raise CheckpointError(
            f"{model}: no such directory, and not to be had as a hub id ({reason})"
        ) from problem


def open_source(directory: Path, skeleton: Skeleton, name: str, allow_pickle: bool) -> Source:
    """Open a checkpoint and hold every tensor's shape against the model; `CheckpointError`."""
    entries = _read_any(directory, allow_pickle)
    names = checkpoint_names(skeleton, entries)
    for parameter, shape in skeleton.parameter_names().items():
        if parameter not in names:
            raise CheckpointError(
                f"{directory}: {parameter} is missing (transformers' model has it; a tensor that "
                "transformers fuses or renames while loading is not supported)"
            )
        entry = entries[names[parameter]]
        if entry.shape != tuple(shape):
            raise CheckpointError(
                f"{entry.path}: {entry.name} is {list(entry.shape)}, "
                f"expected {list(shape)} from config.json"
            )
    return Source(directory, name, entries, names)


def _read_any(directory: Path, allow_pickle: bool) -> Mapping[str, Entry]:
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
                key, file, tuple(tensor.shape), tensor.dtype, 0, tensor.nbytes, tensor
            )
    return entries


def fingerprint(source: Source) -> str:
    """sha256 over config, tensor layout and samples of every weight file.

    Sizes, headers and 16 pieces of 64 KiB per file: enough to tell two models apart without reading
    terabytes.
    """
    digest = hashlib.sha256((source.directory / "config.json").read_bytes())
    for path in sorted({entry.path for entry in source.entries.values()}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for i in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def companion_files(directory: Path) -> list[Path]:
    """Tokenizer, generation config and the like: everything to copy beside the weights."""
    return sorted(
        path
        for path in directory.iterdir()
        if path.is_file()
        and path.name not in NOT_COPIED
        and not path.name.startswith(".")
        and (path.suffix in COPIED_SUFFIXES or path.name.upper().startswith("LICENSE"))
    )
