"""The shape of a model: every matrix, and what its attention keeps per token. No weights, no torch.

From a directory's config.json and safetensors headers (config.json alone and what other tools
quantized: `from_config.py`), or from `configs/models/*.json`: config.json cut to what matters, and
the parameters as transformers builds them (`listing.py` writes them; a test compares). A matrix
stands for all its like: one per layer of `layers`, times `count` (experts).

What layers keep of a sequence is in `kept.py`. Fails for: models that keep none at all, and names
that do not tell layers apart by number.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from compress_methods.checkpoint.compressed import open_compressed, read_json
from compress_methods.errors import CheckpointError, nearest
from compress_methods.formats import ITEMSIZE
from compress_methods.model.architecture import GENERIC, architecture_of
from compress_methods.system.resources import config_path
from vllm_compress.metrics.checkpoint_summary import tensor_headers
from vllm_compress.names import QUANT_METHOD
from vllm_compress.operations.capacity.footprint.from_config import (
    built_parameters,
    quantized_parameters,
)
from vllm_compress.operations.capacity.footprint.kept import (
    Attention,
    State,
    attention_of,
    state_of,
)
from vllm_compress.operations.capacity.footprint.tensors import (
    Tensor,
    itemsize_of,
    leaf_of,
    prefix_of,
)

HEADS = ("lm_head", "embed_out", "output")
EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "embed_in", "word_embeddings")
EXPERTS = {"experts", "input_linear", "output_linear"}
LAST = ("down_proj", "output_linear")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
MOST = 10**8
LISTS = ("layer_types", "no_rope_layers")
COUNTS = dict.fromkeys(
    (
        *("num_hidden_layers", "n_layer", "n_layers", "hidden_size", "n_embd", "d_model"),
        *("num_attention_heads", "n_head", "n_heads", "num_kv_heads", "n_head_kv"),
        *("multi_query_group_num", "max_seq_len", "seq_length"),
        *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"),
        *("n_positions", "no_rope_layer_interval", "sliding_window_pattern"),
    ),
    1,
) | dict.fromkeys(
    (
        *("v_head_dim", "kv_lora_rank", "qk_rope_head_dim", "num_local_experts", "sliding_window"),
        *("n_routed_experts", "num_experts", "num_experts_per_tok", "attention_chunk_size"),
    ),
    0,
)
"""Keys of config.json that are whole numbers, and the least each can be."""
HEAD_COUNTS = ("num_attention_heads", "n_head", "n_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""vLLM takes 2,048 where there is none (BLOOM has no positions)."""


@dataclass(frozen=True)
class Matrix:
    """All [rows, cols] = [outputs, inputs] matrices of one name, `*` standing for the layer.

    `kind` is `blocks`, `embedding` or `lm_head` where a recipe may compress it, else empty.
    `layers` is empty outside the decoder blocks. `count` is how many there are in each layer.
    """

    module: str
    rows: int
    cols: int
    kind: str
    layers: tuple[int, ...] = ()
    count: int = 1
    itemsize: float = 2

    @property
    def experts(self) -> bool:
        return not EXPERTS.isdisjoint(self.module.split("."))

    @property
    def weights(self) -> int:
        return self.rows * self.cols * self.count * max(1, len(self.layers))

    def name(self, layer: int | None) -> str:
        """Hugging Face's name of the module in a layer; of many experts, the first."""
        first = self.module if layer is None else self.module.replace("*", str(layer), 1)
        return first.replace("*", "0")


@dataclass(frozen=True)
class ModelShape:
    """A model as the planner sees it. Widths are numbers of values."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    vocabulary: int
    context: int
    attention: tuple[Attention, ...]
    matrices: tuple[Matrix, ...]
    tied: bool = False
    latent: int | None = None
    experts: int = 0
    experts_per_token: int = 0
    state: State | None = None
    widest: int = 0
    quantized: str | None = None
    path: Path | None = None

    @cached_property
    def parameters(self) -> int:
        return sum(matrix.weights for matrix in self.matrices)

    @property
    def weight_bytes(self) -> int:
        return round(sum(matrix.weights * matrix.itemsize for matrix in self.matrices))

    @property
    def kv_layers(self) -> int:
        """Layers that keep a KV cache."""
        return sum(part.layers for part in self.attention)

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of one sequence, all layers together."""
        return 0 if self.state is None else self.state.layers * self.state.rank_bytes(1)

    @property
    def kv_values(self) -> int:
        """Values one layer keeps of one token, all heads together."""
        return self.latent or self.kv_heads * (self.head_dim + self.value_dim)


