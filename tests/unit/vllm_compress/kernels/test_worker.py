"""What CPU workers get around the products: vLLM's C++ norms, in eager mode only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("vllm")

from vllm import ir
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform

from vllm_compress.kernels import worker as cpu

OPS = (ir.ops.rms_norm, ir.ops.fused_add_rms_norm)

if not current_platform.is_cpu():
    pytest.skip("vLLM's norms on CPUs", allow_module_level=True)


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    """vLLM's order on CPUs, before and after."""
    for op in OPS:
        op.set_default(["native"])
    ir.set_default_torch_wrap(False)
    yield
    for op in OPS:
        op.set_default(["native"])
    ir.set_default_torch_wrap(True)


def config(mode: CompilationMode) -> VllmConfig:
    found = VllmConfig()
    found.compilation_config.mode = mode
    return found


@pytest.mark.parametrize("mode", [CompilationMode.NONE, CompilationMode.DYNAMO_TRACE_ONCE])
def test_norms_are_replaced_in_eager_mode_only(mode: CompilationMode) -> None:
    with set_current_vllm_config(config(mode)):
        cpu.prepare_worker()
        cpu.prepare_worker()
    taken = mode == CompilationMode.NONE and cpu.norms_round()
    first = [cpu.PROVIDER] if taken else []
    assert [op.get_priority() for op in OPS] == [[*first, "native"]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7])
def test_norms_are_vllms_to_one_rounding(dtype: torch.dtype, tokens: int) -> None:
    x, residual = torch.randn(2, tokens, 96).to(dtype)
    weight = torch.rand(96).to(dtype)
    wanted = ir.ops.rms_norm(x, weight, 1e-5)
    wanted_sum, wanted_residual = ir.ops.fused_add_rms_norm(x, residual, weight, 1e-5)
    cpu.use_compiled_norms()
    step = torch.finfo(dtype).eps
    # vLLM's own rounds twice in 16 bits: before the weight and after it.
    assert torch.allclose(ir.ops.rms_norm(x, weight, 1e-5), wanted, rtol=2 * step, atol=step)
    got, kept = ir.ops.fused_add_rms_norm.maybe_inplace(x.clone(), residual.clone(), weight, 1e-5)
    assert torch.allclose(got, wanted_sum, rtol=2 * step, atol=step)
    assert torch.equal(kept, wanted_residual)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(4, 192)[:, :96], torch.rand(96)),
        (torch.randn(4, 88), torch.rand(88)),
        (torch.randn(4, 96), None),
        (torch.randn(4, 96), torch.rand(96).bfloat16()),
    ],
    ids=["not contiguous", "odd width", "no weight", "another dtype"],
)
def test_what_the_compiled_norms_cannot_do_is_left_to_vllm(
    x: torch.Tensor, weight: torch.Tensor | None
) -> None:
    wanted = ir.ops.rms_norm(x, weight, 1e-5)
    cpu.use_compiled_norms()
    assert torch.equal(ir.ops.rms_norm(x, weight, 1e-5), wanted)
    assert ir.ops.rms_norm.dispatch(x, weight, 1e-5).provider == "native"
