"""export: a finished result as one GGUF file, for llama.cpp: the same numbers in other bytes.

Packed matrices become the blocks that hold them exactly (`gguf/equals.py`), all else stays as it is
stored, vectors in float32. Rows of q and k change places for `llama`, as `gguf/entries.py` says.
Written with the `gguf` package, a tensor at a time, into a file that appears when it is whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_methods.checkpoint.compressed import Matrix, open_compressed, read_entries, read_json
from compress_methods.checkpoint.interchange.gguf.blocks import KINDS, PLAIN
from compress_methods.checkpoint.interchange.gguf.container import SUFFIX
from compress_methods.checkpoint.interchange.gguf.equals import blocks_of, equal_of
from compress_methods.checkpoint.interchange.gguf.unfold import (
    CONTEXT,
    LLAMA,
    LLAMA3,
    ROTARY,
    llama3_factors,
    theirs_by_name,
    turned_heads,
)
from compress_methods.checkpoint.interchange.gguf.vocabulary import add_tokenizer
from compress_methods.checkpoint.loading.model import is_compressed
from compress_methods.checkpoint.loading.tied import open_skeleton
from compress_methods.checkpoint.safetensors import Entry
from compress_methods.errors import CheckpointError, OutputError, named
from compress_methods.formats import ITEMSIZE
from compress_methods.lazy import torch
from compress_methods.model.skeleton import checkpoint_names

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": "qwen2", "qwen3": "qwen3"}
"""Architectures of GGUF by `model_type`."""
KNOWN_ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "llama3": {**LLAMA3, "original_max_position_embeddings": CONTEXT},
}
FLOATS = {name: number for number, name in PLAIN.items()}


@dataclass(frozen=True)
class _Held:
    """A tensor of the result: packed, or as it is."""

    name: str
    shape: tuple[int, ...]
    found: Matrix | Entry | Tensor
    heads: int
    """Whose rows change places, 0 where none do."""

    @property
    def kind(self) -> int:
        if isinstance(self.found, Matrix):
            return equal_of(self.found.module, self.found.format)
        if isinstance(self.found, Entry) and len(self.shape) > 1:
            return FLOATS[self.found.dtype]
        return FLOATS["float32"]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Rows, and bytes of each."""
        *rows, cols = self.shape
        kind = KINDS.get(self.kind)
        size, nbytes = (kind.size, kind.nbytes) if kind else (1, ITEMSIZE[PLAIN[self.kind]])
        return (*rows, cols // size * nbytes)

    def bytes(self) -> Tensor:
        """uint8 of `stored_shape`."""
        if isinstance(self.found, Matrix):
            data = blocks_of(self.found.module, self.found.stored())
        else:
            values = self.found.read() if isinstance(self.found, Entry) else self.found
            values = values.float() if len(self.shape) == 1 else values
            data = values.contiguous().view(torch.uint8)
        if self.heads:
            rows = data.reshape(self.shape[0], -1)  # of a bias each is one number
            data = rows.unflatten(0, (self.heads, 2, -1)).transpose(1, 2)
        return data.reshape(self.stored_shape).contiguous()


def require_writable(directory: Path, config: Mapping[str, Any]) -> str:
    """The architecture that GGUF has for a model; `CheckpointError` where llama.cpp would compute
    something else, or the package that writes is not there."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise CheckpointError(
            "writing GGUF needs the package gguf (pip install 'vllm-compress[gguf]')"
        ) from None
    path, kind = directory / "config.json", config.get("model_type")
    if kind not in FAMILIES:
        raise CheckpointError(
            f"{path}: model_type is {kind!r}, of which no GGUF is written (only of "
            f"{', '.join(FAMILIES)})"
        )
    rope = _rope(config)
    known = KNOWN_ROPE.get(rope.get("rope_type", "default"))
    if known is None or any(rope.get(key, value) != value for key, value in known.items()):
        raise CheckpointError(f"{path}: rope_scaling {rope!r:.100} has no equal in GGUF")
    for key, value in (("hidden_act", "silu"), ("partial_rotary_factor", 1.0)):
        if config.get(key, value) != value:
            raise CheckpointError(
                f"{path}: {key} is {config[key]!r}, expected {value!r}, which llama.cpp computes"
            )
    return FAMILIES[kind]


def write_gguf(directory: Path) -> Path:
    """The file `NAME.gguf` in the directory of a finished result; returns it."""
    import gguf
    import numpy

    config = read_json(directory / "config.json")
    architecture = require_writable(directory, config)
    listed = _listed(directory, config, architecture == LLAMA)
    name = directory.resolve().name
    out, unfinished = directory / f"{name}{SUFFIX}", directory / f"{name}{SUFFIX}.tmp"
    writer = gguf.GGUFWriter(unfinished, architecture)
    try:
        writer.add_name(name)
        _add_facts(writer, config)
        add_tokenizer(writer, directory, config["vocab_size"])
        for one in listed:
            shape, raw = one.stored_shape, gguf.GGMLQuantizationType(one.kind)
            size = math.prod(shape)
            writer.add_tensor_info(one.name, shape, numpy.dtype("uint8"), size, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in listed:
            writer.write_tensor_data(one.bytes().numpy())
        writer.close()
        unfinished.replace(out)
    except OSError as problem:
        raise OutputError(f"{named(problem, out)}; all else of the result is whole") from problem
    finally:
        unfinished.unlink(missing_ok=True)
    return out


def _listed(directory: Path, config: Mapping[str, Any], turned: bool) -> list[_Held]:
    """Every tensor of the file; `turned`: rows of q and k change places."""
    skeleton = open_skeleton(directory)
    matrices: Mapping[str, Matrix] = {}
    entries: Mapping[str, Entry] = read_entries(directory)
    if is_compressed(directory):
        checkpoint = open_compressed(directory)
        matrices, entries = checkpoint.held, checkpoint.dense
    names = checkpoint_names(skeleton, entries)
    listed = []
    for theirs, name in theirs_by_name(skeleton.model).items():
        module = name.removesuffix(".weight")
        matrix = matrices.get(module)
        if matrix is None and name not in names:
            continue  # a head that is tied
        found = matrix if matrix is not None else entries[names[name]]
        shape = (matrix.rows, matrix.cols) if matrix is not None else entries[names[name]].shape
        heads = turned_heads(theirs, config) if turned else 0
        listed.append(_Held(theirs, tuple(shape), found, heads))
    told = {id(one.found) for one in listed}
    missing = [e for e in (*matrices.values(), *entries.values()) if id(e) not in told]
    if missing:
        raise CheckpointError(f"{directory}: GGUF has no name for {missing[0]!r:.80}")
    factors = _factors(config)
    if factors is not None:
        listed.append(_Held(ROTARY, tuple(factors.shape), factors, 0))
    return listed


def _add_facts(writer: Any, config: Mapping[str, Any]) -> None:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    size = config.get("head_dim") or hidden // heads
    context = config["max_position_embeddings"]
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        context = min(context, config["sliding_window"])  # beyond it llama.cpp would see more
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """How rotary embeddings turn, under the names of today's transformers."""
    old = dict(config.get("rope_scaling") or {})
    if "type" in old:
        old.setdefault("rope_type", old.pop("type"))
    if "rope_theta" in config:
        old.setdefault("rope_theta", config["rope_theta"])
    return {**old, **(config.get("rope_parameters") or {})}


def _factors(config: Mapping[str, Any]) -> Tensor | None:
    """What each frequency is divided by, where any is."""
    rope = _rope(config)
    if rope.get("rope_type", "default") == "default":
        return None
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return llama3_factors(size // 2, float(rope["rope_theta"]), float(rope["factor"]))
