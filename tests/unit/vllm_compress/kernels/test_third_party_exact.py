"""Other people's checkpoints mean what they meant before the plugin was installed: the product is
exact unless VLLM_COMPRESS_KERNEL names another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module, Parameter

from tests.e2e.support.foreign import pack_words

pytest.importorskip("vllm")
ROWS, COLS, GROUP = 64, 256, 128


def parameter(data: Tensor) -> Parameter:
    made = Parameter(data, requires_grad=False)
    made.output_dim = 0  # type: ignore[attr-defined]
    return made


def served(scales: Tensor, zeros: Tensor | None, codes: Tensor, bits: int) -> Any:
    """A layer of a compressed-tensors checkpoint, as vLLM hands it to the kernel."""
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
        MPLinearLayerConfig,
    )
    from vllm.scalar_type import scalar_types

    from vllm_compress.kernels import third_party_kernel

    third_party_kernel._say_once.cache_clear()
    kinds = {(4, True): scalar_types.uint4b8, (8, True): scalar_types.uint8b128}
    kinds |= {(2, True): scalar_types.uint2b2, (4, False): scalar_types.uint4}
    shape, kind = (COLS, ROWS), kinds[bits, zeros is None]
    config = MPLinearLayerConfig(shape, shape, kind, scales.dtype, GROUP, zeros is not None)
    layer = Module()
    layer.register_parameter("weight_packed", parameter(pack_words(codes, bits, 1)))
    layer.register_parameter("weight_scale", parameter(scales))
    point = None
    if zeros is not None:
        layer.register_parameter("weight_zero_point", parameter(pack_words(zeros, bits, 0)))
        point = "weight_zero_point"
    kernel = third_party_kernel.CompressLinearKernel(
        config, "weight_packed", "weight_scale", w_zp_param_name=point
    )
    assert kernel.can_implement(config) == (True, None)
    kernel.process_weights_after_loading(layer)
    return lambda x: kernel.apply_weights(layer, x)


def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines of the log, as they come."""
    from vllm_compress.kernels import third_party_kernel

    lines: list[str] = []
    monkeypatch.setattr(third_party_kernel.logger, "info", lambda text, *a: lines.append(text % a))
    return lines


@pytest.fixture
def inputs() -> Tensor:
    """Activations with an outlier, which int8 steps would cost the others."""
    torch.manual_seed(0)
    x = torch.randn(5, COLS)
    x[:, 7] *= 100
    return x


def matrix(bits: int, with_zeros: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Codes and zeros, and scales of float16."""
    codes = torch.randint(0, 2**bits, (ROWS, COLS), dtype=torch.uint8)
    shape = (ROWS, COLS // GROUP)
    zeros = torch.randint(0, 2**bits, shape, dtype=torch.uint8) if with_zeros else None
    return codes, zeros, (torch.rand(shape) * 0.1 + 0.01).half()


def product(x: Tensor, codes: Tensor, zeros: Tensor | None, scales: Tensor, bits: int) -> Tensor:
    """float64, from what the checkpoint says."""
    middle = torch.full(scales.shape, 2 ** (bits - 1)) if zeros is None else zeros
    spread = [t.double().repeat_interleave(GROUP, 1) for t in (scales, middle)]
    return x.double() @ (spread[0] * (codes.double() - spread[1])).T


@pytest.mark.parametrize(("bits", "zeros"), [(2, False), (4, False), (4, True), (8, False)])
def test_the_product_is_exact_by_default(
    inputs: Tensor, bits: int, zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_COMPRESS_KERNEL", raising=False)
    lines, (codes, points, scales) = said(monkeypatch), matrix(bits, zeros)
    out = served(scales.float(), points, codes, bits)(inputs)
    expected = product(inputs, codes, points, scales, bits)
    assert (out.double() - expected).abs().max() < 1e-5 * expected.abs().max()
    assert len(lines) == 1
    assert "(kernel cpu_exact;" in lines[0]
    assert "VLLM_COMPRESS_KERNEL=cpu_exact for exact activations, =cpu for faster" in lines[0]


def test_bfloat16_activations_are_not_rounded_further(
    inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output's own rounding is all that is lost."""
    monkeypatch.delenv("VLLM_COMPRESS_KERNEL", raising=False)
    codes, points, scales = matrix(4, False)
    x, scales = inputs.bfloat16(), scales.bfloat16()
    out = served(scales, points, codes, 4)(x)
    expected = product(x, codes, points, scales, 4)
    assert ((out.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-3).all()


def test_the_faster_product_is_by_choice(inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_COMPRESS_KERNEL", "cpu")
    lines, (codes, points, scales) = said(monkeypatch), matrix(4, False)
    out = served(scales.float(), points, codes, 4)(inputs)
    expected = product(inputs, codes, points, scales, 4)
    error = (out.double() - expected).abs().max() / expected.abs().max()
    assert 1e-4 < error < 0.05
    assert "(kernel cpu;" in lines[0]


def test_scales_that_16_bits_do_not_hold_stay_as_they_are(
    inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_COMPRESS_KERNEL", raising=False)
    codes, points, scales = matrix(4, False)
    scales = scales.float() * 1.0003
    assert not torch.equal(scales.half().float(), scales)
    out = served(scales, points, codes, 4)(inputs)
    expected = product(inputs, codes, points, scales, 4)
    assert (out.double() - expected).abs().max() < 1e-5 * expected.abs().max()
