"""Our kernel enters vLLM's table where a quantized checkpoint is served, and nowhere else."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.e2e.support.foreign import pack_words

pytest.importorskip("vllm")

TABLE = """
import os, sys, vllm_compress
vllm_compress.register()
print("vllm.model_executor.kernels.linear" in sys.modules)
os.environ["VLLM_COMPRESS_FOREIGN"] = "1"
vllm_compress.register()
vllm_compress.register()
from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS
from vllm.platforms import PlatformEnum
print(*(kernel.__name__ for kernel in _POSSIBLE_KERNELS[PlatformEnum.CPU]))
"""


@pytest.mark.slow
def test_only_a_process_with_an_offer_loads_vllms_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_COMPRESS_FOREIGN", raising=False)
    done = subprocess.run([sys.executable, "-c", TABLE], capture_output=True, text=True, check=True)
    loaded, table = done.stdout.splitlines()
    assert loaded == "False"
    kernels = table.split()
    assert kernels[0] == "CompressLinearKernel"
    assert kernels.count("CompressLinearKernel") == 1


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_unpack_to_the_codes_that_were_packed(bits: int) -> None:
    from vllm_compress.kernels.third_party_kernel import unpack

    codes = torch.randint(0, 2**bits, (5, 64), dtype=torch.uint8)
    assert torch.equal(unpack(pack_words(codes, bits, 1), bits), codes)


@pytest.mark.parametrize(
    ("group", "expected"), [(-1, -1), (32, 32), (96, 32), (128, 128), (256, 128), (64, 64)]
)
def test_groups_become_the_largest_of_ours_that_divides_them(group: int, expected: int) -> None:
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
        MPLinearLayerConfig,
    )
    from vllm.scalar_type import scalar_types

    from vllm_compress.kernels.third_party_kernel import format_of

    config = MPLinearLayerConfig(
        (768, 64), (768, 64), scalar_types.uint4b8, torch.bfloat16, group, False
    )
    assert format_of(config, torch.float16).group_size == expected


def test_a_group_that_ranks_would_cut_is_refused() -> None:
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
        MPLinearLayerConfig,
    )
    from vllm.scalar_type import scalar_types

    from compress_methods.errors import CheckpointError
    from vllm_compress.kernels.third_party_kernel import require_whole_groups

    def layer(whole: int, cols: int, group: int) -> MPLinearLayerConfig:
        kind, dtype = scalar_types.uint4b8, torch.bfloat16
        return MPLinearLayerConfig((whole, 64), (cols, 64), kind, dtype, group, False)

    for fine in (layer(640, 640, 128), layer(768, 384, 128), layer(640, 320, 64)):
        require_whole_groups(fine)
    require_whole_groups(layer(640, 320, -1))
    with pytest.raises(CheckpointError, match="320 columns each would cut a group") as caught:
        require_whole_groups(layer(640, 320, 128))
    assert "import --tensor-parallel-size 2" in str(caught.value)
    with pytest.raises(CheckpointError, match="groups of 256 columns over 2 ranks"):
        require_whole_groups(layer(768, 384, 256))


def test_what_no_format_holds_is_left_to_vllm() -> None:
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
        MPLinearLayerConfig,
    )
    from vllm.scalar_type import scalar_types

    from vllm_compress.kernels.third_party_kernel import CompressLinearKernel

    for kind, group, cols, reason in (
        (scalar_types.uint4b8, 16, 128, "group_size"),
        (scalar_types.uint3b4, 128, 128, "weights are"),
        (scalar_types.uint4b8, 128, 192, "does not divide"),
    ):
        shape = (cols, 64)
        config = MPLinearLayerConfig(shape, shape, kind, torch.bfloat16, group, False)
        able, why = CompressLinearKernel.can_implement(config)
        assert not able
        assert reason in str(why)
