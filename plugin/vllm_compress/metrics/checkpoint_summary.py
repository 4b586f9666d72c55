"""What is being served, from the checkpoint's headers alone: formats, bytes, bits per weight.

The numbers are those of the files: a model that vLLM quantizes while loading (`--quantization fp8`
on a plain checkpoint) takes less memory than they say. Bits per weight are left open for other
projects' quantized checkpoints, whose packing is theirs to know, and everything is left open where
there are no safetensors files to read. Never raises.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_methods.errors import CheckpointError
from compress_methods.system.user_file import read_json_value
from vllm_compress.names import QUANT_METHOD

INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000
FULL = "full"


@dataclass(frozen=True)
class CheckpointSummary:
    """`formats` is `none` for a plain model, another method's name if it is quantized by that."""

    base_model: str
    formats: str = "none"
    weight_bytes: int | None = None
    bits_per_weight: float | None = None
    sparsity: float | None = 0.0


def summarize_checkpoint(
    model: str, quantization: str | None = None, *, revision: Any = None, cache: Any = None
) -> CheckpointSummary:
    """Summarize a directory or Hub id; `quantization` is the method that vLLM serves it with."""
    sparsity = None if quantization else 0.0
    unknown = CheckpointSummary(model, quantization or "none", sparsity=sparsity)
    try:
        directory = _directory(model, revision, cache)
        if quantization == QUANT_METHOD:
            return _compressed(directory)
        return _plain(model, directory, quantization)
    except Exception:
        return unknown


def quantization_method(directory: Path) -> str | None:
    """Read the method from config.json; None for a plain model or an unreadable config."""
    try:
        block = read_json_value(directory / "config.json", CheckpointError)
        method = block["quantization_config"]["quant_method"]
    except (CheckpointError, KeyError, TypeError):
        return None
    return method if isinstance(method, str) else None


def variant_of(formats: str) -> str:
    """Put formats in one word: `full` for a plain model, `int4-g128+int8-row` for two."""
    return FULL if formats == "none" else formats.replace(", ", "+").replace(" ", "-")


def _directory(model: str, revision: Any, cache: Any) -> Path:
    """The files of a Hub model are in the cache by the time it is served."""
    path = Path(model)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True))


def _compressed(directory: Path) -> CheckpointSummary:
    from compress_methods.checkpoint.compressed import open_compressed

    return summarize_compressed(open_compressed(directory))


def summarize_compressed(checkpoint: Any) -> CheckpointSummary:
    """Summarize a `CompressedCheckpoint`. `sparsity` counts what formats do not store."""
    matrices = list(checkpoint.matrices.values())
    weights = sum(matrix.rows * matrix.cols for matrix in matrices)
    absent = sum(m.rows * m.cols * m.format.sparsity for m in matrices)
    weights += sum(math.prod(entry.shape) for entry in checkpoint.dense.values())
    nbytes = sum(matrix.nbytes for matrix in matrices)
    nbytes += sum(entry.nbytes for entry in checkpoint.dense.values())
    formats = sorted({matrix.format.describe() for matrix in matrices})
    return CheckpointSummary(
        base_model=checkpoint.spec.base_model or str(checkpoint.path),
        formats=", ".join(formats) or "none",
        weight_bytes=nbytes,
        bits_per_weight=nbytes * 8 / weights if weights else None,
        sparsity=absent / weights if weights else 0.0,
    )


def _plain(model: str, directory: Path, quantization: str | None) -> CheckpointSummary:
    nbytes = weights = 0
    for tensor in tensor_headers(directory).values():
        first, last = tensor["data_offsets"]
        nbytes += last - first
        weights += math.prod(tensor["shape"])
    return CheckpointSummary(
        base_model=model,
        formats=quantization or "none",
        weight_bytes=nbytes,
        bits_per_weight=None if quantization else nbytes * 8 / weights,
        sparsity=None if quantization else 0.0,
    )


def tensor_headers(directory: Path) -> dict[str, Any]:
    """dtype, shape and data_offsets of every tensor by name; raises `CheckpointError`."""
    found: dict[str, Any] = {}
    for path in _files(directory):
        try:
            found |= _header(path)
        except (OSError, ValueError, UnicodeDecodeError) as problem:
            raise CheckpointError(f"{path}: not readable as safetensors ({problem})") from problem
    if not found:
        raise CheckpointError(f"{directory}: no safetensors files")
    return found


def _files(directory: Path) -> list[Path]:
    """Some repositories hold the same weights twice, so the index decides where there is one."""
    if (directory / INDEX).is_file():
        weight_map = read_json_value(directory / INDEX, CheckpointError)["weight_map"]
        return [directory / name for name in sorted(set(weight_map.values()))]
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    return sorted(directory.glob("*.safetensors"))


def _header(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError(f"{path}: not a safetensors file")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header
