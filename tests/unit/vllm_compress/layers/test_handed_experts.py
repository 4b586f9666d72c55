"""Experts that vLLM's own methods multiply on GPUs get, bit for bit, the tensors of a checkpoint of
compressed-tensors, and every layer that they cannot take is told in one line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compress_methods.checkpoint.interchange.compressed_tensors import writing
from compress_methods.errors import CheckpointError
from compress_methods.formats import Format, Stored
from compress_methods.formats.floats import Float
from compress_methods.formats.integer import Integer
from compress_methods.formats.lookup import Lookup

pytest.importorskip("vllm")

from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_fp8 as fp8,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_int8 as int8,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as wna16,
)

from tests.unit.vllm_compress.layers.test_experts import (
    EXPERTS,
    FORMATS,
    HIDDEN,
    INNER,
    SHARDS,
    Layer,
    load,
    packed,
)
from vllm_compress.layers import handed_experts
from vllm_compress.layers.experts import CompressedExperts
from vllm_compress.layers.handed_experts import experts_method

WNA16 = [
    Integer(4, 32),
    Integer(4, -1),
    Integer(4, 64, symmetric=False),
    Integer(8, 128),
    Integer(2, 32),
]
INT3 = Integer(3, 64, symmetric=False)
W8A8: list[Format] = [
    Integer(8, -1, activations="int8"),
    Float("fp8", activations="fp8"),
    Float("fp8", group_size=128, group_rows=128, activations="fp8"),
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """vLLM's methods up to where a kernel is made: what each would give to it, as `made`."""
    seen: dict[str, Any] = {}

    def keep(self: Any, layer: Any) -> None:
        seen["made"] = dict(layer.named_parameters())

    monkeypatch.setattr(handed_experts.current_platform, "is_cpu", lambda: False)
    chosen = (wna16.WNA16MoEBackend.MARLIN, object)
    for module, select in (
        (wna16, "select_wna16_moe_backend"),
        (int8, "select_int8_moe_backend"),
        (fp8, "select_fp8_moe_backend"),
    ):
        monkeypatch.setattr(module, select, lambda **asked: seen.update(asked) or chosen)
    monkeypatch.setattr(fp8, "validate_fp8_block_shape_moe", lambda *_: None)
    monkeypatch.setattr(wna16, "check_moe_marlin_supports_config", lambda *_, **__: True)
    for kind in (
        wna16.CompressedTensorsWNA16MoEMethod,
        int8.CompressedTensorsW8A8Int8MoEMethod,
        fp8.CompressedTensorsW8A8Fp8MoEMethod,
    ):
        monkeypatch.setattr(kind, "process_weights_after_loading", keep)
    return seen


def moe(rank: int = 0, ranks: int = 1, **changes: Any) -> Any:
    settings = {"tp_rank": rank, "tp_size": ranks, "swiglu_limit": None, "has_bias": False}
    return SimpleNamespace(**{**settings, "is_act_and_mul": True, **changes})


