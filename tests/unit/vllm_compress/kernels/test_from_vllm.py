"""vLLM's own kernels get the numbers that our formats hold, in the layout vLLM loads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from vllm.scalar_type import scalar_types

from compress_methods.formats import Format, Stored
from compress_methods.formats.floats import Float, FloatSolution
from compress_methods.formats.integer import Integer, IntegerSolution
from compress_methods.formats.lookup import Lookup
from compress_methods.kernels import Want
from vllm_compress.kernels import from_vllm, from_vllm_floats, ops, runtime

ROWS, COLS = 136, 256


def stored(fmt: Format) -> Stored:
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLS) * torch.logspace(-2, 1, ROWS)[:, None]
    return Stored.whole(fmt, fmt.pack(fmt.nearest(weight)), (ROWS, COLS))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("cols", [40, 96])
def test_codes_are_one_stream_of_bits(bits: int, cols: int) -> None:
    codes = torch.randint(0, 2**bits, (7, cols), dtype=torch.uint8)
    words = from_vllm.pack_int32(codes, bits)
    assert words.shape == (7, -(-cols * bits // 32))
    found = np.unpackbits(words.numpy().view(np.uint8), axis=1, bitorder="little")
    expected = np.unpackbits(codes.numpy()[..., None], axis=2, bitorder="little")[..., :bits]
    assert np.array_equal(found[:, : cols * bits], expected.reshape(7, -1))
    assert not found[:, cols * bits :].any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_tensors_for_vllms_kernels_decode_to_the_same_codes(bits: int, symmetric: bool) -> None:
    """In compressed-tensors' layout, as vLLM itself unpacks it."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        unpack_quantized_values_into_int32,
    )

    fmt = Integer(bits=bits, group_size=32, symmetric=symmetric)
    kind = {4: scalar_types.uint4, 8: scalar_types.uint8}[bits]
    solution = fmt.solution(stored(fmt).tensors)
    words = from_vllm.pack_int32(solution.codes, bits)
    assert words.shape == (ROWS, COLS * bits // 32)
    assert torch.equal(unpack_quantized_values_into_int32(words, kind, 1), solution.codes.int())
    if solution.zeros is not None:
        zeros = from_vllm.pack_int32(solution.zeros.T, bits).T
        decoded = unpack_quantized_values_into_int32(zeros, kind, 0)
        assert torch.equal(decoded, solution.zeros.int())


def test_vllms_int8_kernel_gets_the_values_of_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small codes only: without VNNI larger ones saturate, which is why it is refused there."""
    from vllm.config import VllmConfig, set_current_vllm_config

    fmt = Integer(bits=8, group_size=-1, activations="int8")
    codes = torch.randint(128 - 63, 128 + 64, (128, 256)).to(torch.uint8)
    tensors = fmt.pack(IntegerSolution(codes, torch.full((128, 1), 0.01)))
    layer = torch.nn.Module()
    layer.bias = None
    monkeypatch.setenv(ops.KERNEL_VARIABLE, "vllm")
    monkeypatch.setattr(from_vllm, "require_instructions", lambda *_: None)
    with set_current_vllm_config(VllmConfig()):
        matrix = Stored.whole(fmt, tensors, (128, 256))
        prepared = runtime.prepare([matrix], Want(dtype=torch.bfloat16, host=layer))
        assert prepared.kernel == "vllm_int8"
        x = (torch.rand(4, 256) + 0.5).bfloat16()
        out = ops.product_of(prepared)(x, [], None).float()
    expected = fmt.quantize_activations(x.float()) @ fmt.unpack(tensors).T
    # Half a step of bfloat16; a whole one without AVX-512, where vLLM cuts the last bits off.
    assert torch.allclose(out, expected, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_vllm_is_asked_for_the_type_that_the_codes_are(
    bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.kernels import linear

    asked: list[Any] = []
    monkeypatch.setattr(
        linear, "choose_mp_linear_kernel", lambda c: lambda *a, **k: asked.append(c)
    )
    fmt = Integer(bits, 64, symmetric=symmetric)
    from_vllm.VllmMixedPrecision().choose(fmt, ROWS, COLS, torch.bfloat16)
    kind = asked[0].weight_type
    assert (kind.size_bits, kind.bias) == (bits, 2 ** (bits - 1) if symmetric else 0)
    assert (asked[0].group_size, asked[0].zero_points) == (64, not symmetric)
    assert asked[0].full_weight_shape == (COLS, ROWS)


def test_levels_that_no_type_of_vllms_has_are_left_to_others() -> None:
    takes = from_vllm.VllmMixedPrecision().takes
    assert takes(Integer(2, 128))
    assert not takes(Integer(2, 128, levels="mid"))
    assert not takes(Lookup(4, 128))
    assert not from_vllm_floats.VllmFp8().takes(Float("fp8", 64))


def layer_of(kernel: from_vllm.FromVllm, matrix: Stored, pad: int) -> torch.nn.Module:
    layer = torch.nn.Module()
    kernel.register(layer, matrix, pad, torch.bfloat16)
    return layer


@pytest.mark.parametrize("activations", [None, "fp8"])
@pytest.mark.parametrize("blocks", [False, True])
def test_floats_of_8_bits_are_as_vllm_loads_them(activations: str | None, blocks: bool) -> None:
    fmt = Float("fp8", *((128, 128) if blocks else ()), activations=activations)
    matrix, pad = stored(fmt), 14
    layer = layer_of(from_vllm_floats.VllmFp8(), matrix, pad)
    name = "weight_scale_inv" if blocks and activations is None else "weight_scale"
    weight, scales = layer.weight.float(), getattr(layer, name)
    if blocks:
        assert layer.weight_block_size == [128, 128]
        scales = scales.repeat_interleave(128, 0)[: ROWS + pad].repeat_interleave(128, 1)
    else:
        assert (layer.weight.input_dim, layer.weight.output_dim) == (0, 1)
        weight = weight.T
    found = weight * scales
    assert torch.equal(found[:ROWS], matrix.values())
    assert not found[ROWS:].any()


def test_where_e4m3_is_another_rows_keep_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """On AMD's MI300: the same bits are half as much, and those of minus zero are no number."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_fp8_fnuz", classmethod(lambda _: True))
    matrix = stored(Float("fp8", activations="fp8"))
    codes = matrix.tensors["weight_packed"].view(torch.uint8)
    codes[0, :2] = torch.tensor([0x80, 0x00], dtype=torch.uint8)
    layer = layer_of(from_vllm_floats.VllmFp8(), matrix, 6)
    assert layer.weight.dtype == torch.float8_e4m3fnuz
    found = layer.weight.float().T * layer.weight_scale
    assert torch.equal(found[:ROWS], matrix.values())
    assert not found[ROWS:].any()


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_floats_of_4_bits_are_as_vllm_loads_them(kind: str) -> None:
    """Neighbours share a byte, as compressed-tensors' own code takes them apart."""
    kernel = from_vllm_floats.VllmFp4()
    matrix, pad = stored(Float(kind)), 6
    assert kernel.holds(matrix)
    layer = layer_of(kernel, matrix, pad)
    codes = unpack_fp4_from_uint8(layer.weight.data, ROWS + pad, COLS, torch.float32)
    scales = layer.weight_scale
    if kind == "mxfp4":
        assert scales.dtype == torch.uint8
        scales = torch.exp2(scales.float() - 127)
    else:
        assert scales.dtype == torch.float8_e4m3fn
        scales = scales.float() * layer.weight_global_scale
    found = codes * scales.repeat_interleave(COLS // scales.shape[1], 1)
    assert torch.equal(found[:ROWS], matrix.values())
    assert not found[ROWS:].any()


def test_rows_too_far_apart_for_one_scale_are_left_to_others() -> None:
    fmt = Float("nvfp4")
    solution = fmt.nearest(torch.randn(2, 32))
    assert isinstance(solution, FloatSolution)
    assert solution.of_rows is not None
    solution.of_rows[1] = solution.of_rows[0] * 2**-20
    apart = Stored.whole(fmt, fmt.pack(solution), (2, 32))
    assert not from_vllm_floats.VllmFp4().holds(apart)


@pytest.mark.parametrize("capable", [True, False])
def test_cutlass_is_not_taken_where_it_has_no_int8(
    capable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is chosen on every card of NVIDIA's, and fails with the first request from 10.0 on."""

    class CutlassInt8ScaledMMLinearKernel:
        pass

    def has(capability: int) -> bool:
        return capable and capability == 100

    monkeypatch.setattr(from_vllm.current_platform, "has_device_capability", has)
    if not capable:
        from_vllm.require_instructions(CutlassInt8ScaledMMLinearKernel(), torch.bfloat16)
        return
    with pytest.raises(ValueError, match=r"ends at compute capability 9\.0"):
        from_vllm.require_instructions(CutlassInt8ScaledMMLinearKernel(), torch.bfloat16)
