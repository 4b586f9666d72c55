"""What layers keep of a sequence by config.json: keys and values of every token, or a state of
fixed size.

States are those of Mamba (Jamba, Falcon-H1, Granite 4, Zamba2, Nemotron-H), of gated delta nets
(Qwen3-Next, Qwen3.5, OLMo-Hybrid) and of short convolutions (LFM2): the last inputs of a
convolution, and what is carried on from token to token. Those of other kinds are left out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress_methods.errors import CheckpointError

KEEPS_KEYS = re.compile("hybrid|(?!linear).*attention")
"""Kinds of layers that keep keys and values; others (Mamba, linear attention, convolutions, plain
feed-forward) keep a state of fixed size or nothing."""
STATES = ("mamba", "mamba2", "linear", "linear_attention", "conv", "hybrid")
"""Kinds of layers that keep a state; `hybrid` ones keep keys and values, too."""
IN_ALL = ("falcon_h1",)
"""Models every layer of which keeps both."""
WHOLE = ("full_attention", "attention", "hybrid")
VALUE = 2
"""Bytes of a value, but for states that a config or vLLM says are float32."""
FLOAT32 = "float32"


@dataclass(frozen=True)
class Attention:
    """Layers that keep the same: `window` is None, or how many tokens back they look."""

    layers: int
    window: int | None = None
    chunked: bool = False


@dataclass(frozen=True)
class State:
    """Layers that keep a state for each sequence: the last `kernel` - 1 inputs, of `width` values
    and of two times `size` in each of `groups`, and `heads` times `head` values of `head_bytes`."""

    layers: int
    kernel: int
    width: int
    groups: int = 0
    size: int = 0
    heads: int = 0
    head: int = 0
    head_bytes: int = VALUE

    def rank_bytes(self, tp: int, on_cpu: bool = False) -> int:
        """Bytes in one layer on one of `tp` ranks. Groups that ranks cannot share are copied. On
        CPUs heads are float32, as vLLM has them where there are instructions for bfloat16."""
        groups = self.groups if self.groups % tp == 0 else tp
        inputs = (self.width + 2 * groups * self.size) // tp * (self.kernel - 1)
        size = 2 * VALUE if on_cpu else self.head_bytes
        return inputs * VALUE + self.heads // tp * self.head * size


def attention_of(name: str, text: Mapping[str, Any], layers: int) -> tuple[Attention, ...]:
    """Groups of the layers that keep keys and values."""
    listed = text.get("layer_types") or text.get("layers_block_type") or _kinds(text, layers)
    kinds = [kind for kind in listed if KEEPS_KEYS.fullmatch(kind)]
    if not kinds:
        raise CheckpointError(f"{name}: no layer keeps a KV cache; planning needs one")
    groups: dict[tuple[int | None, bool], int] = defaultdict(int)
    for kind in kinds:
        chunked = kind == "chunked_attention"
        window = None if kind in WHOLE else text.get("sliding_window")
        groups[text.get("attention_chunk_size") if chunked else window, chunked] += 1
    return tuple(Attention(n, window, chunked) for (window, chunked), n in groups.items())


def state_of(text: Mapping[str, Any], layers: int) -> State | None:
    """The state of layers that keep one; None where none does, or of no known kind."""
    listed = text.get("layer_types") or text.get("layers_block_type") or _kinds(text, layers)
    count = sum(kind in STATES for kind in listed)
    count = layers if text.get("model_type") in IN_ALL else count

    def first(*keys: str) -> Any:
        return next((text[key] for key in keys if text.get(key) is not None), None)

    if not count:
        return None
    if text.get("linear_num_value_heads"):
        keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
        heads, head = text["linear_num_value_heads"], text["linear_value_head_dim"]
        width, kernel = 2 * keys + heads * head, text["linear_conv_kernel_dim"]
        head *= text["linear_key_head_dim"]
        return State(count, kernel, width, heads=heads, head=head, head_bytes=_head_bytes(text))
    if text.get("conv_L_cache"):
        return State(count, text["conv_L_cache"], text["hidden_size"])
    kernel, size = first("mamba_d_conv", "conv_kernel"), first("mamba_d_state", "ssm_state_size")
    heads = first("mamba_n_heads", "n_mamba_heads", "mamba_num_heads")
    if kernel is None or size is None:
        return None
    width = int(first("mamba_expand", "expand") or 2) * text["hidden_size"]
    if heads is None:
        return State(count, kernel, width, heads=width, head=size)
    head = first("mamba_d_head", "mamba_headdim", "mamba_head_dim")
    if not isinstance(head, int):
        head = width // heads
    if "mamba_num_heads" in text:
        width = heads * head
    groups = first("mamba_n_groups", "mamba_ngroups", "n_groups") or 1
    width = text.get("mamba_d_ssm") or width
    return State(count, kernel, width, groups, size, heads, head * size, _head_bytes(text))


def _head_bytes(text: Mapping[str, Any]) -> int:
    """vLLM takes float32 for Nemotron-H unless its config says otherwise."""
    asked = text.get("mamba_ssm_cache_dtype") or text.get("mamba_ssm_dtype")
    asked = asked or (FLOAT32 if text.get("model_type") == "nemotron_h" else None)
    return 2 * VALUE if asked == FLOAT32 else VALUE


def _kinds(text: Mapping[str, Any], layers: int) -> list[str]:
    """layer_types of configs written before transformers had the key."""
    if text.get("attn_layer_period"):
        period, offset = text["attn_layer_period"], text.get("attn_layer_offset", 0)
        return ["full_attention" if i % period == offset else "mamba" for i in range(layers)]
    if text.get("model_type") == "qwen3_next" or text.get("full_attention_interval"):
        interval = text.get("full_attention_interval", 4)
        return ["linear" if (i + 1) % interval else "full_attention" for i in range(layers)]
    if text.get("hybrid_override_pattern"):
        kept = {"*": "full_attention", "M": "mamba"}
        return [kept.get(c, "mlp") for c in text["hybrid_override_pattern"]]
    if text.get("attn_layer_indices") is not None:
        every = ["mamba"] * layers
        for i in text["attn_layer_indices"]:
            every[i] = "full_attention"
        return every
    if text.get("attention_chunk_size"):
        interval = text.get("no_rope_layer_interval", 4)
        rope = text.get("no_rope_layers") or [(i + 1) % interval for i in range(layers)]
        return ["chunked_attention" if r else "full_attention" for r in rope]
    if not text.get("sliding_window") or text.get("use_sliding_window") is False:
        return ["full_attention"] * layers
    pattern = text.get("sliding_window_pattern") or (
        2 if text.get("model_type") == "gemma2" else None
    )
    if pattern is None:
        return ["sliding_attention"] * layers
    return ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
