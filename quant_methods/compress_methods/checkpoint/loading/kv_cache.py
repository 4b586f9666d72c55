"""Keys, values and queries of a transformers model where a server would cache them: seen, and
rounded as an FP8 cache rounds them.

A cache in FP8 (E4M3) holds k / scale and v / scale, one scale of each for a layer: the largest
value seen / 448, so nothing that calibration saw is clipped. Attention in FP8 divides queries by
one, too. Scales lie in a checkpoint as `MODULE.k_scale`, `MODULE.v_scale` and `MODULE.q_scale`,
float32 [1], where MODULE is the attention layer's name: vLLM's names. `QuantizationConfig` there
moves them to its layers.

GPUs round to the nearest E4M3. vLLM 0.32's kernel for CPUs cuts what lies between two towards zero,
which makes all values a little smaller and loses more: `fp8-cpu` here.

Transformers' attention layers all call a function of a table; this one stands before it. Fails
where: the model's class has attention of its own, latent attention (MLA), or is no decoder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_methods.checkpoint.compressed import KV_SCALES, open_compressed, read_json
from compress_methods.errors import CheckpointError
from compress_methods.formats.encoding.small_floats import MOST_E4M3, decode_e4m3, encode_e4m3
from compress_methods.lazy import torch
from compress_methods.model.skeleton import Skeleton
from compress_methods.model.task import NEXT_TOKEN

if TYPE_CHECKING:
    from torch import Tensor, nn

Change = Callable[["nn.Module", "Tensor", "Tensor", "Tensor"], tuple["Tensor", "Tensor", "Tensor"]]
"""Of an attention layer, its queries, keys and values [sequences, heads, length, size]."""
EAGER = "eager"


def attention_modules(skeleton: Skeleton) -> list[str]:
    """Attention layers of the blocks whose keys and values a server caches; empty where there are
    none that calibration can see."""
    if skeleton.architecture.loss != NEXT_TOKEN:
        return []
    return [
        name
        for name, module in skeleton.model.named_modules()
        if type(module).__name__.endswith("Attention")
        and skeleton.block_of(name) is not None
        and hasattr(module, "layer_idx")
        and hasattr(module, "config")
        and not hasattr(module, "kv_b_proj")
    ]


@contextmanager
def at_attention(model: nn.Module, change: Change) -> Iterator[None]:
    """While it lasts, attention of `model` gets what `change` makes of its inputs."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    mine = set(map(id, model.modules()))
    name = str(getattr(model.config, "_attn_implementation", EAGER))
    local = ALL_ATTENTION_FUNCTIONS._local_mapping
    before = ALL_ATTENTION_FUNCTIONS.get(name)
    had = local.get(name)

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *a: Any, **k: Any):  # type: ignore[no-untyped-def]
        inner = before or sys.modules[type(module).__module__].eager_attention_forward
        if id(module) in mine:
            query, key, value = change(module, query, key, value)
        return inner(module, query, key, value, *a, **k)

    local[name] = attend
    try:
        yield
    finally:
        local.pop(name)
        if had is not None:
            local[name] = had


class Seen:
    """The largest values that attention layers were given, by name of the layer: q, k, v."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        self.most: dict[str, list[float]] = {}

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = [float(t.detach().abs().amax()) for t in (query, key, value)]
        name = self.names[id(module)]
        self.most[name] = [
            max(pair) for pair in zip(found, self.most.get(name, found), strict=True)
        ]
        return query, key, value


def scales_of(most: Mapping[str, list[float]]) -> dict[str, float]:
    """Scales by the names of their tensors, of the largest values of layers: the next bfloat16, as
    vLLM loads them in the dtype of the model."""

    def scale(value: float) -> float:
        bits = torch.tensor([(value or MOST_E4M3) / MOST_E4M3]).view(torch.int32)
        return float((bits + 0xFFFF & -0x10000).view(torch.float32))

    return {
        f"{module}.{leaf}": scale(value)
        for module, values in most.items()
        for leaf, value in zip(KV_SCALES, values, strict=True)
    }


def read_scales(directory: Path) -> dict[str, float]:
    """Scales of a checkpoint by the names of their tensors; `CheckpointError` where it has none."""
    block = read_json(directory / "config.json").get("quantization_config") or {}
    if not isinstance(block, dict) or block.get("kv_cache") is None:
        raise CheckpointError(
            f"{directory}: has no scales for an FP8 KV cache; convert with kv_cache: fp8"
        )
    return {name: float(e.read()) for name, e in open_compressed(directory).kv_scales.items()}


@contextmanager
def rounded_cache(model: nn.Module, held: Mapping[str, float], kind: str = "fp8") -> Iterator[None]:
    """While it lasts, `model` has the keys and values that an FP8 cache with such scales gives
    back; `kind` is one of `CACHES`."""
    read_back = CACHES[kind]
    names = {id(module): name for name, module in model.named_modules()}

    def rounded(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        name = names[id(module)]
        scales = [held.get(f"{name}.{leaf}") for leaf in ("k_scale", "v_scale")]
        if None in scales:
            return query, key, value
        kept = (read_back(t, s) for t, s in zip((key, value), scales, strict=True) if s)
        return query, *kept  # type: ignore[return-value]

    with at_attention(model, rounded):
        yield


def round_e4m3(x: Tensor, scale: float) -> Tensor:
    """What is read back of values that a cache holds in E4M3; those beyond its largest clip."""
    scaled = (x.float() / scale).clamp(-MOST_E4M3, MOST_E4M3)
    return (decode_e4m3(encode_e4m3(scaled)) * scale).to(x.dtype)


def cut_e4m3(x: Tensor, scale: float) -> Tensor:
    """The same where a cache cuts towards zero: of the bits of a float32 those stay that E4M3 has,
    below its least normal value multiples of the least."""
    scaled = (x.float() * (1 / scale)).clamp(-MOST_E4M3, MOST_E4M3)
    normal = (scaled.contiguous().view(torch.int32) & -(1 << 20)).view(torch.float32)
    tiny = (scaled * 2.0**9).trunc() * 2.0**-9
    return (torch.where(scaled.abs() < 2.0**-6, tiny, normal) * scale).to(x.dtype)


CACHES = {"fp8": round_e4m3, "fp8-cpu": cut_e4m3}
"""What is read back of a cache, on GPUs and on CPUs."""