def shipped_shapes() -> list[str]:
    """Names of the models whose shapes come with the package."""
    return sorted(path.stem for path in config_path("models").glob("*.json"))


def load_shape(model: str) -> ModelShape:
    """Load the shape of a directory or a shipped name; raises `CheckpointError`."""
    path = Path(model)
    if path.is_dir():
        return _from_directory(path)
    names = shipped_shapes()
    if model not in names:
        raise CheckpointError(
            f"{model}: neither a directory nor a shape that comes with vllm-compress; "
            f"{nearest(model, names)}"
        )
    block = json.loads(config_path("models", f"{model}.json").read_text(encoding="utf-8"))
    return read_shape(model, block["config"], expand(block["tensors"]))


def expand(rows: Iterable[Any]) -> list[Tensor]:
    """Tensors of a shipped list: [name with `*`, shape, `first:end:step` of the layers]."""
    out = []
    for name, shape, span in rows:
        layers = range(*map(int, span.split(":"))) if span else [None]
        names = [name if i is None else name.replace("*", str(i)) for i in layers]
        out += [Tensor(each, tuple(shape), 2) for each in names]
    return out


def _from_directory(path: Path) -> ModelShape:
    config_file = path / "config.json"
    if not config_file.exists():
        raise CheckpointError(f"{config_file}: no such file; is this a model directory?")
    config = read_json(config_file)
    _check_config(config_file, config)
    quantized = (config.get("quantization_config") or {}).get("quant_method")
    if quantized == QUANT_METHOD:
        tensors = _unpacked(path)
    elif not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        tensors = built_parameters(path, config.get("quantization_config") or {})
    elif quantized:
        tensors = quantized_parameters(path, tensor_headers(path))
    else:
        tensors = [
            Tensor(name, tuple(h["shape"]), itemsize_of(h["dtype"]))
            for name, h in tensor_headers(path).items()
        ]
    if not quantized:
        # vLLM serves a float32 checkpoint in 16 bits.
        tensors = [Tensor(t.name, t.shape, min(t.itemsize, 2)) for t in tensors]
    return read_shape(path.name, config, tensors, path)


def _check_config(file: Path, config: Mapping[str, Any]) -> None:
    """`CheckpointError` names a key whose value is none to compute with."""
    for key in ("text_config", "quantization_config"):
        if not isinstance(config.get(key) or {}, Mapping):
            raise CheckpointError(f"{file}: {key} is {config[key]!r:.80}, expected a mapping")
    for key, value in {**config, **(config.get("text_config") or {})}.items():
        if key in LISTS and not (value is None or isinstance(value, list)):
            raise CheckpointError(f"{file}: {key} is {value!r:.80}, expected a list")
        if key == "layer_types" and not all(isinstance(kind, str) for kind in value or ()):
            raise CheckpointError(f"{file}: {key} is {value!r:.80}, expected a list of names")
        if key in COUNTS and value is not None:
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not COUNTS[key] <= value <= MOST:
                raise CheckpointError(
                    f"{file}: {key} is {value!r:.80}, expected a whole number from {COUNTS[key]}"
                )


def _unpacked(path: Path) -> list[Tensor]:
    """List what a compressed checkpoint holds, each matrix as one [rows, cols] tensor."""
    found = open_compressed(path)
    held = found.held.items()
    tensors = [Tensor(f"{name}.weight", (m.rows, m.cols), 2) for name, m in held]
    return tensors + [Tensor(e.name, e.shape, ITEMSIZE[e.dtype]) for e in found.dense.values()]


def read_shape(
    name: str, config: Mapping[str, Any], tensors: Iterable[Tensor], path: Path | None = None
) -> ModelShape:
    """Read config.json and all parameters; raises `CheckpointError` naming a missing key."""
    text = {**config, **(config.get("text_config") or {})}

    def get(*keys: str, default: Any = None) -> Any:
        found = next((text[key] for key in keys if text.get(key) is not None), default)
        if found is None:
            raise CheckpointError(f"{name}: config.json has no {keys[0]}; the planner needs it")
        return found

    layers = get("num_hidden_layers", "n_layer", "n_layers")
    hidden = get("hidden_size", "n_embd", "d_model", "n_embed")
    if not any(text.get(key) for key in HEAD_COUNTS):
        raise CheckpointError(f"{name}: no layer keeps a KV cache; planning needs one")
    heads = get(*HEAD_COUNTS)
    head_dim = get("head_dim", default=hidden // heads)
    latent = text.get("kv_lora_rank")
    tied = bool(get("tie_word_embeddings", default=_tied_unless_told(text)))
    turned, kept = text.get("model_type") == "gpt2", architecture_of(text).unquantized
    matrices = collect(tensors, hidden, tied, turned, kept)
    experts = get("num_local_experts", "n_routed_experts", "num_experts", default=0)
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=_kv_heads(text, heads),
        head_dim=head_dim,
        value_dim=text.get("v_head_dim") or head_dim,
        vocabulary=get("vocab_size"),
        context=get(*CONTEXTS, default=2048),
        attention=attention_of(name, text, layers),
        state=state_of(text, layers),
        matrices=matrices,
        tied=tied,
        latent=latent + text["qk_rope_head_dim"] if latent else None,
        experts=experts,
        experts_per_token=get("num_experts_per_tok", default=1 if experts else 0),
        widest=max((m.rows for m in matrices if m.kind == "blocks"), default=hidden),
        quantized=(config.get("quantization_config") or {}).get("quant_method"),
        path=path,
    )


