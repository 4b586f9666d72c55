"""Opening a compressed checkpoint: config against file headers, before anything is loaded.

What vLLM itself does not notice (a missing tensor, too many rows, a truncated shard) is an error
here, in one line that names the file or tensor.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_methods.checkpoint.quantization_config import CompressionSpec, parse
from compress_methods.checkpoint.safetensors import Entry, read_header
from compress_methods.errors import CheckpointError, FormatError
from compress_methods.formats import MAIN_TENSOR, Format, Stored
from compress_methods.system.user_file import read_json_value, require_path

if TYPE_CHECKING:
    from torch import Tensor

INCOMPLETE = ".incomplete"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
MOST_LAYERS = 10_000
KV_SCALES = ("q_scale", "k_scale", "v_scale")
"""Names of an attention layer's scales for an FP8 cache, see `loading/kv_cache.py`."""
IN_LIST = re.compile(r"(.+?)\.(\d{1,6})\.")
"""A list of modules and the number in it that a name begins with."""


@dataclass(frozen=True)
class Matrix:
    """One compressed module: Hugging Face name, [rows, cols], format and stored tensors."""

    module: str
    rows: int
    cols: int
    format: Format
    entries: dict[str, Entry]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def stored(self) -> Stored:
        """The matrix, read."""
        tensors = {name: entry.read() for name, entry in self.entries.items()}
        return Stored.whole(self.format, tensors, (self.rows, self.cols))

    def unpack(self) -> Tensor:
        """The [rows, cols] values, float32."""
        return self.stored().values()


