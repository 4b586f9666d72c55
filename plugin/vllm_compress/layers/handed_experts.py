"""Layers of compressed experts whose product is vLLM's own, on GPUs: its oracle chooses the kernel.

Integers without int8 activations, of 2 to 8 bits and by group or row, become what vLLM makes of a
compressed-tensors checkpoint of WNA16; int8 by row with int8 activations and E4M3 with fp8
activations, by row or blocks, its W8A8. Each expert's matrices are packed as those checkpoints pack
them and laid into the parameters that vLLM's method makes; all that follows is that method's.

Fails, in one line, where all matrices of a layer's experts do not share such a format, where they
have biases, and where vLLM has no kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.platforms import current_platform

from compress_methods.errors import CheckpointError
from compress_methods.formats import MAIN_TENSOR, Format, Stored
from compress_methods.formats.encoding.grouped import SCALES
from compress_methods.formats.floats import Float
from compress_methods.formats.integer import Integer
from vllm_compress.handed import handed_kind, require_served_experts
from vllm_compress.kernels.from_vllm import pack_int32
from vllm_compress.layers.claims import Claims
from vllm_compress.layers.experts import DOWN, GATE, UP, CompressedExperts, LoadedExperts, Place
from vllm_compress.targets import Target

ACTIVATIONS = {"strategy": "token", "dynamic": True, "symmetric": True, "num_bits": 8}


class HandedExperts(LoadedExperts):
    """Loads as ours do; `kind` is the one of vLLM's methods that this stands before."""

    kind: ClassVar[Any]

    def create_weights(self, layer: Any, num_experts: int, *args: Any, **kwargs: Any) -> None:
        self.local, self.given = num_experts, (args, kwargs)
        super().create_weights(layer, num_experts, *args, **kwargs)

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.found is None:
            return
        device, kind = self.let_go(layer), self.kind
        args, kwargs = self.given
        with torch.device(device):
            kind.create_weights(self, layer, self.local, *args, **kwargs)
        for place, expert in enumerate(self.here(layer)):
            for shards, prefix in (((GATE, UP), "w13_"), ((DOWN,), "w2_")):
                mine = [s for s in shards if (expert, s) in self.targets]
                parts = [tensors_of(self.piece(expert, s, device)) for s in mine]
                for name in parts[0]:
                    whole = torch.cat([part[name] for part in parts])
                    _fill(layer.get_parameter(prefix + name).data[place], whole)
        self.found = None
        kind.process_weights_after_loading(self, layer)


def _fill(into: Tensor, found: Tensor) -> None:
    if into.shape != found.shape:
        raise CheckpointError(
            f"vLLM wants {list(into.shape)} of an expert, its matrices give {list(found.shape)}"
        )
    into.copy_(found)


def tensors_of(stored: Stored) -> dict[str, Tensor]:
    """One expert's matrix by compressed-tensors' names, laid out as its checkpoints are."""
    fmt = stored.format
    if isinstance(fmt, Float):
        return {
            "weight": stored.tensors[MAIN_TENSOR],
            "weight_scale": stored.tensors[SCALES].float(),
        }
    assert isinstance(fmt, Integer)
    solution = fmt.solution(stored.tensors)
    scales = solution.scales
    if fmt.activations is not None:
        signed = (solution.codes.short() - 128).to(torch.int8)
        return {"weight": signed, "weight_scale": scales.float()}
    found = {"weight_packed": pack_int32(solution.codes, fmt.bits), "weight_scale": scales}
    if solution.zeros is not None:
        found["weight_zero_point"] = pack_int32(solution.zeros.T, fmt.bits).T
    return found


def arguments(fmt: Format) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """compressed-tensors' words for weights and activations of a format."""
    if isinstance(fmt, Float):
        blocks = fmt.group_rows > 1
        weights: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
        weights["strategy"] = "block" if blocks else "channel"
        if blocks:
            weights["block_structure"] = [fmt.group_rows, fmt.group_size]
            grouped = {"strategy": "group", "group_size": fmt.group_size}
            return weights, {**ACTIVATIONS, "type": "float", **grouped}
        return weights, {**ACTIVATIONS, "type": "float"}
    assert isinstance(fmt, Integer)
    weights = {"num_bits": fmt.bits, "type": "int", "symmetric": fmt.symmetric}
    weights["strategy"] = "channel" if fmt.group_size < 0 else "group"
    if fmt.group_size > 0:
        weights["group_size"] = fmt.group_size
    inputs = {**ACTIVATIONS, "type": "int"} if fmt.activations is not None else None
    return weights, inputs


def handed(fmt: Format, targets: Mapping[Place, Target], moe: Any, claims: Any, name: str) -> Any:
    """vLLM's method for a format, that loads as ours do; raises what vLLM does where it has no
    kernel."""
    from compressed_tensors.quantization import QuantizationArgs
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_fp8 as fp8,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_int8 as int8,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as wna16,
    )

    kinds = {
        "wna16": wna16.CompressedTensorsWNA16MoEMethod,
        "int8": int8.CompressedTensorsW8A8Int8MoEMethod,
        "fp8": fp8.CompressedTensorsW8A8Fp8MoEMethod,
    }
    kind = kinds[str(handed_kind(fmt))]
    made: Any = type(f"Handed{kind.__name__}", (HandedExperts, kind), {"kind": kind})
    method = made.__new__(made)
    weights, inputs = (None if a is None else QuantizationArgs(**a) for a in arguments(fmt))
    kind.__init__(method, weights, inputs, moe, name)
    method.begin(targets, claims)
    return method


def experts_method(
    targets: Mapping[Place, Target], moe: Any, claims: Claims | None, name: str
) -> FusedMoEMethodBase:
    """Ours on CPUs, vLLM's elsewhere; `CheckpointError` where it has none."""
    if current_platform.is_cpu():
        return CompressedExperts(targets, moe, claims)
    formats = {target.format for target in targets.values()}
    module = next(iter(targets.values())).module
    require_served_experts(module, formats, on_cpu=False, has_bias=moe.has_bias)
    (fmt,) = formats
    try:
        found: FusedMoEMethodBase = handed(fmt, targets, moe, claims, name)
    except (ValueError, NotImplementedError, AssertionError) as problem:
        reasons = " ".join(str(problem).split())
        raise CheckpointError(
            f"{module}: vLLM has no kernel here for experts in {fmt.describe()}: {reasons}"
        ) from None
    return found