def _tied_unless_told(text: Mapping[str, Any]) -> bool:
    """transformers leaves the key out where it has the family's default."""
    return str(text.get("model_type")).startswith(("gemma", "gpt2", "opt"))


def _kv_heads(text: Mapping[str, Any], heads: int) -> int:
    """Key-value heads; multi-query attention has one, whatever else the config says."""
    model_type = str(text.get("model_type"))
    grouped = model_type == "falcon" and text.get("new_decoder_architecture")
    if model_type in ("falcon", "gpt_bigcode") and not grouped:
        return 1 if text.get("multi_query", True) else heads
    found = next((text[k] for k in KV_HEADS if text.get(k) is not None), heads)
    return int(found)


def collect(
    tensors: Iterable[Tensor],
    hidden: int,
    tied: bool,
    inputs_first: bool = False,
    kept: Set[str] = frozenset(),
) -> tuple[Matrix, ...]:
    """Matrices of all parameters; the decoder blocks are the numbered modules with most values.

    `inputs_first`: linear layers are stored [inputs, outputs], as in GPT-2; `kept`: leaves that
    vLLM takes uncompressed alone.
    """
    tensors = [t for t in tensors if not (tied and leaf_of(t.name) in HEADS)]
    sizes: dict[str, int] = defaultdict(int)
    for tensor in tensors:
        sizes[prefix_of(tensor.name)] += prod(tensor.shape)
    sizes.pop("", None)
    blocks = max(sizes, key=lambda key: sizes[key], default=None)
    alike: dict[tuple[str, tuple[int, ...], float], list[int]] = defaultdict(list)
    for tensor in tensors:
        layer = NUMBER.search(tensor.name) if prefix_of(tensor.name) == blocks else None
        key = (NUMBER.sub("*", tensor.name), tensor.shape, tensor.itemsize)
        alike[key].append(-1 if layer is None else int(layer.group()))
    out = []
    for (template, shape, itemsize), found in alike.items():
        layers = tuple(sorted({layer for layer in found if layer >= 0}))
        rows, cols, experts = _rows_and_cols(template, shape, hidden)
        kind = _kind(template, shape, bool(layers), kept)
        if inputs_first and kind == "blocks":
            rows, cols = cols, rows
        count = experts * len(found) // max(1, len(layers))
        module = template.removesuffix(".weight")
        out.append(Matrix(module, rows, cols, kind, layers, count, itemsize))
    return tuple(out)


def _rows_and_cols(template: str, shape: tuple[int, ...], hidden: int) -> tuple[int, int, int]:
    """Outputs, inputs and how many of them; what is no matrix has one column."""
    if len(shape) == 2:
        return *shape, 1
    if len(shape) != 3:
        return prod(shape), 1, 1
    experts, rows, cols = shape  # in Llama 4 [experts, inputs, outputs]
    turned = hidden == (cols if leaf_of(template) in LAST else rows)
    return (cols, rows, experts) if turned else (rows, cols, experts)


def _kind(template: str, shape: tuple[int, ...], inside: bool, kept: Set[str]) -> str:
    leaf = leaf_of(template)
    if inside:
        parts = template.removesuffix(".weight").split(".")
        stacked = len(shape) == 3 and not EXPERTS.isdisjoint(parts)  # convolutions are not
        matrix = stacked or (len(shape) == 2 and template.endswith(".weight"))
        router = not {*GENERIC.routers, *kept}.isdisjoint(parts)
        return "blocks" if matrix and not router else ""
    if len(shape) != 2:
        return ""
    if leaf in HEADS:
        return "lm_head"
    return "embedding" if leaf in EMBEDDINGS and "vision" not in template else ""
