"""A layer that shares the matrices of another one holds nothing of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compress_methods.errors import CheckpointError
from compress_methods.formats.integer import Integer

pytest.importorskip("vllm")

from vllm_compress.layers import claims as claiming
from vllm_compress.layers.claims import Claims
from vllm_compress.layers.linear import CompressedLinear, Made
from vllm_compress.targets import Target

FORMAT = Integer(bits=4, group_size=32)
OWNER = "model.layers.1.o_proj"


def layer(target: Target, made: Made) -> tuple[Any, CompressedLinear]:
    """A layer of 64 inputs and outputs with its method, before anything is loaded."""
    module: Any = nn.Module()
    module.tp_rank, module.tp_size, module.input_size, module.output_size = 0, 1, 64, 64
    module.prefix = "layer"
    method = CompressedLinear([target], made)
    method.create_weights(module, 64, [64], 64, 64, torch.float32)
    return module, method


def test_both_compute_with_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_COMPRESS_KERNEL", "reference")
    made: Made = {}
    sharer, its = layer(Target(OWNER, (64, 64), FORMAT, shared=True), made)
    assert not list(sharer.parameters())
    owner, method = layer(Target(OWNER, (64, 64), FORMAT), made)
    weight = torch.randn(64, 64)
    for name, tensor in FORMAT.pack(FORMAT.nearest(weight)).items():
        owner.get_parameter(name).weight_loader(owner.get_parameter(name), tensor)
    its.process_weights_after_loading(sharer)  # before the owner's turn
    method.process_weights_after_loading(owner)
    pairs = zip(sharer.parameters(), owner.parameters(), strict=True)
    assert all(mine.data_ptr() == theirs.data_ptr() for mine, theirs in pairs)
    x = torch.randn(3, 64)
    assert torch.equal(its.apply(sharer, x), method.apply(owner, x))


@pytest.mark.parametrize("here", [True, False])
def test_pipeline_ranks_that_would_share_are_refused(
    here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank of either layer says so; where both are on another rank all is well."""
    own, shared = (Target(OWNER, (64, 64), FORMAT, shared=s) for s in (False, True))
    other = Target("model.layers.5.o_proj", (64, 64), FORMAT)
    monkeypatch.setattr(claiming, "_pipeline_ranks", lambda: 2)
    claims = Claims()
    claims.expect([own, shared, other])
    claims.add([own if here else shared])
    with pytest.raises(CheckpointError, match=r"layers\.1\.o_proj: shared by layers of several"):
        claims.check()
    elsewhere = Claims()
    elsewhere.expect([own, shared, other])
    elsewhere.add([other])
    elsewhere.check()