@dataclass(frozen=True)
class CompressedCheckpoint:
    """A directory whose headers agree with its config. `dense` are tensors kept as they were."""

    path: Path
    config: dict[str, Any]
    spec: CompressionSpec
    matrices: dict[str, Matrix]
    dense: dict[str, Entry]
    kv_scales: dict[str, Entry] = field(default_factory=dict)

    @property
    def shared(self) -> dict[str, str]:
        """Modules that have the matrix of another one, by its name; heads tied to the embedding
        apart, which the model itself ties."""
        tied = self.spec.tied.items()
        return {a: o for a, o in tied if o in self.matrices and o != self.spec.embedding}

    @property
    def held(self) -> dict[str, Matrix]:
        """The matrix of every compressed module, whether it is stored for it or shared."""
        return self.matrices | {a: self.matrices[o] for a, o in self.shared.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; errors name the file."""
    value = read_json_value(path, CheckpointError)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_entries(directory: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors directory, single-file or sharded; index and headers agree."""
    index_path = directory / INDEX
    if not index_path.exists():
        return read_header(directory / SINGLE)
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{index_path}: weight_map is missing or empty")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard.startswith("/") or ".." in shard.split("/"):
            raise CheckpointError(
                f"{index_path}: {name} is in {shard!r}, expected a file beside it"
            )
    entries: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        path = directory / shard
        require_path(path, CheckpointError)
        if not path.exists():
            raise CheckpointError(f"{index_path}: names {shard}, which is not there")
        entries |= read_header(path)
    for name, shard in weight_map.items():
        if name not in entries or entries[name].path.name != shard:
            raise CheckpointError(f"{directory / shard}: {name} is missing (the index lists it)")
    return {name: entry for name, entry in entries.items() if name in weight_map}


def open_compressed(path: str | Path, allow_incomplete: bool = False) -> CompressedCheckpoint:
    """Open and validate a compressed checkpoint; raises `CheckpointError`."""
    directory = Path(path)
    if (directory / INCOMPLETE).exists() and not allow_incomplete:
        raise CheckpointError(
            f"{directory}: conversion is not finished ({INCOMPLETE} is there); "
            "run the same convert command again to complete it"
        )
    config = read_json(directory / "config.json")
    block = config.get("quantization_config")
    if block is None:
        raise CheckpointError(f"{directory / 'config.json'}: has no quantization_config")
    spec = parse(block, f"{directory / 'config.json'}: quantization_config")
    entries = read_entries(directory)
    matrices = {}
    for name in entries:
        module, _, tensor = name.rpartition(".")
        if tensor == MAIN_TENSOR:
            matrices[module] = matrix_of(module, spec, entries)
    used = {entry.name for matrix in matrices.values() for entry in matrix.entries.values()}
    dense = {name: entry for name, entry in entries.items() if name not in used}
    for name, entry in dense.items():
        module, _, tensor = name.rpartition(".")
        if tensor == "weight" and (rule := spec.rule_for(module)) is not None:
            raise CheckpointError(
                f"{entry.path}: {name} is not compressed, but its format is {rule.format!r}"
            )
    _require_blocks(directory, config, entries, matrices)
    scales = _take_scales(directory, spec, dense)
    return CompressedCheckpoint(directory, config, spec, matrices, dense, scales)


def _take_scales(
    directory: Path, spec: CompressionSpec, dense: dict[str, Entry]
) -> dict[str, Entry]:
    """The scales of the KV cache, out of `dense`; `CheckpointError` where a layer lacks one."""
    if spec.kv_cache is None:
        return {}
    found = {n: dense.pop(n) for n in list(dense) if n.rpartition(".")[2] in KV_SCALES}
    if not found:
        raise CheckpointError(f"{directory}: kv_cache is {spec.kv_cache!r}, but no scale is there")
    for name, entry in found.items():
        owner = name.rpartition(".")[0]
        lost = next((leaf for leaf in KV_SCALES if f"{owner}.{leaf}" not in found), None)
        if lost is not None:
            raise CheckpointError(f"{entry.path}: {owner}.{lost} is missing ({name} is there)")
        if (entry.shape, entry.dtype) != ((1,), "float32"):
            raise CheckpointError(
                f"{entry.path}: {name} is {list(entry.shape)} {entry.dtype}, expected [1] float32"
            )
    return found


def _require_blocks(
    directory: Path, config: Mapping[str, Any], names: Iterable[str], matrices: Iterable[str]
) -> None:
    """Every layer that config.json counts has a tensor."""
    text = config.get("text_config")
    settings = text if isinstance(text, Mapping) else config
    count = next((settings[key] for key in LAYER_COUNTS if settings.get(key)), None)
    # The list that most compressed matrices are in: others, of a vision tower, have other counts.
    lists = Counter(found[1] for name in matrices if (found := IN_LIST.match(name)))
    if not isinstance(count, int) or not lists:
        return
    blocks = lists.most_common(1)[0][0]
    numbers = {int(m[2]) for name in names if (m := IN_LIST.match(name)) and m[1] == blocks}
    gone = [number for number in range(min(count, MOST_LAYERS)) if number not in numbers]
    if gone:
        more = f" (and {len(gone) - 1} more)" if len(gone) > 1 else ""
        raise CheckpointError(
            f"{directory}: no tensor of {blocks}.{gone[0]}{more} is there, but config.json "
            f"has {count} layers"
        )


def matrix_of(module: str, spec: CompressionSpec, entries: Mapping[str, Entry]) -> Matrix:
    """A compressed module among a checkpoint's tensors; `CheckpointError` where they disagree."""
    main = entries[f"{module}.{MAIN_TENSOR}"]
    rule = spec.rule_for(module)
    if rule is None:
        raise CheckpointError(
            f"{main.path}: {main.name} has no rule in quantization_config.modules"
        )
    if rule.shape is None:
        raise CheckpointError(f"quantization_config: the rule for {module} gives no shape")
    rows, cols = rule.shape
    fmt = spec.formats[rule.format]
    try:
        specs = fmt.tensors(rows, cols)
    except FormatError as problem:
        raise CheckpointError(f"{module}: {problem}") from problem
    found = {}
    for tensor, expected in specs.items():
        name = f"{module}.{tensor}"
        if name not in entries:
            raise CheckpointError(f"{main.path}: {name} is missing ({fmt.describe()} needs it)")
        entry = entries[name]
        if (entry.shape, entry.dtype) != (expected.shape, expected.dtype):
            raise CheckpointError(
                f"{entry.path}: {name} is {list(entry.shape)} {entry.dtype}, "
                f"expected {list(expected.shape)} {expected.dtype}"
            )
        found[tensor] = entry
    return Matrix(module, rows, cols, fmt, found)