def served(targets: Any, tensors: Any, rank: int = 0, ranks: int = 1, held: Any = None) -> Any:
    layer = Layer(list(range(EXPERTS)) if held is None else held)
    made: Any = experts_method(targets, moe(rank, ranks), None, "mlp.experts")
    made.create_weights(layer, len(layer.held), HIDDEN, INNER // ranks, torch.bfloat16)
    load(layer, made, tensors)
    made.process_weights_after_loading(layer)
    made.process_weights_after_loading(layer)  # vLLM may ask twice
    return made


def exported(targets: Any, tensors: Any, expert: int, shard: str) -> dict[str, Tensor]:
    """An expert's matrix as `convert --export compressed-tensors` writes it."""
    target = targets[expert, shard]
    stored = Stored.whole(target.format, tensors[expert, shard], target.shape)
    found = writing.write("m", stored)
    return {name.removeprefix("m."): tensor for name, tensor in found.items()}


@pytest.mark.parametrize("fmt", [*WNA16, *W8A8], ids=lambda f: f.describe())
def test_vllms_method_gets_the_tensors_of_an_export(fmt: Format, gpu: dict[str, Any]) -> None:
    targets, tensors = packed(fmt)
    served(targets, tensors)
    made = gpu["made"]
    names = {name.partition("_")[2] for name in made if "shape" not in name}
    for place in range(EXPERTS):
        theirs = {shard: exported(targets, tensors, place, shard) for shard in SHARDS}
        assert names <= theirs["w1"].keys()
        for name in names:
            both = torch.cat([theirs[shard][name] for shard in ("w1", "w3")])
            for whole, found in (
                (both, made[f"w13_{name}"]),
                (theirs["w2"][name], made[f"w2_{name}"]),
            ):
                assert torch.equal(whole.to(found.dtype).reshape(found[place].shape), found[place])


@pytest.mark.parametrize("fmt", [Integer(4, 32), Integer(4, 64, symmetric=False)])
def test_vllm_unpacks_the_values_of_the_experts(fmt: Integer, gpu: dict[str, Any]) -> None:
    """By its own arithmetic, of the backend that dequantizes first."""
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import (
        _process_weights_emulation_gptq,
    )

    targets, tensors = packed(fmt)
    served(targets, tensors)
    made, kinds = gpu["made"], ("weight_packed", "weight_scale", "weight_zero_point")
    each = [made.get(f"{side}_{kind}") for kind in kinds for side in ("w13", "w2")]
    first, last = _process_weights_emulation_gptq(*each)[:2]
    for place in range(EXPERTS):
        gate, up, down = (fmt.unpack(tensors[place, shard]) for shard in ("w1", "w3", "w2"))
        for found, values in ((first[place], torch.cat([gate, up])), (last[place], down)):
            assert torch.allclose(found.float(), values, rtol=2**-8, atol=0)


def test_3_bits_are_one_stream_along_columns_and_zero_points_along_rows(
    gpu: dict[str, Any],
) -> None:
    """As compressed-tensors packs them since 0.18; the exporter writes none of 3."""
    targets, tensors = packed(INT3)
    served(targets, tensors)
    for place in range(EXPERTS):
        parts = [INT3.solution(tensors[place, shard]) for shard in ("w1", "w3")]
        codes = torch.cat([part.codes for part in parts])
        zeros = torch.cat([part.zeros for part in parts if part.zeros is not None])
        words = gpu["made"]["w13_weight_packed"][place]
        assert torch.equal(stream(words), codes)
        assert torch.equal(stream(gpu["made"]["w13_weight_zero_point"][place].T), zeros.T)


def stream(words: Tensor) -> Tensor:
    """Codes of 3 bits in rows of int32 words, the first in the lowest bits of the first."""
    row = words.contiguous().numpy().view(np.uint8)
    bits = np.unpackbits(row, axis=1, bitorder="little").reshape(len(row), -1, 3)
    return torch.from_numpy(np.packbits(bits, axis=2, bitorder="little")[..., 0])


def test_the_oracle_is_asked_for_what_the_format_is(gpu: dict[str, Any]) -> None:
    from vllm.scalar_type import scalar_types

    targets, _ = packed(INT3)
    method = experts_method(targets, moe(), None, "mlp.experts")
    assert isinstance(method, wna16.CompressedTensorsWNA16MoEMethod)
    assert gpu["weight_key"].dtype == scalar_types.uint3
    assert gpu["may_have_zp"]
    assert (gpu["quant_config"].num_bits, gpu["quant_config"].group_size) == (3, 64)
    experts_method(packed(W8A8[2])[0], moe(), None, "mlp.experts")
    assert "128" in str(gpu["weight_key"].scale.group_shape)


@pytest.mark.parametrize("fmt", [WNA16[0], WNA16[2], W8A8[1]], ids=lambda f: f.describe())
def test_ranks_have_their_parts(fmt: Format, gpu: dict[str, Any]) -> None:
    """Of both kinds of parallelism."""
    targets, tensors = packed(fmt)
    served(targets, tensors)
    whole = gpu["made"]
    name = next(name for name in whole if name.startswith("w13_weight"))
    parts = []
    for rank in range(2):
        served(targets, tensors, rank, 2)
        parts.append(gpu["made"][name].unflatten(1, (2, -1)))
    assert torch.equal(torch.cat(parts, 2).flatten(1, 2), whole[name])
    served(targets, tensors, held=[3, 1])
    assert torch.equal(gpu["made"][name], whole[name][[3, 1]])


def test_what_gpus_have_no_method_for_is_one_line(gpu: dict[str, Any]) -> None:
    words = {
        r"lookup3 g64.* are served on CPUs only": packed(Lookup(3, 64))[0],
        r"int4 g32, int8 row are served on CPUs only": packed(FORMATS[0], FORMATS[2])[0],
        r"int2 g64 mid are served": packed(Integer(2, 64, levels="mid"))[0],
        r"fp8 row are served on CPUs only": packed(Float("fp8"))[0],
    }
    for line, targets in words.items():
        with pytest.raises(CheckpointError, match=line):
            experts_method(targets, moe(), None, "mlp.experts")
    with pytest.raises(CheckpointError, match="int4 g32 with biases are served on CPUs only"):
        experts_method(packed(WNA16[0])[0], moe(has_bias=True), None, "mlp.experts")


def test_vllms_reasons_are_passed_on(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def none(**_: Any) -> Any:
        raise NotImplementedError("No WNA16 MoE backend\nsupports it")

    monkeypatch.setattr(wna16, "select_wna16_moe_backend", none)
    with pytest.raises(CheckpointError, match=r"no kernel here for experts in int4 g32: No WNA16"):
        experts_method(packed(WNA16[0])[0], moe(), None, "mlp.experts")


def test_cpus_keep_ours() -> None:
    assert type(experts_method(packed(WNA16[0])[0], moe(), None, "x")) is CompressedExperts
